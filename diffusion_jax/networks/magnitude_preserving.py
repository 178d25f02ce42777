"""Layers that keep the magnitude of what flows through them (EDM2, arXiv 2312.02696, appendix B).

With |x| = sqrt(mean x^2), over the axes that a norm is taken of:

  (1) normalize   x / (|x| + 1e-4)                                                    eq. 47, 66
  (2) weights     each output's row w of n numbers acts as gain normalize(w) / sqrt(n)   section 2.3
  (3) SiLU        silu(x) / 0.596                                                     eq. 81
  (4) sum         ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)                           eq. 88
  (5) cat         [(1 - t) a / sqrt(N_a), t b / sqrt(N_b)] sqrt((N_a + N_b) / ((1 - t)^2 + t^2))   eq. 103
  (6) Fourier     sqrt(2) cos(f x + p), f ~ 2 pi N(0, 1), p ~ 2 pi U(0, 1)            eq. 75

No layer has a bias. Gradients of a row are orthogonal to it by (2), so steps only lengthen it; `project`
sets the rows back to |w| = 1 after each step, without which the effective learning rate would decay by
itself. Averages of weights are used as they are: (2) normalises them.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks.features import downsample, over_positions, upsample
from diffusion_jax.networks.layers import wide

_EPSILON = 1e-4
_SILU_MAGNITUDE = 0.596


def normalize(x: jax.Array, axis: int | Sequence[int] = -1) -> jax.Array:
    """(1): x of unit mean square over `axis`; the norm is float32, the result has x's dtype."""
    square = jnp.square(x.astype(wide(x.dtype))).mean(axis, keepdims=True)
    positive = square > 0.0
    norm = jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)
    return x / (norm + _EPSILON).astype(x.dtype)


def silu(x: jax.Array) -> jax.Array:
    """(3): SiLU with an output of about unit variance for an input of it."""
    return nn.silu(x) / _SILU_MAGNITUDE


def mixed(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
    """(4): a and b in shares 1 - t and t, of unit variance if they are, and uncorrelated."""
    return ((1.0 - t) * a + t * b) / math.hypot(1.0 - t, t)


def concatenated(a: jax.Array, b: jax.Array, t: float) -> jax.Array:
    """(5): channels of a, then of b, which contribute to a layer that follows in shares 1 - t and t."""
    sizes = a.shape[-1], b.shape[-1]
    scale = math.sqrt(sum(sizes)) / math.hypot(1.0 - t, t)
    parts = [
        (scale * share / math.sqrt(size)) * part
        for part, share, size in zip((a, b), (1.0 - t, t), sizes)
    ]
    return jnp.concatenate(parts, axis=-1)


def _kernel(module: nn.Module, gain: Any, *shape: int) -> jax.Array:
    """The kernel [..., in, out] that acts (2), in the wide dtype of `module.dtype`."""
    kernel = module.param("kernel", nn.initializers.normal(1.0), shape, jnp.float32)
    kernel = normalize(kernel.astype(wide(module.dtype)), _row_axes(kernel))
    return kernel * (jnp.asarray(gain, kernel.dtype) / math.sqrt(math.prod(shape[:-1])))


def _row_axes(kernel: Any) -> tuple[int, ...]:
    return tuple(range(kernel.ndim - 1))


def project(params: Any) -> Any:
    """The parameters with every row of a kernel at |w| = 1, for after a step; other leaves as they are."""

    def projected(path: Any, leaf: Any) -> Any:
        is_kernel = path[-1] == jax.tree_util.DictKey("kernel")
        return normalize(leaf, _row_axes(leaf)) if is_kernel else leaf

    return jax.tree_util.tree_map_with_path(projected, params)


class Linear(nn.Module):
    """(2) of the last axis: [..., C] -> [..., features] in `dtype`."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: Any = 1.0) -> jax.Array:
        kernel = _kernel(self, gain, x.shape[-1], self.features)
        return jnp.matmul(x.astype(self.dtype), kernel.astype(self.dtype))


class Conv(nn.Module):
    """(2) as a convolution of odd size over [B, H, W, C], zeros around: -> [B, H, W, features]."""

    features: int
    size: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: Any = 1.0) -> jax.Array:
        kernel = _kernel(self, gain, self.size, self.size, x.shape[-1], self.features)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Labels(nn.Module):
    """(2) of a one-hot label times sqrt(num_classes): int [B] -> [B, features].

    The null label `num_classes` is the vector of zeros, which gives zeros; others outside the range give
    NaN.
    """

    num_classes: int
    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        rows = _kernel(self, math.sqrt(self.num_classes), self.num_classes, self.features)
        rows = jnp.concatenate([rows, jnp.zeros_like(rows[:1])])
        return rows.at[label].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


class Fourier(nn.Module):
    """(6): real [B] -> [B, features]. Its numbers are parameters that are not trained."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        turn, shape = 2.0 * math.pi, (self.features,)
        frequencies = self.param("frequencies", nn.initializers.normal(turn), shape, jnp.float32)
        phases = self.param("phases", nn.initializers.uniform(turn), shape, jnp.float32)
        angles = x[:, None] * jax.lax.stop_gradient(frequencies)[None]
        return math.sqrt(2.0) * jnp.cos(angles + jax.lax.stop_gradient(phases)[None])


def _attended(query: Any, key: Any, value: Any, implementation: str | None) -> jax.Array:
    """`jax.nn.dot_product_attention`, whose softmax is float32 even where all else is float64."""
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value, implementation=implementation)
    logits = jnp.einsum("bqhc,bkhc->bhqk", query, key) / math.sqrt(query.shape[-1])
    return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(logits), value)


