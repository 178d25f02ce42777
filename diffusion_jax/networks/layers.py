"""Building blocks of the networks.

Parameters are float32. A block computes in its `dtype` (bfloat16 on accelerators), except for what
loses by it: statistics of norms, softmax, positions and time features are float32.

  adaLN-zero  x + gate(c) F(norm(x) (1 + scale(c)) + shift(c)), gate = scale = shift = 0 at first
              (arXiv 2212.09748)
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal, normal, zeros

from diffusion_jax.networks.features import (
    downsample,
    film,
    over_positions,
    rotate,
    time_features,
    upsample,
)

_NORM_EPSILON = 1e-6
_MAX_GROUPS = 32
_MIN_GROUP_SIZE = 4


class GroupNorm(nn.Module):
    """Group norm (arXiv 1803.08494) with float32 statistics: [B, ..., C] -> [B, ..., C].

    The groups are the most that divide the channels, up to 32, and hold four channels or more:
    32 groups for 128 channels and above (the usual choice), fewer for small networks.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        most = max(1, min(_MAX_GROUPS, channels // _MIN_GROUP_SIZE))
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        return nn.GroupNorm(
            groups,
            epsilon=_NORM_EPSILON,
            dtype=self.dtype,
            use_fast_variance=False,
            name="norm",
        )(x)


class LayerNorm(nn.Module):
    """Layer norm with float32 statistics; `affine=False` where a condition modulates the result."""

    affine: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.LayerNorm(
            epsilon=_NORM_EPSILON,
            dtype=self.dtype,
            use_bias=self.affine,
            use_scale=self.affine,
            use_fast_variance=False,
            name="norm",
        )(x)


class Lookup(nn.Module):
    """A table of `size` learned vectors: int [...] -> [..., features] in `dtype`.

    An index outside 0..size-1 gives NaN: inside `jit` it cannot raise, and it must not pass for
    another entry.
    """

    size: int
    features: int
    stddev: float
    dtype: Any = jnp.float32

    def setup(self):
        shape = (self.size, self.features)
        self.table = self.param("table", normal(self.stddev), shape, jnp.float32)

    def __call__(self, index: jax.Array) -> jax.Array:
        rows = (
            jnp.asarray(self.table)
            .at[index]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
        return rows.astype(self.dtype)

    def mean(self, weights: jax.Array) -> jax.Array:
        """Weighted sum of the first rows: float [..., n] -> [..., features], n <= size."""
        table = self.table[: weights.shape[-1]]
        return jnp.matmul(weights.astype(self.dtype), table.astype(self.dtype))


class OutputDense(nn.Module):
    """The last linear map of a network, zero at first: [..., C] -> float32 [..., features].

    The operands are rounded to `dtype`, the products are summed and returned in float32: logits
    rounded to bfloat16 would change which category is drawn.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", zeros, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        y = jnp.matmul(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return y + jnp.broadcast_to(bias, y.shape)


class Condition(nn.Module):
    """The conditioning vector: projected time features plus a label embedding.

    Row `num_classes` of the label table is the null class, so dropping labels for classifier-free
    guidance (arXiv 2207.12598) is writing that index.

    Args:
      features: width of the vector.
      num_classes: number of classes, None or 0 without labels.
      time_features: number of sinusoidal features.
      time_scale: their `scale`.
      dtype: compute dtype.
    Shapes: t float32 [B] or None, label int32 [B] or None -> [B, features], or None if both are.
    """

    features: int
    num_classes: int | None = None
    time_features: int = 64
    time_scale: float = 1000.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array | None, label: jax.Array | None) -> jax.Array | None:
        condition = None
        if t is not None:
            h = time_features(t, self.time_features, scale=self.time_scale)
            h = nn.Dense(self.features, dtype=self.dtype, name="time_in")(h)
            condition = nn.Dense(self.features, dtype=self.dtype, name="time_out")(nn.silu(h))
        if label is not None:
            size = self.num_classes + 1
            embedding = Lookup(size, self.features, 1.0, self.dtype, name="label")(label)
            condition = embedding if condition is None else condition + embedding
        return condition


class Modulation(nn.Module):
    """Linear read-out of the condition: [B, C] -> `parts` arrays [B, features], zero at first.

    `zero_init=False` is for branches that end in a zero layer of their own: there a random read-out
    changes nothing at first, and the condition is learnt several times faster.
    """

    features: int
    parts: int
    zero_init: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        h = nn.Dense(
            self.parts * self.features,
            kernel_init=zeros if self.zero_init else lecun_normal(),
            dtype=self.dtype,
            name="linear",
        )(nn.silu(condition))
        return jnp.split(h, self.parts, axis=-1)


class KeyValues(NamedTuple):
    """Keys and values of attention, of one layer `[B, slots, heads, n]` or of all `[depth, B, ...]`."""

    key: jax.Array
    value: jax.Array


class Kept(NamedTuple):
    """A layer's keys and values of all slots, and the slot that the first of the queries takes."""

    slots: KeyValues
    begin: jax.Array


def written(slots: jax.Array, own: jax.Array, begin: jax.Array, axis: int) -> jax.Array:
    """`slots` with `own` written from `begin` on, along an axis; only whole windows inside it are."""
    return jax.lax.dynamic_update_slice_in_dim(slots, own.astype(slots.dtype), begin, axis)


class SelfAttention(nn.Module):
    """Multi-head self-attention, bidirectional unless told otherwise: [B, L, C] -> [B, L, C].

    Args:
      heads: number of heads, a divisor of C.
      zero_init: start as the zero map, for a residual branch without a gate.
      implementation: of `jax.nn.dot_product_attention`: None or "xla", or "cudnn" (16 bit, GPU).
      dtype: compute dtype; the softmax is float32.
    Shapes: `angles` are those of `rotary_angles` for the L positions, or None; `mask` bool [B, L] is
      False at padding, which nothing attends to, or None; `sees` is None, "causal", or bool [L, S]: which
      of the S keys a query attends to. With `kept` the L keys and values are written into its S slots
      and the queries attend to those; the result is then `(y, KeyValues of the L)`.
    """

    heads: int
    zero_init: bool = False
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        angles: jax.Array | None = None,
        mask: jax.Array | None = None,
        sees: Any = None,
        kept: Kept | None = None,
    ) -> Any:
        batch, length, features = x.shape
        qkv = nn.Dense(3 * features, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(batch, length, 3, self.heads, features // self.heads)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        own = KeyValues(key, value)
        if kept is not None:
            key, value = (written(s, o, kept.begin, 1) for s, o in zip(kept.slots, own))
        keys = None if mask is None else mask[:, None, None, :]
        causal = isinstance(sees, str)
        if sees is not None and not causal:
            keys = sees[None, None] if keys is None else keys & sees[None, None]
        y = jax.nn.dot_product_attention(
            query, key, value, mask=keys, is_causal=causal, implementation=self.implementation
        )
        out_init = zeros if self.zero_init else lecun_normal()
        y = nn.Dense(features, kernel_init=out_init, dtype=self.dtype, name="out")(
            y.reshape(batch, length, features)
        )
        return y if kept is None else (y, own)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block: attention, then a GELU MLP, each on a residual branch.

    With a condition the branches are modulated and gated by it (adaLN-zero); without one the norms
    have their own scale and shift. Either way the block is the identity at first.

    Args:
      heads: attention heads.
      mlp_ratio: width of the MLP over C.
      dropout: rate at the end of both branches.
      implementation: of attention, see `SelfAttention`.
      dtype: compute dtype.
      mlp_kernel: width of the MLP's layers over positions; above 1 they are convolutions, which see
        zeros at padding (FastSpeech, arXiv 1905.09263).
    Shapes: x [B, L, C], condition [B, D] or None, angles, mask, sees and kept as in `SelfAttention`; with
      `kept` the result is `(y, KeyValues)` too.
    """

    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    implementation: str | None = None
    dtype: Any = jnp.float32
    mlp_kernel: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array | None,
        angles: jax.Array | None,
        train: bool,
        mask: jax.Array | None = None,
        sees: Any = None,
        kept: Kept | None = None,
    ) -> Any:
        features = x.shape[-1]
        modulated = condition is not None
        parts = [None] * 6
        if modulated:
            parts = Modulation(features, 6, dtype=self.dtype, name="modulation")(condition)

        def normed(h, shift, scale, name):
            h = LayerNorm(affine=not modulated, dtype=self.dtype, name=name)(h)
            return film(h, shift, scale) if modulated else h

        def mlp_layer(h, width, name, **init):
            if self.mlp_kernel == 1:
                return nn.Dense(width, dtype=self.dtype, name=name, **init)(h)
            h = h if mask is None else h * mask[..., None].astype(h.dtype)
            return nn.Conv(width, (self.mlp_kernel,), dtype=self.dtype, name=name, **init)(h)

        def added(h, branch, gate, name):
            branch = nn.Dropout(self.dropout, name=name)(branch, deterministic=not train)
            return h + (over_positions(gate, h) * branch if modulated else branch)

        h = normed(x, parts[0], parts[1], "attention_norm")
        h = SelfAttention(
            self.heads,
            zero_init=not modulated,
            implementation=self.implementation,
            dtype=self.dtype,
            name="attention",
        )(h, angles, mask, sees, kept)
        h, own = (h, None) if kept is None else h
        x = added(x, h, parts[2], "attention_dropout")

        h = normed(x, parts[3], parts[4], "mlp_norm")
        h = nn.gelu(mlp_layer(h, self.mlp_ratio * features, "mlp_in"))
        out_init = lecun_normal() if modulated else zeros
        h = mlp_layer(h, features, "mlp_out", kernel_init=out_init)
        x = added(x, h, parts[5], "mlp_dropout")
        return x if kept is None else (x, own)


class TransformerStack(nn.Module):
    """`depth` transformer blocks, run as one scan over stacked parameters [depth, ...].

    Compile time does not grow with the depth. On CPU it also runs faster than an unrolled stack,
    whose residual-stream gradient XLA recomputes through all later blocks; fastest with `remat`.

    Args:
      depth: number of blocks.
      heads, mlp_ratio, dropout, implementation, dtype, mlp_kernel: of the blocks, see
        `TransformerBlock`.
      remat: recompute the blocks in the backward pass instead of storing their insides.
    Shapes: as `TransformerBlock`; `kept` holds the slots of all layers, [depth, B, S, heads, n].
    """

    depth: int
    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    implementation: str | None = None
    remat: bool = False
    dtype: Any = jnp.float32
    mlp_kernel: int = 1

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array | None,
        angles: jax.Array | None,
        train: bool,
        mask: jax.Array | None = None,
        sees: Any = None,
        kept: Kept | None = None,
    ) -> Any:
        def step(block, carry, slots):
            if kept is None:
                return block(carry, condition, angles, train, mask, sees), None
            return block(carry, condition, angles, train, mask, sees, Kept(slots, kept.begin))

        if self.remat:
            step = nn.remat(step, prevent_cse=False)
        block = TransformerBlock(
            self.heads,
            self.mlp_ratio,
            self.dropout,
            self.implementation,
            self.dtype,
            self.mlp_kernel,
            name="block",
        )
        scanned = nn.scan(
            step,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        if kept is None:
            return scanned(block, x, None)[0]
        x, own = scanned(block, x, kept.slots)
        parts = zip(kept.slots, own)
        return x, KeyValues(*(written(s, o, kept.begin, 2) for s, o in parts))


class ResidualBlock(nn.Module):
    """Convolutional residual block with FiLM and optional resampling (ADM, arXiv 2105.05233).

    norm, SiLU, resample, conv, norm, FiLM, SiLU, dropout, zero conv; plus the (resampled, if
    needed projected) input.

    Args:
      channels: of the output.
      resample: None, "down" (mean of 2 x 2) or "up" (nearest neighbour).
      dropout: rate before the last convolution.
      dtype: compute dtype.
    Shapes: x [B, H, W, C], condition [B, D] -> [B, H', W', channels].
    """

    channels: int
    resample: str | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, train: bool) -> jax.Array:
        resample = {None: lambda y: y, "down": downsample, "up": upsample}[self.resample]
        h = nn.silu(GroupNorm(self.dtype, name="norm_in")(x))
        h = nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv_in")(resample(h))
        shift, scale = Modulation(
            self.channels, 2, zero_init=False, dtype=self.dtype, name="modulation"
        )(condition)
        h = nn.silu(film(GroupNorm(self.dtype, name="norm_out")(h), shift, scale))
        h = nn.Dropout(self.dropout, name="dropout")(h, deterministic=not train)
        h = nn.Conv(self.channels, (3, 3), kernel_init=zeros, dtype=self.dtype, name="conv_out")(h)
        x = resample(x)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, dtype=self.dtype, name="skip")(x)
        return x + h


class AttentionBlock(nn.Module):
    """Self-attention over all pixels on a residual branch: [B, H, W, C] -> [B, H, W, C]."""

    heads: int
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        h = GroupNorm(self.dtype, name="norm")(x).reshape(batch, height * width, channels)
        h = SelfAttention(
            self.heads,
            zero_init=True,
            implementation=self.implementation,
            dtype=self.dtype,
            name="attention",
        )(h)
        return x + h.reshape(x.shape)
