"""Diffusion transformer for images (DiT, arXiv 2212.09748).

Layer for layer the network of the paper, with its parameter count: patches, fixed sine-cosine
positions, adaLN-zero blocks, adaLN output layer. Deviations: any height and width that the patches
divide (positions are computed, not stored); the source image is concatenated to the channels; the
label is dropped by the caller; linear layers start at variance 1 / inputs and label vectors at
variance 1 (0.0004 in the paper), with which small networks learn the label much faster. The
parameters of the blocks are stacked on a leading axis.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_positive,
    check_rate,
)
from diffusion_jax.networks.features import film, patchify, sincos_positions, unpatchify
from diffusion_jax.networks.inputs import enter
from diffusion_jax.networks.layers import (
    LayerNorm,
    Modulation,
    OutputDense,
    TransformerStack,
)
from diffusion_jax.registry import register


@register("network", "dit", input="image")
class DiT(nn.Module):
    """Transformer over image patches, modulated by time and label.

    Args:
      patch_size: side of a patch, a divisor of H and W.
      width: of a token, divisible by 4 and by `heads`.
      depth: number of blocks.
      heads: attention heads.
      mlp_ratio: width of the MLPs over `width`.
      dropout: rate on the residual branches.
      out_channels: of the output; None for those of x.
      num_classes: number of classes; None or 0 for an unconditional network.
      source_channels: channels of the source image, concatenated to x; 0 without source.
      time_features: number of sinusoidal time features (256 in the paper).
      time_scale: factor on t, see `features.time_features`.
      attention_implementation: see `layers.SelfAttention`.
      remat: recompute the blocks in the backward pass instead of storing their insides.
      dtype: compute dtype; parameters and output are float32.
    Shapes: x float [B, H, W, C]; t real scalar or [B]; label int [B]; source float
      [B, H, W, source_channels].
    """

    patch_size: int = 2
    width: int = 96
    depth: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    out_channels: int | None = None
    num_classes: int | None = None
    source_channels: int = 0
    time_features: int = 64
    time_scale: float = 1000.0
    attention_implementation: str | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, t, *, label=None, source=None, train: bool = False) -> jax.Array:
        """Evaluates the network; zero at initialisation.

        Returns:
          float32 [B, H, W, out_channels].

        Raises:
          ValueError: a field, a shape, a dtype or a condition does not fit, see `checks`.
        """
        dtype = self._check_fields()
        x, condition = enter(
            self, "dit", "image", x, t, label, source, train, width=self.width, dtype=dtype
        )
        (height, width), p = x.shape[1:3], self.patch_size
        for field, size in (("height", height), ("width", width)):
            check_divides("dit", "patch_size", p, field, size)
        out_channels = self.out_channels or x.shape[-1] - self.source_channels

        h = nn.Dense(self.width, dtype=dtype, name="input")(patchify(x, p))
        positions = sincos_positions(height // p, width // p, self.width)
        h = h + jnp.asarray(positions, dtype)[None]

        h = TransformerStack(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.dropout,
            self.attention_implementation,
            self.remat,
            dtype,
            name="blocks",
        )(h, condition, None, train)

        shift, scale = Modulation(self.width, 2, dtype=dtype, name="output_modulation")(condition)
        h = film(LayerNorm(affine=False, dtype=dtype, name="output_norm")(h), shift, scale)
        h = OutputDense(p * p * out_channels, dtype, name="output")(h)
        return unpatchify(h, p, height, width)

    def _check_fields(self):
        check_positive(
            "dit",
            patch_size=self.patch_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
        )
        check_divides("dit", "heads", self.heads, "width", self.width)
        check_rate("dit", "dropout", self.dropout)
        return check_dtype("dit", self.dtype)