class Block(nn.Module):
    """Residual block of EDM2's encoder or decoder, perhaps with attention (figure 21).

    An encoder block changes the channels first and normalises each pixel; a decoder block changes those
    of the sum's main branch alone.

    Args:
      channels: of the output.
      decoder: which of the two.
      resample: None, "down" (mean of 2 x 2) or "up" (nearest neighbour), of the input.
      heads: of cosine attention over all pixels; 0 without.
      dropout: rate before the last convolution.
      residual_balance, attention_balance: t of the sums (4).
      clip: bound on the absolute values of the output.
      implementation: of `jax.nn.dot_product_attention`: None or "xla", or "cudnn" (16 bit, GPU).
      dtype: compute dtype; norms, softmax and the modulation are float32.
    Shapes: x [B, H, W, C], embedding [B, D] -> [B, H', W', channels].
    """

    channels: int
    decoder: bool = False
    resample: str | None = None
    heads: int = 0
    dropout: float = 0.0
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    clip: float = 256.0
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        conv = lambda name, size=3, features=self.channels: Conv(
            features, size, self.dtype, name=name
        )
        widens = x.shape[-1] != self.channels and not self.decoder
        x = {None: lambda y: y, "down": downsample, "up": upsample}[self.resample](x)
        if widens:
            x = conv("skip", 1)(x)
        if not self.decoder:
            x = normalize(x)

        h = conv("conv_in")(silu(x))
        gain = self.param("gain", nn.initializers.zeros, (), jnp.float32)
        modulation = Linear(self.channels, wide(self.dtype), name="modulation")(embedding, gain)
        h = silu(h * over_positions(1.0 + modulation, h).astype(h.dtype))
        h = nn.Dropout(self.dropout, name="dropout")(h, deterministic=not train)
        h = conv("conv_out")(h)
        if x.shape[-1] != self.channels:
            x = conv("skip", 1)(x)
        x = mixed(x, h, self.residual_balance)

        if self.heads:
            qkv = conv("qkv", 1, 3 * self.channels)(x)
            qkv = qkv.reshape(x.shape[0], -1, self.heads, self.channels // self.heads, 3)
            query, key, value = jnp.moveaxis(normalize(qkv, 3), -1, 0)
            h = _attended(query, key, value, self.implementation)
            h = conv("attention_out", 1)(h.reshape(x.shape))
            x = mixed(x, h, self.attention_balance)
        return jnp.clip(x, -self.clip, self.clip)
