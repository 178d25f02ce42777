"""Diffusion transformer for images (DiT, arXiv 2212.09748).

The official network, in its values, its initialisation and its parameter count: patches, fixed
sine-cosine positions, adaLN-zero blocks, adaLN output layer; `interop` reads and writes its published
weights. The official learned variance is `out_channels` of twice the channels of x: the prediction, then
the variance (`methods.score` with `learned_variance`). Deviations: any height and width that the patches
divide (positions are computed, not stored); labels, dropout and a source image, concatenated to the
channels, are optional; the label is dropped by the caller; the parameters of the blocks are stacked on
a leading axis.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, xavier_uniform, zeros

from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_positive,
    check_rate,
)
from diffusion_jax.networks.features import film, patchify, sincos_positions, unpatchify
from diffusion_jax.networks.inputs import enter
from diffusion_jax.networks.layers import (
    LECUN,
    BlockStyle,
    DenseInit,
    LayerNorm,
    Modulation,
    OutputDense,
    TransformerStack,
)
from diffusion_jax.registry import register

_XAVIER = DenseInit(xavier_uniform(), lambda inputs: zeros)
_STYLE = BlockStyle(init=_XAVIER)


def _sizes():
    shapes = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
    return {
        f"{name}/{patch}": {"patch_size": patch, "width": width, "depth": depth, "heads": heads}
        for name, (width, depth, heads) in shapes.items()
        for patch in (2, 4, 8)
    }


@register("network", "dit", input="image", paper="2212.09748", sizes=_sizes())
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
      time_features: number of sinusoidal time features.
      time_scale: factor on t. The official network is told the index 0..999 of a noise level: 1 with the
        config's `network.time_input` "index".
      condition_stddev: of the kernels of the time layers and of the label vectors at first; None: variance
        1 / inputs, and 1, with which small networks learn the label much faster.
      attention_implementation: see `layers.SelfAttention`.
      remat: what the blocks compute again in the backward pass instead of storing it, see `remat`.
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
    time_features: int = 256
    time_scale: float = 1000.0
    condition_stddev: float | None = 0.02
    attention_implementation: str | None = None
    remat: bool | str = False
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
            self,
            "dit",
            "image",
            x,
            t,
            label,
            source,
            train,
            width=self.width,
            dtype=dtype,
            **self._condition_init(),
        )
        (height, width), p = x.shape[1:3], self.patch_size
        for field, size in (("height", height), ("width", width)):
            check_divides("dit", "patch_size", p, field, size)
        out_channels = self.out_channels or x.shape[-1] - self.source_channels

        embed = nn.Dense(self.width, kernel_init=_XAVIER.kernel, dtype=dtype, name="input")
        positions = sincos_positions(height // p, width // p, self.width)
        h = embed(patchify(x, p)) + jnp.asarray(positions, dtype)[None]

        h = TransformerStack(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.dropout,
            self.attention_implementation,
            self.remat,
            dtype,
            style=_STYLE,
            name="blocks",
        )(h, condition, None, train)

        shift, scale = Modulation(self.width, 2, dtype=dtype, name="output_modulation")(condition)
        h = film(LayerNorm(affine=False, dtype=dtype, name="output_norm")(h), shift, scale)
        h = OutputDense(p * p * out_channels, dtype, name="output")(h)
        return unpatchify(h, p, height, width)

    def _condition_init(self):
        stddev = self.condition_stddev
        if stddev is None:
            return {"linear_init": LECUN, "label_stddev": 1.0}
        return {"linear_init": DenseInit(normal(stddev), _XAVIER.bias), "label_stddev": stddev}

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
