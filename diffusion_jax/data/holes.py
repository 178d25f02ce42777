"""Which pixels of an image are unknown: masks for inpainting, 1 in the hole and 0 outside.

A mask depends on the row of the example and on the seed alone: an example has one hole, in every epoch
and on every host.

"center" and "random" are one rectangle; "boxes" are several, drawn until a share of the picture is
covered; "freeform" are brush strokes, random walks of a round brush as in free-form inpainting (Yu et
al., arXiv 1806.03589), drawn until a share of the picture is covered. More than 64 pieces are not drawn.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from diffusion_jax.data import images as files
from diffusion_jax.data import randomness

HOLES = ("center", "random", "boxes", "freeform")

# Words that keep apart what a row draws.
_SHARE, _PIECE = 1, 2
_MOST_PIECES = 64


def rectangle(
    shape: tuple[int, int], fraction: float, size: int | Sequence[int] | None
) -> tuple[int, int]:
    """(height, width) of a rectangle within an image of `shape`.

    Args:
      shape: (H, W).
      fraction: sides of the rectangle over those of the image, in (0, 1].
      size: its sides in pixels instead.

    Raises:
      ValueError: a fraction or a size out of its range.
    """
    if size is None:
        if not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction!r} must be in (0, 1]")
        return tuple(max(1, round(fraction * side)) for side in shape)
    pair = tuple(size) if isinstance(size, Sequence) else (size, size)
    whole = len(pair) == 2 and all(isinstance(side, int) for side in pair)
    if not whole or not all(0 < side <= most for side, most in zip(pair, shape)):
        raise ValueError(
            f"size={size!r} must be pixels (height, width) within images of {shape[0]} x {shape[1]}"
        )
    return pair


def rectangles(
    rows: np.ndarray, shape: tuple[int, int], box: tuple[int, int], random: bool, seed: int
) -> np.ndarray:
    """One rectangle of sides `box` an example, in the middle or at a place of its own.

    Returns:
      bool [N, H, W].
    """
    free = np.array([shape[0] - box[0], shape[1] - box[1]])
    if random:
        draws = randomness.uniforms(randomness.hash_rows(rows, seed), 2)
        corner = np.floor(draws * (free + 1)).astype(np.int64)
    else:
        corner = np.broadcast_to(free // 2, (len(rows), 2))
    return _boxes(corner, np.broadcast_to(box, corner.shape), shape)


def _boxes(corner: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    inside = [
        (np.arange(side) >= corner[:, i, None])
        & (np.arange(side) < corner[:, i, None] + box[:, i, None])
        for i, side in enumerate(shape)
    ]
    return inside[0][:, :, None] & inside[1][:, None, :]


def _shares(rows: np.ndarray, fraction: float | Sequence[float], seed: int) -> np.ndarray:
    """The share of the picture that each row's hole has to reach, [N]."""
    pair = tuple(fraction) if isinstance(fraction, Sequence) else (fraction, fraction)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] < 1:
        raise ValueError(
            f"fraction={fraction!r} must be a share of the picture in (0, 1), or a range of shares"
        )
    draws = randomness.uniforms(randomness.hash_rows(rows, seed, _SHARE), 1)[:, 0]
    return pair[0] + (pair[1] - pair[0]) * draws


def boxes(
    rows: np.ndarray, shape: tuple[int, int], fraction: float | Sequence[float], seed: int = 0
) -> np.ndarray:
    """Rectangles, each side an eighth to a half of the image's, until the share is reached; what lies
    beyond the borders is cut off.

    Returns:
      bool [N, H, W].

    Raises:
      ValueError: a fraction outside (0, 1).
    """
    target = _shares(rows, fraction, seed)
    hole = np.zeros((len(rows), *shape), bool)
    sides = np.array(shape)
    for piece in range(_MOST_PIECES):
        small = np.flatnonzero(hole.mean((1, 2)) < target)
        if not len(small):
            break
        draws = randomness.uniforms(randomness.hash_rows(rows[small], seed, _PIECE, piece), 4)
        box = np.maximum(1, np.round(sides * (0.125 + 0.375 * draws[:, :2]))).astype(np.int64)
        # Middles anywhere: boxes kept within the borders would hardly ever reach a corner.
        corner = np.floor(draws[:, 2:] * sides).astype(np.int64) - box // 2
        hole[small] |= _boxes(corner, box, shape)
    return hole


