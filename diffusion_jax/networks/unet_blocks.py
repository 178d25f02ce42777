"""Blocks of the published convolutional U-Nets: DDPM++ and NCSN++ (arXiv 2011.13456) and ADM (2105.05233).

EDM's code base (arXiv 2206.00364) has one block for all of them; what differs is a `UNetStyle`:

  h = conv(S(norm(x)))               S is SiLU; x is resampled between S and conv
  h = S(norm(h) modulated by e)      by scale and shift of the embedding e, or e added before the norm
  y = gain (conv(dropout(h)) + skip(x))
  y = gain (y + attention(norm(y)))  where the block attends
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import variance_scaling, zeros

from diffusion_jax.networks import features
from diffusion_jax.networks.layers import DenseInit, GroupNorm, Lookup, attend, wide

ORDERS = ("new", "legacy", "edm")


def xavier(variance: float = 1.0) -> DenseInit:
    """Uniform kernels of `variance` times Xavier's, without biases at first."""
    return DenseInit(variance_scaling(variance, "fan_avg", "uniform"), lambda inputs: zeros)


ZERO = DenseInit(zeros, lambda inputs: zeros)


class UNetStyle(NamedTuple):
    """Where the blocks of the published U-Nets differ.

    Attributes:
      epsilon: added to the variances of the norms.
      groups: of the norms; None: 32, or fewer so that a group has four channels.
      scale_shift: the embedding modulates the second norm by scale and shift; otherwise it is added
        before that norm.
      project: every block that resamples has a linear layer on its skip, not only those that change
        the channels.
      gain: factor on every residual sum.
      order: of the channels of query, key and value: "new" (3, head, c), "legacy" (head, 3, c), "edm"
        (head, c, 3).
      taps: filter of the resampling, one side of its outer product.
      init, attention, last: of layers in general, of query, key and value, and of the last layer of a
        residual branch.
    """

    init: DenseInit
    attention: DenseInit
    last: DenseInit
    epsilon: float = 1e-5
    groups: int | None = None
    scale_shift: bool = True
    project: bool = False
    gain: float = 1.0
    order: str = "new"
    taps: Sequence[float] = (1, 1)


def check_taps(network: str, taps: Sequence[float]) -> None:
    """Refuses filters that do not halve and double sizes.

    Raises:
      ValueError: an odd number of taps, or a sum of zero.
    """
    if not taps or len(taps) % 2 or not sum(taps):
        raise ValueError(
            f"{network}: resample_filter must be an even number of taps with a sum, got {tuple(taps)}"
        )


def check_augment_labels(network: str, labels: Any, batch: int, features: int) -> jax.Array | None:
    """The augmentation vectors [B, features], zeros where None was given; None for a network without.

    Raises:
      ValueError: vectors for a network without, of another shape, or not floating.
    """
    if not features:
        if labels is not None:
            raise ValueError(
                f"{network}: augment_labels were given to a network without; build it with"
                " augment_dim=..., or pass augment_labels=None"
            )
        return None
    if labels is None:
        return jnp.zeros((batch, features), jnp.float32)
    labels = jnp.asarray(labels)
    if labels.shape != (batch, features) or not jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(
            f"{network}: augment_labels must be floating [B, augment_dim] = ({batch}, {features}), got"
            f" {labels.dtype} {labels.shape}"
        )
    return labels


def filter_table(taps: Sequence[float]) -> np.ndarray:
    """float32 [1, 1, n, n]: the two-dimensional filter, as the official code bases store it."""
    line = np.asarray(taps, np.float32)
    return (np.outer(line, line) / line.sum() ** 2)[None, None]


def fir_downsample(x: jax.Array, taps: Sequence[float], pad: int | None = None) -> jax.Array:
    """Filters and keeps every other pixel: [B, H, W, C] -> [B, H / 2, W / 2, C].

    `pad` zeros stand on every side, half the filter less one unless given; the sum of `taps` is divided by.
    """
    count = len(taps)
    pad = (count - 1) // 2 if pad is None else pad
    y, taps = x.astype(wide(x.dtype)), [float(tap) / float(sum(taps)) for tap in taps]
    for axis in (1, 2):
        y = jnp.pad(y, [(pad, pad) if i == axis else (0, 0) for i in range(4)])
        size = (y.shape[axis] - count) // 2 + 1
        y = sum(
            tap * jax.lax.slice_in_dim(y, k, k + 2 * size - 1, 2, axis)
            for k, tap in enumerate(taps)
        )
    return y.astype(x.dtype)


