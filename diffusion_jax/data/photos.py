"""Colour patches of the two photographs that scikit-learn carries: no download.

`sklearn.datasets.load_sample_images`: a Chinese temple and a dahlia, 427 x 640 pixels each, as
scikit-learn states released by their photographer under a Creative Commons Attribution licence
(CC BY 2.0): who shows them names the author, whom scikit-learn's description does.

The split is of space: each photograph is cut into blocks of two patches' sides, and every fifth block
(counted so that they lie spread over the picture) is for testing. Test patches lie within test blocks;
training patches touch none. Patches come in a fixed order that is shuffled.
"""

import numpy as np

from diffusion_jax.data import images, randomness
from diffusion_jax.data.source import DataSpec, Element, Source, check_split
from diffusion_jax.registry import register

TEST_EVERY = 5


class Photos(Source):
    """Patches cut from whole photographs when they are taken; made by `photos`."""

    def __init__(self, pictures: np.ndarray, corners: np.ndarray, size: int) -> None:
        self._pictures, self._corners, self._size = pictures, corners, size
        shape = (size, size, pictures.shape[-1])
        self.spec = DataSpec(
            kind="image", elements={"image": Element(shape, "float32")}, show="image"
        )

    def __len__(self) -> int:
        return len(self._corners)

    @property
    def corners(self) -> np.ndarray:
        """Photograph, top row and left column of every patch: int64 [N, 3]."""
        return self._corners

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        picture, top, left = self._corners[rows].T[:, :, None, None]
        along = np.arange(self._size)
        pixels = self._pictures[picture, top + along[:, None], left + along]
        return {"image": images.to_float(pixels)}


@register("data", "photos", kinds=("image",))
def photos(
    split: str = "train",
    *,
    size: int = 32,
    stride: int = 4,
    contrast: float = 0.1,
) -> Photos:
    """Patches of scikit-learn's two sample photographs.

    Args:
      split: "train", or "test".
      size: side of a patch in pixels, 4 to 128.
      stride: pixels from one patch to the next, along both sides.
      contrast: patches of blank sky or background are left out: those where the standard deviation of
        a channel over the pixels (values in [-1, 1]), root mean square over the channels, is smaller.

    Returns:
      A source of "image" float32 [size, size, 3] in [-1, 1]; no labels. By default 9,294 patches to train on and 1,089 to test.

    Raises:
      ValueError: an unknown split, a size, stride or contrast out of its range, or no patch left.
      ImportError: scikit-learn or Pillow is missing.
    """
    check_split(split, ("train", "test"))
    if not isinstance(size, int) or not 4 <= size <= 128:
        raise ValueError(f"size={size!r} must be an integer in 4..128")
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride={stride!r} must be an integer >= 1")
    if not 0 <= contrast < 1:
        raise ValueError(f"contrast={contrast!r} must be in [0, 1)")
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("data set 'photos' needs: pip install scikit-learn") from error
    images.pillow()
    pictures = np.stack(load_sample_images().images)
    corners = []
    for number, picture in enumerate(pictures):
        for_test = _window_means(_test_blocks(picture.shape[:2], 2 * size)[..., None], size)[..., 0]
        pixels = images.to_float(picture).astype(np.float64)
        variance = _window_means(pixels**2, size) - _window_means(pixels, size) ** 2
        # Sums of integers are exact, so an untouched patch is at exactly 0 and a full one at 1.
        wanted = (for_test == (split == "test")) & (variance.mean(-1) >= contrast**2)
        places = np.argwhere(wanted[::stride, ::stride]) * stride
        corners.append(np.insert(places, 0, number, axis=1))
    found = np.concatenate(corners)
    if not len(found):
        raise ValueError(f"no {split} patch of {size} pixels has a contrast of {contrast}")
    # The first patches stand for all: neighbours overlap, and one photograph comes before the other.
    return Photos(pictures, found[randomness.permutation(len(found), 0, 0)], size)


def _test_blocks(shape: tuple[int, int], block: int) -> np.ndarray:
    """Which pixels are of test blocks: bool [H, W]. Knight's moves lead from one block to the next."""
    row, column = np.arange(shape[0]) // block, np.arange(shape[1]) // block
    return (column + 2 * row[:, None]) % TEST_EVERY == 1


def _window_means(values: np.ndarray, size: int) -> np.ndarray:
    """Means over every window of `size` x `size`: [H, W, C] -> float64 [H - size + 1, W - size + 1, C]."""
    sums = np.pad(values.astype(np.float64), ((1, 0), (1, 0), (0, 0))).cumsum(0).cumsum(1)
    rows = sums[size:] - sums[:-size]
    return (rows[:, size:] - rows[:, :-size]) / size**2
