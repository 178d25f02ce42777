"""Linear filters along the sides of images, as matrices, and motion blur.

Images are float32 [N, H, W, C]; the border is repeated outwards, so weights that sum to one keep a
constant image as it is.
"""

import numpy as np


def separable(images: np.ndarray, tall: np.ndarray, wide: np.ndarray) -> np.ndarray:
    """Applies `tall` [H', H] to the columns and `wide` [W', W] to the rows: float32 [N, H', W', C]."""
    count, height, width, channels = images.shape
    # Small stacked products along a leading axis are several times faster than one long product.
    rows = tall @ images.reshape(count, height, width * channels)
    rows = rows.reshape(count, len(tall), width, channels).swapaxes(1, 2)
    columns = wide @ rows.reshape(count, width, len(tall) * channels)
    columns = columns.reshape(count, len(wide), len(tall), channels).swapaxes(1, 2)
    return np.ascontiguousarray(columns)


def banded(size: int, taps: np.ndarray) -> np.ndarray:
    """Filter with an odd number of taps as a matrix [size, size]: taps beyond the border fold onto it."""
    radius = len(taps) // 2
    matrix = np.zeros((size, size))
    places = np.arange(size)
    for offset, tap in zip(range(-radius, radius + 1), taps / taps.sum()):
        np.add.at(matrix, (places, np.clip(places + offset, 0, size - 1)), tap)
    return matrix.astype(np.float32)


def gaussian_taps(sigma: float) -> np.ndarray:
    """Weights of a Gaussian of standard deviation `sigma` pixels, to four of them."""
    radius = int(np.ceil(4 * sigma))
    return np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)


def gaussian(images: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur; sigma 0 copies."""
    if not sigma:
        return images.copy()
    return separable(images, *(banded(side, gaussian_taps(sigma)) for side in images.shape[1:3]))


def cubic(size: int, new: int) -> np.ndarray:
    """Bicubic interpolation (Keys 1981, a = -1/2) from `size` to `new` samples, as a matrix [new, size].

    Towards fewer samples the kernel is stretched by the factor, which removes what these cannot hold;
    samples beyond the border are left out and the weights rescaled.
    """
    scale = max(size / new, 1.0)
    centre = (np.arange(new) + 0.5) * (size / new)
    x = np.abs((np.arange(size) + 0.5 - centre[:, None]) / scale)
    inner = (1.5 * x - 2.5) * x * x + 1
    outer = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, inner, np.where(x < 2, outer, 0.0))
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def motion(images: np.ndarray, length: float, angle: np.ndarray) -> np.ndarray:
    """Means along a line through each pixel.

    Args:
      images: [N, H, W, C].
      length: of the line in pixels; it is read at places at most a pixel apart, between pixels by
        bilinear interpolation.
      angle: [N], radians from the x axis towards the y axis (downwards).
    """
    count, height, width, _ = images.shape
    taps = max(1, int(np.ceil(length)))
    steps = (np.arange(taps) - (taps - 1) / 2) * (length / taps)
    total = np.zeros_like(images)
    example = np.arange(count)[:, None, None]
    for step in steps:
        y = np.clip(np.arange(height) + step * np.sin(angle)[:, None], 0, height - 1)
        x = np.clip(np.arange(width) + step * np.cos(angle)[:, None], 0, width - 1)
        top, left = np.floor(y).astype(np.int64), np.floor(x).astype(np.int64)
        for i, down in ((top, 1 - (y - top)), (np.minimum(top + 1, height - 1), y - top)):
            for j, across in ((left, 1 - (x - left)), (np.minimum(left + 1, width - 1), x - left)):
                weight = (down[:, :, None] * across[:, None, :]).astype(np.float32)[..., None]
                total += weight * images[example, i[:, :, None], j[:, None, :]]
    return total / np.float32(taps)
