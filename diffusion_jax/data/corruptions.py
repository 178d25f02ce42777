"""Source images for bridges, made from the images themselves.

A corruption is a pure function `(images, rows) -> sources`: images float32 [N, H, W, C] in [-1, 1] of
any height, width and number of channels, rows int [N] (the numbers of the examples in their set), and
sources of the same shape and range. `inpaint` returns a dict of "source" and "mask" instead. What is
drawn at random depends on the row alone: an example has one source, in every epoch and on every host.
No noise is added: that is the bridge's business; `inpaint` may fill its holes with it.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data import filters, holes, randomness
from diffusion_jax.data import images as files
from diffusion_jax.registry import check_choice

MASKS = ("center", "random", "none")
BLURS = ("gaussian", "uniform", "motion")
SAMPLINGS = ("mean", "bicubic"), ("nearest", "bicubic")


def _check_number(name: str, value: Any, smallest: float, what: str) -> None:
    if not isinstance(value, int | float) or not smallest <= value < np.inf:
        raise ValueError(f"{name}={value!r} must be {what}")


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
    check_choice("mask", mask, MASKS)
    _check_number("sigma", sigma, 0, "a number >= 0")
    box = holes.rectangle(images.shape[1:3], fraction, None)
    blurred = filters.gaussian(images, sigma)
    if mask == "none":
        return blurred
    inside = holes.rectangles(rows, images.shape[1:3], box, mask == "random", seed)
    return np.where(inside[..., None], np.float32(fill), blurred)


def inpaint(
    images: np.ndarray,
    rows: np.ndarray,
    *,
    hole: str = "center",
    fraction: float | Sequence[float] | None = None,
    size: int | Sequence[int] | None = None,
    mask: Any = None,
    fill: float | str = 0.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A hole in each image, and where it is.

    Args:
      images: float32 [N, H, W, C]. rows: int [N].
      hole: "center" and "random" (a place of its own for every row): a rectangle; "boxes", "freeform"
        (brush strokes): see `holes`.
      fraction: of rectangles the sides over those of the image, in (0, 1], default 0.5. Otherwise the
        share of the pixels that a hole reaches, in (0, 1), or a range from which each row draws its
        own, default (0.2, 0.3); the last piece may go beyond.
      size: sides of the rectangle in pixels, a number or (height, width), instead of `fraction`.
      mask: one hole for all images, instead of the above: an array [H, W] of 0 (known) and 1, or an
        image file of black (known) and white pixels.
      fill: the value in the hole, 0 being mid-grey; or "noise": standard normal numbers, as I2SB
        (arXiv 2302.05872) fills it. They belong to the row, as the hole does.
      seed: of places, shares and noise.

    Returns:
      "source" float32 [N, H, W, C], "mask" float32 [N, H, W, 1]: 1 in the hole, 0 where the source is
      the image.

    Raises:
      ValueError: an option out of its range, or a mask of another shape or of other values.
    """
    shape = images.shape[1:3]
    check_choice("hole", hole, holes.HOLES)
    if mask is not None:
        if (fraction, size) != (None, None):
            raise ValueError("a mask of one's own leaves no choice of fraction= or size=")
        inside = np.broadcast_to(holes.fixed(mask, shape), (len(rows), *shape))
    elif hole in ("center", "random"):
        box = holes.rectangle(shape, 0.5 if fraction is None else fraction, size)
        inside = holes.rectangles(rows, shape, box, hole == "random", seed)
    else:
        if size is not None:
            raise ValueError(f"size={size!r} is of rectangles; hole={hole!r} takes fraction=")
        make = holes.boxes if hole == "boxes" else holes.strokes
        inside = make(rows, shape, (0.2, 0.3) if fraction is None else fraction, seed)
    if fill == "noise":
        words = randomness.hash_rows(rows, seed, len(holes.HOLES))
        filling = randomness.normals(words, images[0].size).reshape(images.shape)
    elif isinstance(fill, int | float) and np.isfinite(fill):
        filling = np.float32(fill)
    else:
        raise ValueError(f"fill={fill!r} must be a number or 'noise'")
    inside = inside[..., None]
    return {"source": np.where(inside, filling, images), "mask": inside.astype(np.float32)}