def fir_upsample(x: jax.Array, taps: Sequence[float]) -> jax.Array:
    """The transposed filter: [B, H, W, C] -> [B, 2 H, 2 W, C], a constant image staying what it is inside."""
    count = len(taps)
    pad, margin = (count - 1) // 2, count // 2
    y, taps = x.astype(wide(x.dtype)), [2 * float(tap) / float(sum(taps)) for tap in taps]
    for axis in (1, 2):
        size = y.shape[axis]
        padded = jnp.pad(y, [(margin, margin) if i == axis else (0, 0) for i in range(4)])
        phases = []
        for odd in (0, 1):
            used = range((odd + pad) % 2, count, 2)
            starts = [margin + (odd + pad - k) // 2 for k in used]
            parts = [jax.lax.slice_in_dim(padded, i, i + size, 1, axis) for i in starts]
            phases.append(sum(taps[k] * part for k, part in zip(used, parts)))
        y = jnp.stack(phases, axis + 1)
        y = y.reshape(*y.shape[:axis], 2 * size, *y.shape[axis + 2 :])
    return y.astype(x.dtype)


def resampled(x: jax.Array, how: str | None, taps: Sequence[float]) -> jax.Array:
    """`x`, filtered and at half ("down") or twice ("up") its size, or as it is (None)."""
    if how is None:
        return x
    if tuple(taps) == (1, 1):
        return features.downsample(x) if how == "down" else features.upsample(x)
    return fir_downsample(x, taps) if how == "down" else fir_upsample(x, taps)


def conv(
    channels: int, inputs: int, init: DenseInit, name: str, dtype: Any, **options: Any
) -> nn.Conv:
    """A convolution of 3x3 with the size of its input, unless `options` say otherwise."""
    return nn.Conv(
        channels,
        (3, 3),
        kernel_init=init.kernel,
        bias_init=init.bias(9 * inputs),
        dtype=dtype,
        name=name,
        **options,
    )


def dense(
    channels: int, inputs: int, init: DenseInit, name: str, dtype: Any, bias: bool = True
) -> nn.Dense:
    """A linear layer; on images a convolution of 1x1."""
    return nn.Dense(
        channels,
        use_bias=bias,
        kernel_init=init.kernel,
        bias_init=init.bias(inputs),
        dtype=dtype,
        name=name,
    )


def label_vectors(
    label: jax.Array, num_classes: int, width: int, init: Any, dtype: Any
) -> jax.Array:
    """A learned vector for each class, and zeros for the null class: int [B] -> [B, width].

    `num_classes` is the null class; any other label outside 0..num_classes-1 gives NaN. To be called in a
    compact method, whose module gets the table `label`.
    """
    rows = Lookup(num_classes, width, 1.0, dtype, init, name="label")(label)
    return jnp.where((label == num_classes)[:, None], jnp.zeros((), dtype), rows)


class PixelAttention(nn.Module):
    """Norm, self-attention over all pixels, linear layer: [B, H, W, C] -> [B, H, W, C]."""

    heads: int
    style: UNetStyle
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        style = self.style
        batch, channels = x.shape[0], x.shape[-1]
        h = GroupNorm(self.dtype, style.epsilon, style.groups, name="norm")(x)
        h = h.reshape(batch, -1, channels)
        qkv = dense(3 * channels, channels, style.attention, "qkv", self.dtype)(h)
        width = channels // self.heads
        sizes = {"3": 3, "h": self.heads, "c": width}
        axes = {"new": "3hc", "legacy": "h3c", "edm": "hc3"}[style.order]
        qkv = qkv.reshape(batch, -1, *(sizes[axis] for axis in axes))
        query, key, value = jnp.moveaxis(qkv, 2 + axes.index("3"), 0)
        h = attend(query, key, value, implementation=self.implementation)
        h = dense(channels, channels, style.last, "out", self.dtype)(h.reshape(batch, -1, channels))
        return h.reshape(x.shape)


class UNetBlock(nn.Module):
    """The residual block at the top of this file.

    Args:
      channels: of the output.
      style: whose block it is.
      resample: None, "down" or "up".
      heads: attention heads, 0 without attention.
      dropout: rate before the last convolution.
      implementation: of `jax.nn.dot_product_attention`.
      dtype: compute dtype; norms, softmax and the embedding's layer are float32.
    Shapes: x [B, H, W, C], embedding float32 [B, D], activated -> [B, H', W', channels].
    """

    channels: int
    style: UNetStyle
    resample: str | None = None
    heads: int = 0
    dropout: float = 0.0
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        style, channels, inputs = self.style, self.channels, x.shape[-1]

        def norm(name):
            return GroupNorm(self.dtype, style.epsilon, style.groups, name=name)

        h = resampled(nn.silu(norm("norm_in")(x)), self.resample, style.taps)
        h = conv(channels, inputs, style.init, "conv_in", self.dtype)(h)
        width = 2 * channels if style.scale_shift else channels
        told = dense(width, embedding.shape[-1], style.init, "modulation", wide(self.dtype))
        told = told(embedding).astype(self.dtype)
        if style.scale_shift:
            scale, shift = jnp.split(told, 2, axis=-1)
            h = features.film(norm("norm_out")(h), shift, scale)
        else:
            h = norm("norm_out")(h + features.over_positions(told, h))
        h = nn.Dropout(self.dropout, name="dropout")(nn.silu(h), deterministic=not train)
        h = conv(channels, channels, style.last, "conv_out", self.dtype)(h)
        x = resampled(x, self.resample, style.taps)
        if inputs != channels or (style.project and self.resample):
            x = dense(channels, inputs, style.init, "skip", self.dtype)(x)
        y = style.gain * (h + x)
        if self.heads:
            attention = PixelAttention(
                self.heads, style, self.implementation, self.dtype, name="attention"
            )
            y = style.gain * (y + attention(y))
        return y
