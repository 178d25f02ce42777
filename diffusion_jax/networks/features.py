"""Parameter-free pieces: features of times and positions, patches, resampling, FiLM.

(1) time features     [cos(w_i s t), sin(w_i s t)], w_i = p^(-i/n), i < n   1706.03762, 2006.11239
(2) FiLM              y = x (1 + scale) + shift                             1709.07871
(3) rotary positions  <R_m q, R_n k> depends on m - n only                  2104.09864
(4) value features    [sin(2^n 2 pi x), cos(2^n 2 pi x)]                    2107.00630
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def time_features(
    t: jax.Array,
    features: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10_000.0,
    endpoint: bool = False,
    dtype: Any = jnp.float32,
) -> jax.Array:
    """Sinusoidal features (1) of a time, a noise level or a log-SNR.

    The angular frequencies of `t` run from `scale` down to about `scale / max_period`. 1000 suits
    times in [0, 1] (the step numbers of arXiv 2006.11239); a log-SNR wants 50 or less.

    Args:
      t: real [B].
      features: their number, even.
      scale: factor on `t`.
      max_period: ratio of the highest to the lowest frequency.
      endpoint: the ratio is exact: i runs to n - 1 over n - 1 (arXiv 2006.11239) instead of over n.
      dtype: float32 or float64, of the computation and the result.

    Returns:
      [B, features]: the cosines, then the sines.

    Raises:
      ValueError: `features` is odd or not positive.
    """
    if features < 2 or features % 2:
        raise ValueError(f"time_features must be a positive even number, got {features}")
    half = features // 2
    frequencies = scale * max_period ** (
        -np.arange(half) / (max(half - 1, 1) if endpoint else half)
    )
    angles = t.astype(dtype)[:, None] * jnp.asarray(frequencies, dtype)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def value_features(x: jax.Array, exponents: Sequence[int]) -> jax.Array:
    """The values of an image with sines and cosines (4) of them, which tell levels apart.

    Data with even steps of 2 / L between levels wants exponents about log2(L) - 1 and - 2.

    Args:
      x: float [..., C]; the features are computed in float32.
      exponents: n of each frequency 2^n.

    Returns:
      [..., C (1 + 2 len(exponents))] in the dtype of `x`, x first.
    """
    if not exponents:
        return x
    angles = [2.0 * np.pi * 2.0**n * x.astype(jnp.float32) for n in exponents]
    waves = [f(a).astype(x.dtype) for a in angles for f in (jnp.sin, jnp.cos)]
    return jnp.concatenate([x, *waves], axis=-1)


def sincos_positions(height: int, width: int, features: int) -> np.ndarray:
    """Fixed two-dimensional sine and cosine positions (arXiv 2111.06377, 2212.09748).

    The first half of the features encodes the column, the second half the row, each as sines, then
    cosines, of the frequencies of (1) with s = 1.

    Returns:
      float32 [height * width, features], in row-major order.

    Raises:
      ValueError: `features` is not divisible by 4.
    """
    if features % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {features}")
    frequencies = 10_000.0 ** (-np.arange(features // 4) / (features // 4))

    def axis(positions):
        angles = positions[:, None] * frequencies[None]
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    rows = np.repeat(axis(np.arange(height)), width, axis=0)
    columns = np.tile(axis(np.arange(width)), (height, 1))
    return np.concatenate([columns, rows], axis=-1).astype(np.float32)


def rotary_angles(
    length: int, features: int, *, base: float = 10_000.0, dtype: Any = jnp.float32
) -> jax.Array:
    """Angles of rotary positions 0..length-1 (arXiv 2104.09864).

    Args:
      length: number of positions.
      features: width of a head, even.
      base: ratio of the highest to the lowest frequency.
      dtype: float32 or float64.

    Returns:
      [length, features // 2].

    Raises:
      ValueError: `features` is odd.
    """
    if features % 2:
        raise ValueError(f"rotary positions need heads of even width, got {features}")
    frequencies = base ** (-np.arange(features // 2) / (features // 2))
    return jnp.asarray(np.arange(length)[:, None] * frequencies[None], dtype)


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Applies rotary positions: the pairs (x_i, x_{i + n/2}) turn by their angle.

    Args:
      x: [B, L, heads, n].
      angles: [L, n // 2], from `rotary_angles`.

    Returns:
      [B, L, heads, n] in the dtype of `x`; the rotation itself is in that of the angles.
    """
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    first, second = jnp.split(x.astype(angles.dtype), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def patchify(x: jax.Array, patch_size: int) -> jax.Array:
    """[B, H, W, C] -> [B, (H / p) (W / p), p * p * C], patches in row-major order.

    Raises:
      ValueError: `patch_size` does not divide H and W.
    """
    batch, height, width, channels = x.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"height and width must be divisible by patch_size = {patch_size}, "
            f"got {height} x {width}"
        )
    rows, columns = height // patch_size, width // patch_size
    x = x.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, -1)


def unpatchify(patches: jax.Array, patch_size: int, height: int, width: int) -> jax.Array:
    """Inverse of `patchify`: [B, (H / p) (W / p), p * p * C] -> [B, H, W, C].

    Raises:
      ValueError: the patches do not fill a height x width image.
    """
    batch, length, features = patches.shape
    rows, columns = height // patch_size, width // patch_size
    if (
        length != rows * columns
        or features % patch_size**2
        or (height, width) != (rows * patch_size, columns * patch_size)
    ):
        raise ValueError(
            f"patches of shape {patches.shape} with patch_size = {patch_size} do not fill "
            f"{height} x {width} pixels"
        )
    x = patches.reshape(batch, rows, columns, patch_size, patch_size, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, -1)


def downsample(x: jax.Array) -> jax.Array:
    """Mean over 2 x 2 pixels: [B, H, W, C] -> [B, H / 2, W / 2, C] for even H and W."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean(axis=(2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Nearest neighbour: [B, H, W, C] -> [B, 2 H, 2 W, C]."""
    batch, height, width, channels = x.shape
    x = x[:, :, None, :, None, :]
    x = jnp.broadcast_to(x, (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def film(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift (2); shift and scale are [B, C], x is [B, ..., C]."""
    return x * (1 + over_positions(scale, x)) + over_positions(shift, x)


def over_positions(c: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes [B, C] to broadcast over the axes of `x` [B, ..., C] in between."""
    return c.reshape(c.shape[0], *(1,) * (x.ndim - 2), c.shape[-1])
