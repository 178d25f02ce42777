"""U-ViT: a transformer with long skip connections (arXiv 2209.12152).

Time, label or text, and noisy patches are all tokens:
  (1) tokens   [label, time, patches], [time, text, patches] or [time, patches], plus learned positions
  (2) blocks   the outputs of the first half are kept; block j of the second half reads
               Linear(concat(h, skip)), skip being the newest one not read yet
  (3) output   norm, linear map to pixels, and in most sizes a 3x3 convolution
The official network, in its values, its initialisation and its parameter count; `interop` reads and
writes its published weights. Deviations: source images, concatenated to the channels, and dropout are
optional; labels are dropped by the caller; each half is one scan over stacked parameters, those of the
second half in the order of the skips they read: its first block comes last.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_inputs,
    check_positive,
    check_rate,
)
from diffusion_jax.networks.features import patchify, time_features, unpatchify
from diffusion_jax.networks.layers import (
    TORCH,
    BlockStyle,
    DenseInit,
    LayerNorm,
    Lookup,
    OutputDense,
    TransformerBlock,
    wide,
)
from diffusion_jax.networks.remat import rematerialised
from diffusion_jax.registry import register

# the authors cut their normal at -2 and 2, a hundred of its deviations
_NORMAL = DenseInit(normal(0.02), lambda inputs: zeros)


def _sizes():
    def size(patch, width, depth, heads, **fields):
        shape = {"patch_size": patch, "width": width, "depth": depth, "heads": heads}
        return shape | fields

    unconditional = {"num_classes": None}
    text = unconditional | {"text_channels": 768}
    return {
        "CIFAR-10 S/2": size(2, 512, 12, 8, **unconditional),
        "CelebA-64 S/4": size(4, 512, 12, 8, **unconditional),
        "ImageNet-64 M/4": size(4, 768, 16, 12, null_label=False),
        "ImageNet-64 L/4": size(4, 1024, 20, 16, null_label=False),
        "ImageNet-256 L/2": size(2, 1024, 20, 16),
        "ImageNet-256 H/2": size(2, 1152, 28, 16, conv=False),
        "ImageNet-512 L/4": size(4, 1024, 20, 16),
        "ImageNet-512 H/4": size(4, 1152, 28, 16, conv=False),
        "COCO S/2": size(2, 512, 12, 8, **text),
        "COCO S/2 deep": size(2, 512, 16, 8, **text),
    }


class SkipBlock(nn.Module):
    """A block of the second half: reads x and a skip, both [B, L, C] -> [B, L, C]."""

    block: Callable[..., TransformerBlock]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, skip: jax.Array, train: bool) -> jax.Array:
        x = nn.Dense(x.shape[-1], kernel_init=_NORMAL.kernel, dtype=self.dtype, name="skip")(
            jnp.concatenate([x, skip], axis=-1)
        )
        return self.block(name="block")(x, None, None, train)


@register("network", "uvit", input="image", official=True, paper="2209.12152", sizes=_sizes())
class UViT(nn.Module):
    """Transformer over image patches, with the conditions as tokens and long skip connections.

    Args:
      patch_size: side of a patch, a divisor of H and W.
      width: of a token, even and divisible by `heads`.
      depth: number of blocks beside the one in the middle, even.
      heads: attention heads.
      mlp_ratio: width of the MLPs over `width`.
      qkv_bias: whether the first linear map of attention has a bias.
      mlp_time_embed: the time token passes two linear layers.
      conv: a 3x3 convolution at the end.
      dropout: rate on the residual branches.
      out_channels: of the output; None for those of x.
      num_classes: number of classes; None or 0 for a network without labels.
      null_label: the table has a row for the null class; without, a label must be given.
      text_channels: width of the text's vectors; 0 for a network without text.
      text_length: their number.
      source_channels: channels of the source image, concatenated to x; 0 without source.
      time_scale: factor on t. The official models of pixels are told 999 t, those of latents the step
        1..1000: 1 with the config's `network.time_input` "step".
      attention_implementation: see `layers.SelfAttention`.
      remat: what the blocks compute again in the backward pass instead of storing it, see `remat`.
      dtype: compute dtype; parameters, the convolution and the output are float32.
    Shapes: x float [B, H, W, C], of the size it was initialised with; t real scalar or [B]; label int [B];
      text float [B, text_length, text_channels]; source float [B, H, W, source_channels].
    """

    patch_size: int = 2
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    conv: bool = True
    dropout: float = 0.0
    out_channels: int | None = None
    num_classes: int | None = None
    null_label: bool = True
    text_channels: int = 0
    text_length: int = 77
    source_channels: int = 0
    time_scale: float = 1000.0
    attention_implementation: str | None = None
    remat: bool | str = False
    dtype: Any = jnp.float32

    @property
    def extra_tokens(self) -> int:
        """How many tokens stand before the patches."""
        return 1 + bool(self.num_classes) + (self.text_length if self.text_channels else 0)

    @nn.compact
    def __call__(self, x, t, *, label=None, text=None, source=None, train=False) -> jax.Array:
        """Evaluates the network.

        Returns:
          float32 [B, H, W, out_channels].

        Raises:
          ValueError: a field, a shape, a dtype or a condition does not fit, see `checks`.
        """
        dtype = self._check_fields()
        x, t, label, source = self._check_inputs(x, t, label, source, train)
        text = self._check_text(text, x.shape[0])
        (height, width), p = x.shape[1:3], self.patch_size
        out_channels = self.out_channels or x.shape[-1]
        x = x if source is None else jnp.concatenate([x, source.astype(x.dtype)], axis=-1)

        h = jnp.concatenate(
            [*self._conditions(t, label, text, dtype), self._embedded(x.astype(dtype), dtype)],
            axis=1,
        )
        h = h + self._positions(h).astype(dtype)[None]
        h = self._blocks(h, train, dtype)
        style = self._style()
        h = LayerNorm(dtype=dtype, style=style, name="norm")(h)[:, self.extra_tokens :]
        h = OutputDense(p * p * out_channels, dtype, kernel_init=_NORMAL.kernel, name="output")(h)
        y = unpatchify(h, p, height, width)
        if self.conv:
            y = nn.Conv(
                out_channels,
                (3, 3),
                kernel_init=TORCH.kernel,
                bias_init=TORCH.bias(9 * out_channels),
                dtype=wide(dtype),
                name="conv",
            )(y)
        return y

    def _embedded(self, x, dtype):
        patches = patchify(x, self.patch_size)
        return nn.Dense(
            self.width,
            kernel_init=TORCH.kernel,
            bias_init=TORCH.bias(patches.shape[-1]),
            dtype=dtype,
            name="input",
        )(patches)

    def _conditions(self, t, label, text, dtype):
        """The tokens before the patches, in the order of (1)."""

        def dense(features, name):
            return nn.Dense(features, kernel_init=_NORMAL.kernel, dtype=dtype, name=name)

        time = time_features(t, self.width, scale=self.time_scale, dtype=wide(dtype))
        time = time.astype(dtype)
        if self.mlp_time_embed:
            time = dense(4 * self.width, "time_in")(time)
            time = dense(self.width, "time_out")(nn.silu(time))
        tokens = [time[:, None]]
        if label is not None:
            rows = self.num_classes + bool(self.null_label)
            tokens.insert(0, Lookup(rows, self.width, 1.0, dtype, name="label")(label)[:, None])
        if text is not None:
            tokens.append(dense(self.width, "text")(text.astype(dtype)))
        return tokens

    def _positions(self, h):
        shape = (h.shape[1], self.width)
        if self.has_variable("params", "positions"):
            known = self.get_variable("params", "positions").shape
            if known != shape:
                raise ValueError(
                    f"uvit: the parameters have positions for {known[0]} tokens, the input makes "
                    f"{shape[0]}; images must have the size that the network was made for"
                )
        return jnp.asarray(self.param("positions", _NORMAL.kernel, shape, jnp.float32))

    def _blocks(self, h, train, dtype):
        def block(name):
            return TransformerBlock(
                self.heads,
                self.mlp_ratio,
                self.dropout,
                self.attention_implementation,
                dtype,
                style=self._style(),
                name=name,
            )

        def half(step, reverse=False):
            return nn.scan(
                rematerialised(step, self.remat, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.depth // 2,
                reverse=reverse,
            )

        def down(block, h, _):
            h = block(h, None, None, train)
            return h, h

        def up(block, h, skip):
            return block(h, skip, train), None

        middle = rematerialised(lambda block, h: block(h, None, None, train), self.remat)
        h, skips = half(down)(block("in_blocks"), h, None)
        h = middle(block("mid_block"), h)
        return half(up, reverse=True)(SkipBlock(block, dtype, name="out_blocks"), h, skips)[0]

    def _style(self):
        return BlockStyle(
            epsilon=1e-5, qkv_bias=self.qkv_bias, exact_gelu=True, identity=False, init=_NORMAL
        )

    def _check_inputs(self, x, t, label, source, train):
        if self.num_classes and not self.null_label and label is None:
            raise ValueError(
                "uvit: label is missing, and a network with null_label=False has no null class"
            )
        checked = check_inputs(
            "uvit",
            "image",
            x,
            t,
            label=label,
            source=source,
            num_classes=self.num_classes,
            source_channels=self.source_channels,
            train=train,
        )
        for field, size in zip(("height", "width"), checked.x.shape[1:3]):
            check_divides("uvit", "patch_size", self.patch_size, field, size)
        return checked

    def _check_text(self, text, batch):
        if not self.text_channels:
            if text is not None:
                raise ValueError(
                    "uvit: text was given to a network built without; build it with text_channels=..."
                )
            return None
        shape = (batch, self.text_length, self.text_channels)
        if text is None:
            raise ValueError(f"uvit: text is missing; the network was built for {shape}")
        text = jnp.asarray(text)
        if text.shape != shape or not jnp.issubdtype(text.dtype, jnp.floating):
            raise ValueError(f"uvit: text must be floating {shape}, got {text.dtype} {text.shape}")
        return text

    def _check_fields(self):
        check_positive(
            "uvit",
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            text_length=self.text_length,
        )
        check_divides("uvit", "heads", self.heads, "width", self.width)
        check_divides("uvit", "two halves", 2, "depth", self.depth)
        if self.num_classes and self.text_channels:
            raise ValueError("uvit: num_classes and text_channels exclude one another")
        check_rate("uvit", "dropout", self.dropout)
        return check_dtype("uvit", self.dtype)
