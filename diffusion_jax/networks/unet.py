"""U-Net for images: DDPM++ (arXiv 2011.13456) with the residual blocks of ADM (arXiv 2105.05233).

Deviations: no rescaling of residual sums and no FIR filters (DDPM++ has both as options); groups of
the norms shrink with the channels, see `layers.GroupNorm`; FiLM starts at zero.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_levels,
    check_positive,
    check_rate,
    check_sides,
)
from diffusion_jax.networks.inputs import enter
from diffusion_jax.networks.layers import AttentionBlock, GroupNorm, ResidualBlock
from diffusion_jax.networks.remat import rematerialised
from diffusion_jax.registry import register


@register("network", "unet", input="image")
class UNet(nn.Module):
    """U-Net with FiLM residual blocks, self-attention and concatenated skips.

    Level l has `channels * channel_mults[l]` channels and 1 / 2**l of the resolution. Going down a
    level holds `num_res_blocks` blocks, going up one more, and every block going up takes one skip.

    Args:
      channels: base width.
      channel_mults: multiplier of each level, finest first; its length is the number of levels.
      num_res_blocks: residual blocks of a level.
      attention_resolutions: levels whose feature map has a shorter side listed here attend after
        every block. Sides that no level has are ignored.
      middle_attention: whether the coarsest level attends between the two middle blocks.
      heads: attention heads, a divisor of the channels of every attending level.
      dropout: rate inside the residual blocks.
      out_channels: of the output; None for those of x.
      num_classes: number of classes; None or 0 for an unconditional network.
      source_channels: channels of the source image, concatenated to x; 0 without source.
      condition_width: width of the conditioning vector; None for 4 * channels.
      time_features: number of sinusoidal time features.
      time_scale: factor on t, see `features.time_features`.
      attention_implementation: see `layers.SelfAttention`.
      remat: what the blocks compute again in the backward pass instead of storing it, see `remat`.
      dtype: compute dtype; parameters and output are float32.
    Shapes: x float [B, H, W, C] with H and W divisible by 2**(levels - 1); t real scalar or [B];
      label int [B]; source float [B, H, W, source_channels].
    """

    channels: int = 32
    channel_mults: Sequence[int] = (1, 2)
    num_res_blocks: int = 1
    attention_resolutions: Sequence[int] = ()
    middle_attention: bool = True
    heads: int = 2
    dropout: float = 0.0
    out_channels: int | None = None
    num_classes: int | None = None
    source_channels: int = 0
    condition_width: int | None = None
    time_features: int = 64
    time_scale: float = 1000.0
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
        width = self.condition_width or 4 * self.channels
        x, condition = enter(
            self, "unet", "image", x, t, label, source, train, width=width, dtype=dtype
        )
        side, levels = min(x.shape[1:3]), len(self.channel_mults)
        check_sides("unet", x, levels)
        out_channels = self.out_channels or x.shape[-1] - self.source_channels

        block_cls = rematerialised(ResidualBlock, self.remat, static_argnums=(3,))
        attention_cls = rematerialised(AttentionBlock, self.remat)

        def block(h, level, name, resample=None):
            width = self.channels * self.channel_mults[level]
            return block_cls(width, resample, self.dropout, dtype, name=name)(h, condition, train)

        def attention(h, name):
            check_divides(
                "unet", "heads", self.heads, "channels of an attending level", h.shape[-1]
            )
            return attention_cls(self.heads, self.attention_implementation, dtype, name=name)(h)

        def attends(level):
            return side >> level in self.attention_resolutions

        h = nn.Conv(self.channels * self.channel_mults[0], (3, 3), dtype=dtype, name="input")(x)
        skips = [h]
        for level in range(levels):
            if level:
                h = block(h, level - 1, f"down_{level}_resample", "down")
                skips.append(h)
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_block_{i}")
                if attends(level):
                    h = attention(h, f"down_{level}_attention_{i}")
                skips.append(h)

        h = block(h, levels - 1, "middle_block_0")
        if self.middle_attention:
            h = attention(h, "middle_attention")
        h = block(h, levels - 1, "middle_block_1")

        for level in reversed(range(levels)):
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, level, f"up_{level}_block_{i}")
                if attends(level):
                    h = attention(h, f"up_{level}_attention_{i}")
            if level:
                h = block(h, level, f"up_{level}_resample", "up")

        h = nn.silu(GroupNorm(dtype, name="output_norm")(h))
        # Few channels: in float32 this layer costs nothing, and the output is not rounded.
        return nn.Conv(out_channels, (3, 3), kernel_init=zeros, dtype=jnp.float32, name="output")(h)

    def _check_fields(self):
        check_levels("unet", self.channel_mults)
        check_positive(
            "unet",
            channels=self.channels,
            num_res_blocks=self.num_res_blocks,
            heads=self.heads,
        )
        check_rate("unet", "dropout", self.dropout)
        return check_dtype("unet", self.dtype)
