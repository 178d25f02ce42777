"""Distances between an image and its reference: MSE, PSNR, SSIM (Wang et al. 2004).

All take batches [B, H, W, C], return one float32 per image, [B], and run under `jit` and `vmap`.
The range of the values is always said: 2.0 for images in [-1, 1], 1.0 for [0, 1], 255 for bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _check_pair(images, reference) -> tuple[jax.Array, jax.Array]:
    if jnp.ndim(images) != 4 or jnp.shape(images) != jnp.shape(reference):
        raise ValueError(
            f"images and reference must share a shape [B, H, W, C], "
            f"got {jnp.shape(images)} and {jnp.shape(reference)}"
        )
    return jnp.asarray(images, jnp.float32), jnp.asarray(reference, jnp.float32)


def _check_range(data_range: float) -> None:
    if not data_range > 0:
        raise ValueError(f"data_range must be positive, got {data_range}")


def mse(images, reference) -> jax.Array:
    """Mean squared error over pixels and channels, float32 [B].

    Raises:
      ValueError: shapes differ or are not [B, H, W, C].
    """
    images, reference = _check_pair(images, reference)
    return jnp.mean(jnp.square(images - reference), axis=(1, 2, 3))


def psnr(images, reference, *, data_range: float) -> jax.Array:
    """Peak signal-to-noise ratio 10 log10(data_range^2 / mse) in decibel, float32 [B].

    Identical images give infinity.

    Raises:
      ValueError: shapes differ or are not [B, H, W, C], or data_range <= 0.
    """
    _check_range(data_range)
    return 20.0 * jnp.log10(jnp.float32(data_range)) - 10.0 * jnp.log10(mse(images, reference))


def _window_weights(window: int, sigma: float | None) -> np.ndarray:
    if sigma is None:
        return np.full(window, 1.0 / window)
    offsets = np.arange(window) - (window - 1) / 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _valid_filter(size: int, weights: np.ndarray) -> np.ndarray:
    """The matrix [size - window + 1, size] that slides the window over one axis."""
    window = len(weights)
    matrix = np.zeros((size - window + 1, size), np.float32)
    for row in range(len(matrix)):
        matrix[row, row : row + window] = weights
    return matrix


def ssim(
    images,
    reference,
    *,
    data_range: float,
    window: int = 7,
    sigma: float | None = None,
    k1: float = 0.01,
    k2: float = 0.03,
) -> jax.Array:
    """Structural similarity, averaged over the valid windows and the channels, float32 [B].

    Images of 8x8 hold 2x2 windows of 7. Variances are those of the window (weights summing to 1),
    as in the paper; only full windows count, nothing is padded.

    Args:
      images, reference: [B, H, W, C].
      data_range: largest minus smallest possible value.
      window: side of the window; at most min(H, W).
      sigma: width of Gaussian weights (the paper: window=11, sigma=1.5); None is a flat window.
      k1, k2: the paper's constants.

    Raises:
      ValueError: shapes differ, the window does not fit, or data_range <= 0.
    """
    _check_range(data_range)
    images, reference = _check_pair(images, reference)
    height, width = images.shape[1:3]
    if not 1 <= window <= min(height, width):
        raise ValueError(f"window must be in 1 .. {min(height, width)}, got {window}")
    weights = _window_weights(window, sigma)
    rows, columns = _valid_filter(height, weights), _valid_filter(width, weights)

    def local_mean(x):
        return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns, precision="highest")

    # The windows' variances are differences of second moments; centring keeps them from cancelling.
    shift_a = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    shift_b = jnp.mean(reference, axis=(1, 2, 3), keepdims=True)
    a, b = images - shift_a, reference - shift_b
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = local_mean(a * a) - mean_a * mean_a
    variance_b = local_mean(b * b) - mean_b * mean_b
    covariance = local_mean(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + shift_a, mean_b + shift_b
    c1, c2 = (k1 * data_range) ** 2, (k2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def restoration(images, reference, *, data_range: float, window: int | None = None) -> dict:
    """Means over a batch of restored images: {"psnr", "mse", "ssim", "n"}, Python numbers.

    "psnr" is the mean of the images' PSNR, not the PSNR of the mean error. `window=None` takes 7 or
    the image's smaller side.

    Raises:
      ValueError: as the single figures.
    """
    images, reference = _check_pair(images, reference)
    window = min(7, *images.shape[1:3]) if window is None else window
    similarity = ssim(images, reference, data_range=data_range, window=window)
    return {
        "psnr": float(jnp.mean(psnr(images, reference, data_range=data_range))),
        "mse": float(jnp.mean(mse(images, reference))),
        "ssim": float(jnp.mean(similarity)),
        "n": images.shape[0],
    }
