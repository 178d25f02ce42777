"""MLP for points [B, D], or images as points: residual blocks modulated by time and label."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from diffusion_jax.networks.checks import check_dtype, check_positive, check_rate
from diffusion_jax.networks.features import film
from diffusion_jax.networks.inputs import enter
from diffusion_jax.networks.layers import LayerNorm, Modulation, OutputDense
from diffusion_jax.registry import register


@register("network", "mlp", input="points")
class MLP(nn.Module):
    """Residual MLP: blocks `h + Dense(SiLU(FiLM(Dense(norm(h)), time, label)))`.

    Args:
      width: of the residual stream and of the blocks.
      depth: number of residual blocks.
      dropout: rate inside the blocks.
      out_features: of the output; None for D. Images: None.
      num_classes: number of classes; None or 0 for an unconditional network.
      source_channels: last axis of the source, concatenated to x; 0 without source.
      time_features: number of sinusoidal time features.
      time_scale: factor on t, see `features.time_features`.
      dtype: compute dtype; parameters and output are float32.
    Shapes: x float [B, D]; t real scalar or [B]; label int [B]; source float [B, source_channels]. Images
      x [B, H, W, C] and source [B, H, W, source_channels] are flattened, and the output has x's shape.
    """

    width: int = 128
    depth: int = 3
    dropout: float = 0.0
    out_features: int | None = None
    num_classes: int | None = None
    source_channels: int = 0
    time_features: int = 64
    time_scale: float = 1000.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, t, *, label=None, source=None, train: bool = False) -> jax.Array:
        """Evaluates the network; zero at initialisation.

        Returns:
          float32 [B, out_features], for images [B, H, W, C].

        Raises:
          ValueError: a field, a shape, a dtype or a condition does not fit, see `checks`.
        """
        dtype = check_dtype("mlp", self.dtype)
        check_positive("mlp", width=self.width, depth=self.depth)
        check_rate("mlp", "dropout", self.dropout)
        shape, layout = x.shape, "points" if x.ndim == 2 else "image"
        if layout == "image" and self.out_features is not None:
            raise ValueError(
                f"mlp: out_features = {self.out_features} is for points, not for images"
            )
        x, condition = enter(
            self, "mlp", layout, x, t, label, source, train, width=self.width, dtype=dtype
        )
        x = x.reshape(shape[0], -1)
        out_features = self.out_features or math.prod(shape[1:])
        h = nn.Dense(self.width, dtype=dtype, name="input")(x)
        for i in range(self.depth):
            shift, scale = Modulation(
                self.width, 2, zero_init=False, dtype=dtype, name=f"block_{i}_modulation"
            )(condition)
            b = LayerNorm(dtype=dtype, name=f"block_{i}_norm")(h)
            b = nn.Dense(self.width, dtype=dtype, name=f"block_{i}_in")(b)
            b = nn.silu(film(b, shift, scale))
            b = nn.Dropout(self.dropout, name=f"block_{i}_dropout")(b, deterministic=not train)
            h = h + nn.Dense(self.width, kernel_init=zeros, dtype=dtype, name=f"block_{i}_out")(b)
        h = nn.silu(LayerNorm(dtype=dtype, name="output_norm")(h))
        h = OutputDense(out_features, dtype, name="output")(h)
        return h if layout == "points" else h.reshape(shape)
