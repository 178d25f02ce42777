"""Building blocks of the networks.

Parameters are float32. A block computes in its `dtype` (bfloat16 on accelerators), except for what
loses by it: statistics of norms, softmax, positions and time features are float32.

  adaLN-zero  x + gate(c) F(norm(x) (1 + scale(c)) + shift(c)), gate = scale = shift = 0 at first
              (arXiv 2212.09748)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal, normal, variance_scaling, zeros

from diffusion_jax import placement
from diffusion_jax.networks.features import (
    downsample,
    film,
    over_positions,
    rotate,
    time_features,
    upsample,
)
from diffusion_jax.networks.remat import rematerialised

_NORM_EPSILON = 1e-6
_MAX_GROUPS = 32
_MIN_GROUP_SIZE = 4


def wide(dtype: Any) -> Any:
    """The dtype of what loses by rounding: float32, or the compute dtype where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


class DenseInit(NamedTuple):
    """How a linear layer begins: an initialiser of the kernel, and `inputs -> initialiser` of the bias."""

    kernel: Callable
    bias: Callable


def _torch_bias(inputs: int) -> Callable:
    bound = inputs**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


LECUN = DenseInit(lecun_normal(), lambda inputs: zeros)
# PyTorch's `nn.Linear`: kernel and bias uniform within 1 / sqrt(inputs).
TORCH = DenseInit(variance_scaling(1 / 3, "fan_in", "uniform"), _torch_bias)


class BlockStyle(NamedTuple):
    """Where the transformer blocks of different papers differ. The default is the block of this library.

    Attributes:
      epsilon: added to the variances of the norms.
      gain, shift: whether norms have a scale and a bias; None: where no condition modulates them.
      shift_init: of the norms' biases.
      rms: norms divide by the root mean square alone (arXiv 1910.07467); they have no bias.
      qkv_bias, out_bias: whether the two linear layers of the attention have biases.
      mlp_bias: whether those of the MLP have.
      gated: the MLP is W3 (SiLU(W1 x) W2 x) (SwiGLU, arXiv 2002.05202) instead of W2 GELU(W1 x).
      exact_gelu: the MLP's GELU is the error function's, not its approximation by tanh.
      activated: the condition has passed its SiLU already.
      identity: without a condition the branches begin at zero.
      init: of the linear layers that do not begin at zero.
    """

    epsilon: float = _NORM_EPSILON
    gain: bool | None = None
    shift: bool | None = None
    shift_init: Callable = zeros
    rms: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    gated: bool = False
    exact_gelu: bool = False
    activated: bool = False
    identity: bool = True
    init: DenseInit = LECUN


OWN_STYLE = BlockStyle()