def strokes(
    rows: np.ndarray, shape: tuple[int, int], fraction: float | Sequence[float], seed: int = 0
) -> np.ndarray:
    """Brush strokes until the share is reached: a segment goes on from the last one's end, turned by a
    random angle, and every fourth begins somewhere else.

    A segment is a fifth to a half of the shorter side long, the brush a tenth to a sixth of it wide, and
    at least 2 pixels.

    Returns:
      bool [N, H, W].

    Raises:
      ValueError: a fraction outside (0, 1).
    """
    target = _shares(rows, fraction, seed)
    hole = np.zeros((len(rows), *shape), bool)
    last, short = np.array(shape) - 1, min(shape)
    place = np.zeros((len(rows), 2))
    for piece in range(_MOST_PIECES):
        small = np.flatnonzero(hole.mean((1, 2)) < target)
        if not len(small):
            break
        draws = randomness.uniforms(randomness.hash_rows(rows[small], seed, _PIECE, piece), 5)
        if piece % 4 == 0:
            place[small] = draws[:, 3:] * last
        length = short * (0.2 + 0.3 * draws[:, 0])
        angle = 2 * np.pi * draws[:, 1]
        radius = np.maximum(1.0, short * (1 + 2 / 3 * draws[:, 2]) / 20)
        turn = np.stack([np.sin(angle), np.cos(angle)], -1)
        end = np.clip(place[small] + length[:, None] * turn, 0, last)
        for row, start, stop, width in zip(small, place[small], end, radius):
            _paint(hole[row], start, stop, width)
        place[small] = end
    return hole


def _paint(hole: np.ndarray, start: np.ndarray, stop: np.ndarray, radius: float) -> None:
    """Covers the pixels of [H, W] within `radius` of the segment from `start` to `stop`."""
    low = np.maximum(np.floor(np.minimum(start, stop) - radius), 0).astype(np.int64)
    high = np.ceil(np.maximum(start, stop) + radius).astype(np.int64) + 1
    part = hole[low[0] : high[0], low[1] : high[1]]
    y = np.arange(low[0], low[0] + part.shape[0])[:, None] - start[0]
    x = np.arange(low[1], low[1] + part.shape[1]) - start[1]
    along = stop - start
    nearest = np.clip((y * along[0] + x * along[1]) / max(along @ along, 1e-12), 0, 1)
    part |= (y - nearest * along[0]) ** 2 + (x - nearest * along[1]) ** 2 <= radius**2


def check_mask(mask: np.ndarray, name: str) -> np.ndarray:
    """A mask as float32. Raises ValueError naming the first value that is neither 0 nor 1."""
    mask = np.asarray(mask)
    if not (np.issubdtype(mask.dtype, np.number) or mask.dtype == np.bool_):
        raise ValueError(f"{name} must be numbers, got dtype {mask.dtype}")
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        raise ValueError(
            f"{name} holds {np.count_nonzero(wrong)} values that are neither 0 (known) nor 1 (unknown),"
            f" such as {mask[wrong].flat[0]:g}"
        )
    return mask.astype(np.float32)


def from_pixels(pixels: np.ndarray, name: str) -> np.ndarray:
    """A mask [..., H, W, 1] from grey pixels uint8: black is known, white unknown.

    Raises:
      ValueError: a pixel that is neither 0 nor 255.
    """
    wrong = (pixels != 0) & (pixels != 255)
    if wrong.any():
        raise ValueError(
            f"{name}: a mask holds black (known) and white (unknown) pixels only;"
            f" {np.count_nonzero(wrong)} are of other levels, such as {pixels[wrong].flat[0]}"
            " (JPEG files and resized masks have such)"
        )
    return (pixels == 255).astype(np.float32)


def fixed(mask: np.ndarray | str | pathlib.Path, shape: tuple[int, int]) -> np.ndarray:
    """The user's mask, one for all examples: an array [H, W] or [H, W, 1], or an image file.

    Returns:
      bool [H, W].

    Raises:
      ValueError: a file that cannot be read, another shape than the images, values that are not 0 or 1
        (0 or 255 in a file).
    """
    if isinstance(mask, str | pathlib.Path):
        path = pathlib.Path(mask).expanduser()
        name = f"mask {str(path)!r}"
        mask = from_pixels(files.decode(files.read(path), name, channels=1), name)
    else:
        name, mask = "mask", check_mask(mask, "mask")
    if mask.ndim == 3 and mask.shape[-1] == 1:
        mask = mask[..., 0]
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {mask.shape}, the images are {shape[0]} x {shape[1]}")
    return mask.astype(bool)
