"""The Inception-v3 (arXiv 1512.00567) behind FID (arXiv 1706.08500), in its version of December 2015.

All published FIDs are distances between features of this one network with its one set of weights; a
later Inception-v3 has other features. Where it differs from the published architecture:
  average pools inside the blocks leave the padding out of the mean;
  the last block takes the maximum where the one before it takes the mean;
  1008 classes, no auxiliary classifier.

Two ways of preparing images are in use, and their FIDs differ in the second digit after the point:
  "pytorch_fid"  pixels 0..255 are divided by 127.5, minus 1; bilinear resize with half-pixel centres
  "tensorflow"   (pixels - 128) / 128; the resize of TensorFlow 1, whose pixel i is read at i * in / out:
                 the original graph's way (TTUR, guided-diffusion, StyleGAN and EDM)
Neither smooths before it shrinks an image, so large images alias (arXiv 2104.11222).
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jax.nn.initializers import lecun_normal, ones, zeros

from diffusion_jax.registry import check_choice

PREPARATIONS = ("pytorch_fid", "tensorflow")
SIZE = 299
SPATIAL_CHANNELS = 7
DIMENSIONS = {"pool": 2048, "spatial": SPATIAL_CHANNELS * 17 * 17, "logits": 1008}

_EPSILON = 1e-3


def resize_weights(size: int, out: int, preparation: str) -> np.ndarray:
    """The bilinear resize of one axis as a matrix, float32 [out, size]."""
    steps = np.arange(out)
    if preparation == "pytorch_fid":
        at = (steps + 0.5) * (size / out) - 0.5
    else:
        at = steps * (size / out)
    at = np.clip(at, 0.0, size - 1.0)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, size - 1)
    weights = np.zeros((out, size))
    weights[steps, low] += 1.0 - (at - low)
    weights[steps, high] += at - low
    return weights.astype(np.float32)


def prepare(images: jax.Array, preparation: str = "pytorch_fid") -> jax.Array:
    """Pixels 0..255 of any dtype, [B, H, W, 3] or [B, H, W, 1], as the network's float32 input.

    Returns:
      [B, 299, 299, 3] in about [-1, 1].
    Raises:
      ValueError: another shape, or an unknown preparation.
    """
    check_choice("preparation", preparation, PREPARATIONS)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"inception: images must be [B, H, W, 3] or [B, H, W, 1], got {images.shape}"
        )
    x = images.astype(jnp.float32)
    rows, columns = (resize_weights(n, SIZE, preparation) for n in images.shape[1:3])
    if images.shape[1:3] != (SIZE, SIZE):
        x = jnp.einsum("iy,byxc->bixc", rows, x, precision=Precision.HIGHEST)
        x = jnp.einsum("jx,bixc->bijc", columns, x, precision=Precision.HIGHEST)
    x = x / 127.5 - 1.0 if preparation == "pytorch_fid" else (x - 128.0) / 128.0
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with stored statistics, ReLU: [B, H, W, C] -> [B, H', W', F].

    Computed in full float32 whatever the device's default is: distances are compared over devices.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (*self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", lecun_normal(), shape, jnp.float32)
        per_channel = {
            name: self.param(name, start, (self.features,), jnp.float32)
            for name, start in (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))
        }
        scale, bias, mean, var = (v.astype(x.dtype)[None, None, None] for v in per_channel.values())
        y = jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=Precision.HIGHEST,
        )
        return nn.relu((y - mean) * (scale * jax.lax.rsqrt(var + _EPSILON)) + bias)


def _mean_pool(x: jax.Array) -> jax.Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _chain(x: jax.Array, name: str, *layers: tuple[int, tuple[int, int]]) -> jax.Array:
    """Convolutions `name_1`, `name_2`, ... one after the other."""
    for i, (features, kernel) in enumerate(layers, 1):
        x = ConvNorm(features, kernel, name=f"{name}_{i}")(x)
    return x


def _join(parts: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=-1)


class MixedA(nn.Module):
    """1x1, 5x5, two 3x3, and the mean of 3x3: [B, H, W, C] -> [B, H, W, 224 + pool_features]."""

    pool_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return _join(
            [
                ConvNorm(64, name="branch1x1")(x),
                _chain(x, "branch5x5", (48, (1, 1)), (64, (5, 5))),
                _chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)), (96, (3, 3))),
                ConvNorm(self.pool_features, name="branch_pool")(_mean_pool(x)),
            ]
        )


class MixedB(nn.Module):
    """Halves the map: [B, H, W, C] -> [B, (H - 1) / 2, (W - 1) / 2, C + 480]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        deep = _chain(x, "branch3x3dbl", (64, (1, 1)), (96, (3, 3)))
        return _join(
            [
                ConvNorm(384, (3, 3), 2, "VALID", name="branch3x3")(x),
                ConvNorm(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(deep),
                _max_pool(x),
            ]
        )


class MixedC(nn.Module):
    """7x7 as pairs of 1x7 and 7x1, `width` channels wide: [B, H, W, C] -> [B, H, W, 768]."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        n, row, column = self.width, (1, 7), (7, 1)
        double = (n, (1, 1)), (n, column), (n, row), (n, column), (192, row)
        return _join(
            [
                ConvNorm(192, name="branch1x1")(x),
                _chain(x, "branch7x7", (n, (1, 1)), (n, row), (192, column)),
                _chain(x, "branch7x7dbl", *double),
                ConvNorm(192, name="branch_pool")(_mean_pool(x)),
            ]
        )


class MixedD(nn.Module):
    """Halves the map: [B, H, W, C] -> [B, (H - 1) / 2, (W - 1) / 2, C + 512]."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        short = _chain(x, "branch3x3", (192, (1, 1)))
        long = _chain(x, "branch7x7x3", (192, (1, 1)), (192, (1, 7)), (192, (7, 1)))
        return _join(
            [
                ConvNorm(320, (3, 3), 2, "VALID", name="branch3x3_2")(short),
                ConvNorm(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(long),
                _max_pool(x),
            ]
        )


class MixedE(nn.Module):
    """Forks into 1x3 and 3x1; `pool` is "mean" or "max": [B, H, W, C] -> [B, H, W, 2048]."""

    pool: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def fork(h, name):
            return [
                ConvNorm(384, (1, 3), name=f"{name}a")(h),
                ConvNorm(384, (3, 1), name=f"{name}b")(h),
            ]

        pooled = _mean_pool(x) if self.pool == "mean" else nn.max_pool(x, (3, 3), (1, 1), "SAME")
        return _join(
            [
                ConvNorm(320, name="branch1x1")(x),
                *fork(_chain(x, "branch3x3", (384, (1, 1))), "branch3x3_2"),
                *fork(_chain(x, "branch3x3dbl", (448, (1, 1)), (384, (3, 3))), "branch3x3dbl_3"),
                ConvNorm(192, name="branch_pool")(pooled),
            ]
        )


class ReadOut(nn.Module):
    """A linear layer whose bias is returned beside its result: [B, C] -> ([B, F], [F])."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        return jnp.matmul(x, kernel.astype(x.dtype), precision=Precision.HIGHEST), bias


class InceptionV3(nn.Module):
    """Images to the features of FID, sFID and the Inception score.

    Args:
      preparation: of the images, see the top of this file.
    Shapes: images [B, H, W, 3] or grey [B, H, W, 1], pixels 0..255 of any dtype and size. Returns a dict
      of float32 arrays:
        "pool" [B, 2048]        means over the last map: FID, KID, precision and recall
        "spatial" [B, 2023]     7 channels of a 17 x 17 map, rows first: sFID (arXiv 2103.03841); they
                                are those of `mixed_6/conv` in the original graph
        "logits" [B, 1008]      of the classes
        "unbiased" [B, 1008]    logits without their bias, from which published Inception scores are
                                computed (arXiv 1606.03498 and its later code)
    Raises:
      ValueError: another shape, or an unknown preparation.
    """

    preparation: str = "pytorch_fid"

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        x = prepare(jnp.asarray(images), self.preparation)
        x = ConvNorm(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = ConvNorm(32, (3, 3), 1, "VALID", name="Conv2d_2a_3x3")(x)
        x = _max_pool(ConvNorm(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = ConvNorm(80, name="Conv2d_3b_1x1")(x)
        x = _max_pool(ConvNorm(192, (3, 3), 1, "VALID", name="Conv2d_4a_3x3")(x))
        x = MixedA(32, name="Mixed_5b")(x)
        x = MixedA(64, name="Mixed_5c")(x)
        x = MixedA(64, name="Mixed_5d")(x)
        x = MixedB(name="Mixed_6a")(x)
        x = MixedC(128, name="Mixed_6b")(x)
        x = MixedC(160, name="Mixed_6c")(x)
        x = MixedC(160, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(x.shape[0], -1)
        x = MixedC(192, name="Mixed_6e")(x)
        x = MixedD(name="Mixed_7a")(x)
        x = MixedE("mean", name="Mixed_7b")(x)
        x = MixedE("max", name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        unbiased, bias = ReadOut(DIMENSIONS["logits"], name="fc")(pool)
        return {
            "pool": pool,
            "spatial": spatial,
            "logits": unbiased + bias[None],
            "unbiased": unbiased,
        }