class GroupNorm(nn.Module):
    """Group norm (arXiv 1803.08494) with float32 statistics: [B, ..., C] -> [B, ..., C].

    The groups are the most that divide the channels, up to 32, and hold four channels or more:
    32 groups for 128 channels and above (the usual choice), fewer for small networks; or `groups`.
    """

    dtype: Any = jnp.float32
    epsilon: float = _NORM_EPSILON
    groups: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        most = max(1, min(_MAX_GROUPS, channels // _MIN_GROUP_SIZE))
        groups = next(g for g in range(most, 0, -1) if channels % g == 0)
        return nn.GroupNorm(
            self.groups or groups,
            epsilon=self.epsilon,
            dtype=self.dtype,
            use_fast_variance=False,
            name="norm",
        )(x)


class LayerNorm(nn.Module):
    """Layer norm with float32 statistics; `affine=False` where a condition modulates the result.

    `style` decides epsilon and, where it says so, which of scale and bias there are.
    """

    affine: bool = True
    dtype: Any = jnp.float32
    style: BlockStyle = OWN_STYLE

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain, shift = self.style.gain, self.style.shift
        common = {
            "epsilon": self.style.epsilon,
            "dtype": self.dtype,
            "use_scale": self.affine if gain is None else gain,
            "use_fast_variance": False,
            "name": "norm",
        }
        if self.style.rms:
            return nn.RMSNorm(**common)(x)
        bias = self.affine if shift is None else shift
        return nn.LayerNorm(use_bias=bias, bias_init=self.style.shift_init, **common)(x)


class Lookup(nn.Module):
    """A table of `size` learned vectors: int [...] -> [..., features] in `dtype`.

    An index outside 0..size-1 gives NaN: inside `jit` it cannot raise, and it must not pass for
    another entry.
    """

    size: int
    features: int
    stddev: float
    dtype: Any = jnp.float32
    table_init: Callable | None = None  # instead of a normal of this deviation

    def setup(self):
        shape, init = (self.size, self.features), self.table_init or normal(self.stddev)
        self.table = self.param("table", init, shape, jnp.float32)

    def __call__(self, index: jax.Array) -> jax.Array:
        def rows(table, index):
            filled = {"mode": "fill", "fill_value": jnp.nan, "wrap_negative_indices": False}
            return jnp.asarray(table).at[index].get(**filled)

        # On a mesh the gradient is summed like any other: gathering what it is summed from costs more.
        return placement.per_shard(rows, self.table, index).astype(self.dtype)

    def mean(self, weights: jax.Array) -> jax.Array:
        """Weighted sum of the first rows: float [..., n] -> [..., features], n <= size."""
        table = self.table[: weights.shape[-1]]
        return jnp.matmul(weights.astype(self.dtype), table.astype(self.dtype))


class OutputDense(nn.Module):
    """The last linear map of a network, zero at first: [..., C] -> float32 [..., features].

    The operands are rounded to `dtype`, the products are summed and returned in float32 (float64 for that
    dtype): logits rounded to bfloat16 would change which category is drawn. With `only` that many of the
    features are computed, the first ones.
    """

    features: int
    dtype: Any = jnp.float32
    only: int | None = None
    kernel_init: Callable = zeros
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", zeros, (self.features,), jnp.float32)[: self.only]
        if self.only is not None:
            kernel = kernel[:, : self.only]
        y = jnp.matmul(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            preferred_element_type=wide(self.dtype),
        )
        return y if bias is None else y + jnp.broadcast_to(bias, y.shape)


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
      linear_init: of the two linear layers.
      label_stddev: of the label's vectors at first.
    Shapes: t float32 [B] or None, label int32 [B] or None -> [B, features], or None if both are.
    """

    features: int
    num_classes: int | None = None
    time_features: int = 64
    time_scale: float = 1000.0
    dtype: Any = jnp.float32
    linear_init: DenseInit = LECUN
    label_stddev: float = 1.0

    @nn.compact
    def __call__(self, t: jax.Array | None, label: jax.Array | None) -> jax.Array | None:
        condition = None
        if t is not None:
            h = time_features(t, self.time_features, scale=self.time_scale, dtype=wide(self.dtype))

            def dense(name, x):
                init = {
                    "kernel_init": self.linear_init.kernel,
                    "bias_init": self.linear_init.bias(x.shape[-1]),
                }
                return nn.Dense(self.features, dtype=self.dtype, name=name, **init)(x)

            condition = dense("time_out", nn.silu(dense("time_in", h)))
        if label is not None:
            size = self.num_classes + 1
            table = Lookup(size, self.features, self.label_stddev, self.dtype, name="label")
            embedding = table(label)
            condition = embedding if condition is None else condition + embedding
        return condition


class Modulation(nn.Module):
    """Linear read-out of the condition: [B, C] -> `parts` arrays [B, features], zero at first.

    `zero_init=False` is for branches that end in a zero layer of their own: there a random read-out
    changes nothing at first, and the condition is learnt several times faster. `activated`: the
    condition has passed its SiLU already.
    """

    features: int
    parts: int
    zero_init: bool = True
    dtype: Any = jnp.float32
    activated: bool = False

    @nn.compact
    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        h = nn.Dense(
            self.parts * self.features,
            kernel_init=zeros if self.zero_init else lecun_normal(),
            dtype=self.dtype,
            name="linear",
        )(condition if self.activated else nn.silu(condition))
        # Small, and wanted whole: left split over `model` it would split what it modulates.
        h = placement.constrain(h, placement.BATCH, None)
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


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    causal: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """`jax.nn.dot_product_attention` with a softmax in float32, and for float64 arrays in float64.

    query [B, L, heads, n], key and value [B, S, heads, n], mask bool [B or 1, 1, L or 1, S] ->
    [B, L, heads, n].
    """
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, implementation=implementation
        )
    scores = jnp.einsum("bqhn,bkhn->bhqk", query, key) / query.shape[-1] ** 0.5
    seen = jnp.ones((1, 1, *scores.shape[2:]), bool)
    seen = jnp.tril(seen) if causal else seen
    seen = seen if mask is None else seen & mask
    weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
    return jnp.einsum("bhqk,bkhn->bqhn", weights, value)


class HeadsDense(nn.Dense):
    """Queries, keys and values of all heads in one linear layer: [B, L, C] -> [B, L, 3, heads, n].

    Where a mesh splits networks over `model`, each device makes those of its own heads.
    """

    heads: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, self.heads, self.features // (3 * self.heads))
        ways = placement.ways("model")
        if ways == 1 or self.heads % ways:
            y = super().__call__(x)
            return y.reshape(*y.shape[:-1], *shape)
        size = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, size, self.param_dtype)
        kernel = kernel.reshape(-1, *shape).astype(self.dtype)
        # Rows, then heads: an exchange. From where it rests to the heads at once would gather it.
        kernel = placement.constrain(kernel, "model", None, None, None)
        kernel = placement.constrain(kernel, None, None, "model", None)
        y = jnp.einsum("blc,cphn->blphn", x.astype(self.dtype), kernel)
        if self.use_bias:
            bias = self.param("bias", self.bias_init, size[1:], self.param_dtype)
            y = y + bias.reshape(1, 1, *shape).astype(self.dtype)
        return placement.constrain(y, placement.BATCH, None, None, "model", None)


class SelfAttention(nn.Module):
    """Multi-head self-attention, bidirectional unless told otherwise: [B, L, C] -> [B, L, C].

    Args:
      heads: number of heads, a divisor of C.
      zero_init: start as the zero map, for a residual branch without a gate.
      implementation: of `jax.nn.dot_product_attention`: None or "xla", or "cudnn" (16 bit, GPU).
      dtype: compute dtype; the softmax is float32.
      style: biases and initialisation.
    Shapes: `angles` are those of `rotary_angles` for the L positions, or None; `mask` bool [B, L] is
      False at padding, which nothing attends to, or None; `sees` is None, "causal", or bool [L, S]: which
      of the S keys a query attends to. With `kept` the L keys and values are written into its S slots
      and the queries attend to those; the result is then `(y, KeyValues of the L)`.
    """

    heads: int
    zero_init: bool = False
    implementation: str | None = None
    dtype: Any = jnp.float32
    style: BlockStyle = OWN_STYLE

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
        init = self.style.init
        qkv = HeadsDense(
            3 * features,
            heads=self.heads,
            use_bias=self.style.qkv_bias,
            kernel_init=init.kernel,
            bias_init=init.bias(features),
            dtype=self.dtype,
            name="qkv",
        )(x)
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
        y = attend(query, key, value, keys, causal, self.implementation)
        y = nn.Dense(
            features,
            use_bias=self.style.out_bias,
            kernel_init=zeros if self.zero_init else init.kernel,
            bias_init=zeros if self.zero_init else init.bias(features),
            dtype=self.dtype,
            name="out",
        )(y.reshape(batch, length, features))
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
      style: what differs between papers.
    Shapes: x [B, L, C], condition [B, D] or None, angles, mask, sees and kept as in `SelfAttention`; with
      `kept` the result is `(y, KeyValues)` too.
    """

    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    implementation: str | None = None
    dtype: Any = jnp.float32
    mlp_kernel: int = 1
    style: BlockStyle = OWN_STYLE

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
        features, style = x.shape[-1], self.style
        modulated = condition is not None
        from_zero = style.identity and not modulated
        parts = [None] * 6
        if modulated:
            parts = Modulation(
                features, 6, dtype=self.dtype, activated=style.activated, name="modulation"
            )(condition)

        def normed(h, shift, scale, name):
            h = LayerNorm(affine=not modulated, dtype=self.dtype, style=style, name=name)(h)
            return film(h, shift, scale) if modulated else h

        def mlp_layer(h, width, name, zero=False):
            inputs = h.shape[-1] * self.mlp_kernel
            init = {
                "use_bias": style.mlp_bias,
                "kernel_init": zeros if zero else style.init.kernel,
                "bias_init": zeros if zero else style.init.bias(inputs),
            }
            if self.mlp_kernel == 1:
                return nn.Dense(width, dtype=self.dtype, name=name, **init)(h)
            h = h if mask is None else h * mask[..., None].astype(h.dtype)
            return nn.Conv(width, (self.mlp_kernel,), dtype=self.dtype, name=name, **init)(h)

        def added(h, branch, gate, name):
            branch = placement.constrain(branch, placement.BATCH, None, None)
            branch = nn.Dropout(self.dropout, name=name)(branch, deterministic=not train)
            return h + (over_positions(gate, h) * branch if modulated else branch)

        h = normed(x, parts[0], parts[1], "attention_norm")
        h = SelfAttention(
            self.heads,
            zero_init=from_zero,
            implementation=self.implementation,
            dtype=self.dtype,
            style=style,
            name="attention",
        )(h, angles, mask, sees, kept)
        h, own = (h, None) if kept is None else h
        x = added(x, h, parts[2], "attention_dropout")

        h = normed(x, parts[3], parts[4], "mlp_norm")
        inner = mlp_layer(h, self.mlp_ratio * features, "mlp_in")
        if style.gated:
            h = nn.silu(mlp_layer(h, self.mlp_ratio * features, "mlp_gate")) * inner
        else:
            h = nn.gelu(inner, approximate=not style.exact_gelu)
        h = mlp_layer(h, features, "mlp_out", zero=from_zero)
        x = added(x, h, parts[5], "mlp_dropout")
        return x if kept is None else (x, own)


class TransformerStack(nn.Module):
    """`depth` transformer blocks, run as one scan over stacked parameters [depth, ...].

    Compile time does not grow with the depth. On CPU it also runs faster than an unrolled stack,
    whose residual-stream gradient XLA recomputes through all later blocks; fastest with `remat`.

    Args:
      depth: number of blocks.
      heads, mlp_ratio, dropout, implementation, dtype, mlp_kernel, style: of the blocks, see
        `TransformerBlock`.
      remat: what the blocks compute again in the backward pass instead of storing it, see `remat`.
    Shapes: as `TransformerBlock`; `kept` holds the slots of all layers, [depth, B, S, heads, n].
    """

    depth: int
    heads: int
    mlp_ratio: int = 4
    dropout: float = 0.0
    implementation: str | None = None
    remat: bool | str = False
    dtype: Any = jnp.float32
    mlp_kernel: int = 1
    style: BlockStyle = OWN_STYLE

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
            carry = placement.constrain(carry, placement.BATCH, None, None)
            if kept is None:
                return block(carry, condition, angles, train, mask, sees), None
            return block(carry, condition, angles, train, mask, sees, Kept(slots, kept.begin))

        step = rematerialised(step, self.remat, prevent_cse=False)
        block = TransformerBlock(
            self.heads,
            self.mlp_ratio,
            self.dropout,
            self.implementation,
            self.dtype,
            self.mlp_kernel,
            self.style,
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
        return placement.constrain(x + h, placement.BATCH, None, None, None)


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
        return placement.constrain(x + h.reshape(x.shape), placement.BATCH, None, None, None)
