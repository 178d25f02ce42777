"""Source images for bridges, made from the images themselves.

A corruption is a pure function `(images, rows) -> sources`: images float32 [N, H, W, C] in [-1, 1] of
any height, width and number of channels, rows int [N] (the numbers of the examples in their set), and
sources of the same shape and range. What is drawn at random depends on the row alone: an example has
one source, in every epoch and on every host. No noise is added: that is the bridge's business.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.data import randomness
from diffusion_jax.data.source import DataSpec, Source
from diffusion_jax.registry import closest, entry, register

MASKS = ("center", "random", "none")


def blur_mask(
    images: np.ndarray,
    rows: np.ndarray,
    *,
    sigma: float = 1.0,
    mask: str = "center",
    fraction: float = 0.5,
    fill: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Gaussian blur, then a rectangle set to one value.

    Args:
      images: float32 [N, H, W, C]. rows: int [N].
      sigma: standard deviation of the blur in pixels; 0 for none. The border is repeated outwards,
        the kernel ends after four standard deviations.
      mask: "center", "random" (a place of its own for every row) or "none".
      fraction: sides of the rectangle over those of the image, in (0, 1].
      fill: the value of masked pixels; 0 is mid-grey.
      seed: of the random places.

    Returns:
      float32 [N, H, W, C].

    Raises:
      ValueError: an option out of its range.
    """
    if mask not in MASKS:
        raise ValueError(f"unknown mask {mask!r}; valid: {', '.join(MASKS)}")
    if not sigma >= 0 or not np.isfinite(sigma):
        raise ValueError(f"sigma={sigma!r} must be a number >= 0")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction!r} must be in (0, 1]")
    blurred = _blur(images, sigma) if sigma else images.copy()
    if mask == "none":
        return blurred
    height, width = images.shape[1:3]
    box = [max(1, round(fraction * side)) for side in (height, width)]
    free = np.array([height - box[0], width - box[1]])
    if mask == "random":
        draws = randomness.uniforms(randomness.hash_rows(rows, seed), 2)
        corner = np.floor(draws * (free + 1)).astype(np.int64)
    else:
        corner = np.broadcast_to(free // 2, (len(images), 2))
    inside_y = _between(np.arange(height), corner[:, :1], box[0])
    inside_x = _between(np.arange(width), corner[:, 1:], box[1])
    inside = inside_y[:, :, None, None] & inside_x[:, None, :, None]
    return np.where(inside, np.float32(fill), blurred)


def _between(places: np.ndarray, start: np.ndarray, count: int) -> np.ndarray:
    return (places >= start) & (places < start + count)


def _blur(images: np.ndarray, sigma: float) -> np.ndarray:
    count, height, width, channels = images.shape
    # Small stacked products along a leading axis are several times faster than one long product.
    rows = _banded(height, sigma) @ images.reshape(count, height, width * channels)
    turned = rows.reshape(images.shape).swapaxes(1, 2).reshape(count, width, height * channels)
    columns = _banded(width, sigma) @ turned
    blurred = columns.reshape(count, width, height, channels).swapaxes(1, 2)
    return np.ascontiguousarray(blurred)


def _banded(size: int, sigma: float) -> np.ndarray:
    """The blur along one axis as a matrix [size, size]: taps beyond the border fold onto it."""
    radius = int(np.ceil(4 * sigma))
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((size, size))
    places = np.arange(size)
    for offset, tap in zip(offsets, taps / taps.sum()):
        np.add.at(matrix, (places, np.clip(places + offset, 0, size - 1)), tap)
    return matrix.astype(np.float32)


def edges(
    images: np.ndarray, rows: np.ndarray, *, quantile: float = 0.85, floor: float = 0.15
) -> np.ndarray:
    """Binary Sobel edges of the grey image (mean over channels), the same in every channel.

    A pixel is an edge (+1, else -1) when the length of its Sobel gradient, in units of the full grey
    range, exceeds both the `quantile` of its image and `floor`. The border is repeated outwards.

    Raises:
      ValueError: an option out of its range.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile!r} must be in [0, 1]")
    if not floor >= 0:
        raise ValueError(f"floor={floor!r} must be >= 0")
    grey = images.mean(-1, dtype=np.float32) / 2
    padded = np.pad(grey, ((0, 0), (1, 1), (1, 1)), mode="edge")
    along_x = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    along_y = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    length = np.hypot(along_x[:, :, 2:] - along_x[:, :, :-2], along_y[:, 2:] - along_y[:, :-2])
    cut = np.maximum(_quantile(length, quantile), floor)
    binary = np.where(length > cut, np.float32(1), np.float32(-1))[..., None]
    return np.repeat(binary, images.shape[-1], axis=-1)


def _quantile(values: np.ndarray, quantile: float) -> np.ndarray:
    """Linearly interpolated quantile of each image: [N, H, W] -> [N, 1, 1]."""
    # numpy.quantile selects instead of sorting, which is several times slower at these sizes.
    ordered = np.sort(values.reshape(len(values), -1), axis=1)
    place = quantile * (ordered.shape[1] - 1)
    low = int(place)
    high = min(low + 1, ordered.shape[1] - 1)
    between = ordered[:, low] + np.float32(place - low) * (ordered[:, high] - ordered[:, low])
    return between[:, None, None]


def low_resolution(images: np.ndarray, rows: np.ndarray, *, factor: int = 4) -> np.ndarray:
    """Means over `factor` x `factor` blocks (smaller at the far borders), repeated to full size.

    Raises:
      ValueError: the factor is not an integer of at least 1.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor={factor!r} must be an integer >= 1")
    result = images
    for axis in (1, 2):
        size = images.shape[axis]
        starts = np.arange(0, size, factor)
        counts = np.diff(np.append(starts, size))
        shape = [1] * images.ndim
        shape[axis] = len(starts)
        means = np.add.reduceat(result, starts, axis=axis) / counts.reshape(shape)
        result = np.repeat(means.astype(np.float32), counts, axis=axis)
    return result


def noise_free(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The images themselves: a control, as a bridge from it has nothing to do."""
    return images.copy()


CORRUPTIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "blur_mask": blur_mask,
    "edges": edges,
    "low_resolution": low_resolution,
    "noise_free": noise_free,
}


class Paired(Source):
    """Adds "source", the corrupted "image", to the examples of an image source.

    Args:
      source: a source of kind "image" without a "source" of its own.
      corruption: `(images, rows) -> sources`.

    Raises:
      ValueError: the source has another kind, or pairs already.
    """

    def __init__(self, source: Source, corruption: Callable[..., np.ndarray]) -> None:
        spec = source.spec
        if spec.kind != "image" or "source" in spec.elements:
            raise ValueError(
                f"pairs are made from images; got kind {spec.kind!r}"
                f" with {', '.join(sorted(spec.elements))}"
            )
        elements = {**spec.elements, "source": spec.elements["image"]}
        self.spec = DataSpec(**(vars(spec) | {"elements": elements}))
        self._source, self._corruption = source, corruption

    def __len__(self) -> int:
        return len(self._source)

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        taken = self._source.take(rows)
        if len(rows):
            made = self._corruption(taken["image"], rows)
        else:
            made = taken["image"].copy()
        return taken | {"source": made.astype(np.float32, copy=False)}


@register("data", "paired", kinds=("image",))
def paired(
    data: str | Source = "digits",
    corruption: str | Callable[..., np.ndarray] = "blur_mask",
    *,
    options: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Paired:
    """Pairs for a bridge, from any image data set.

    Args:
      data: a registered data set of images, or a source.
      corruption: "blur_mask", "edges", "low_resolution", "noise_free", or such a function.
      options: further arguments of the corruption.
      arguments: of the data set (`split` and so on).

    Returns:
      A source of "image" (the target), "source" (the corrupted image) and the other entries.

    Raises:
      ValueError: unknown names or options; a data set without images, or with pairs of its own.
    """
    if isinstance(corruption, str):
        if corruption not in CORRUPTIONS:
            raise ValueError(f"unknown corruption {corruption!r}{closest(corruption, CORRUPTIONS)}")
        corruption = CORRUPTIONS[corruption]
    if isinstance(data, Source):
        if arguments:
            raise ValueError(f"{', '.join(arguments)}: only with the name of a data set")
        source = data
    else:
        source = entry("data", data).build(**arguments)
    function = functools.partial(corruption, **(options or {}))
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ValueError(
            f"options={dict(options or {})} do not fit the corruption: {error}"
        ) from error
    result = Paired(source, function)
    result.take([0])  # a bad value of an option is reported here rather than in a reading thread
    return result