def blur(
    images: np.ndarray,
    rows: np.ndarray,
    *,
    kernel: str = "gaussian",
    sigma: float = 1.5,
    width: int = 5,
    length: float = 7.0,
    angle: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Blur, for deblurring. The border is repeated outwards.

    Args:
      images: float32 [N, H, W, C]. rows: int [N].
      kernel: "gaussian"; "uniform", the mean over a square; "motion", the mean along a line.
      sigma: standard deviation of "gaussian" in pixels.
      width: side of the square of "uniform" in pixels, an odd number.
      length: of the line of "motion" in pixels.
      angle: of the line in degrees from the x axis, turning downwards; None draws one for every row.
      seed: of the angles.

    Returns:
      float32 [N, H, W, C].

    Raises:
      ValueError: an option out of its range.
    """
    check_choice("kernel", kernel, BLURS)
    _check_number("sigma", sigma, 0, "a number >= 0")
    if not isinstance(width, int) or width < 1 or width % 2 == 0:
        raise ValueError(f"width={width!r} must be an odd number of pixels >= 1")
    _check_number("length", length, 0, "a number of pixels >= 0")
    if angle is not None:
        _check_number("angle", angle, -np.inf, "a number of degrees, or None")
    if kernel == "gaussian":
        return filters.gaussian(images, sigma)
    if kernel == "uniform":
        taps = np.ones(width)
        return filters.separable(images, *(filters.banded(n, taps) for n in images.shape[1:3]))
    if angle is None:
        radians = np.pi * randomness.uniforms(randomness.hash_rows(rows, seed), 1)[:, 0]
    else:
        radians = np.full(len(images), np.radians(angle))
    return filters.motion(images, length, radians)


def grey(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Luma (Rec. 601: 0.299 R + 0.587 G + 0.114 B), the same in every channel: for colourisation.

    Raises:
      ValueError: images without three channels.
    """
    if images.shape[-1] != 3:
        raise ValueError(f"grey is of RGB images; these have {images.shape[-1]} channels")
    luma = images @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(luma[..., None], 3, axis=-1)


def jpeg(images: np.ndarray, rows: np.ndarray, *, quality: int = 10) -> np.ndarray:
    """The image as it comes back from a JPEG file, with colours at half resolution as usual.

    The last bits depend on the JPEG library that Pillow was built with.

    Raises:
      ValueError: a quality outside 1..95, or images that have neither 1 nor 3 channels.
      ImportError: Pillow is missing.
    """
    if not isinstance(quality, int) or not 1 <= quality <= 95:
        raise ValueError(f"quality={quality!r} must be an integer in 1..95")
    if images.shape[-1] not in (1, 3):
        raise ValueError(f"JPEG holds 1 or 3 channels; these images have {images.shape[-1]}")
    PIL = files.pillow()
    made = np.empty_like(images)
    for row, pixels in enumerate(files.to_uint8(images)):
        buffer = io.BytesIO()
        shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        PIL.Image.fromarray(shown).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
        with PIL.Image.open(buffer, formats=("JPEG",)) as image:
            made[row] = files.to_float(np.asarray(image).reshape(pixels.shape))
    return made


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


def low_resolution(
    images: np.ndarray,
    rows: np.ndarray,
    *,
    factor: int = 4,
    down: str = "mean",
    up: str = "nearest",
) -> np.ndarray:
    """An image of fewer pixels, brought back to full size: for super-resolution.

    Args:
      images: float32 [N, H, W, C]. rows: int [N].
      factor: full size over small size; the small side is rounded up.
      down: "mean" over `factor` x `factor` blocks (smaller at the far borders), or "bicubic" with an
        antialiased kernel.
      up: "nearest" or "bicubic". What was bicubic is clipped to [-1, 1].

    Returns:
      float32 [N, H, W, C].

    Raises:
      ValueError: the factor is not an integer of at least 1, or an unknown option.
    """
    if not isinstance(factor, int) or factor < 1:
        raise ValueError(f"factor={factor!r} must be an integer >= 1")
    check_choice("down", down, SAMPLINGS[0])
    check_choice("up", up, SAMPLINGS[1])
    sides = images.shape[1:3]
    small = [-(-side // factor) for side in sides]
    if down == "mean":
        made = filters.separable(images, *(_block_means(side, factor) for side in sides))
    else:
        made = filters.separable(images, *map(filters.cubic, sides, small))
    if up == "nearest":
        for axis, side in enumerate(sides, start=1):
            made = np.repeat(made, factor, axis=axis).take(np.arange(side), axis=axis)
    else:
        made = filters.separable(made, *map(filters.cubic, small, sides))
    # The cubic kernel has negative lobes.
    return np.clip(made, -1.0, 1.0) if "bicubic" in (down, up) else made


def _block_means(size: int, factor: int) -> np.ndarray:
    block = np.arange(size) // factor
    inside = block == np.arange(block[-1] + 1)[:, None]
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)


def noise_free(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The images themselves: a control, as a bridge from it has nothing to do."""
    return images.copy()


CORRUPTIONS: Mapping[str, Callable[..., Any]] = {
    "blur": blur,
    "blur_mask": blur_mask,
    "edges": edges,
    "grey": grey,
    "inpaint": inpaint,
    "jpeg": jpeg,
    "low_resolution": low_resolution,
    "noise_free": noise_free,
}
