"""EDM2's magnitude-preserving U-Net, exact (configuration G of arXiv 2312.02696, NVlabs/edm2).

It holds what the official state dict of the preconditioned model holds: the U-Net F and the uncertainty
u; `denoisers.Denoiser(parameterization="edm")` makes D = c_skip x + c_out F(c_in x, ln(sigma) / 4) of it.

Deviations: bfloat16 instead of float16 where 16 bits are asked for; a source can be concatenated to x.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks import magnitude_preserving as mp
from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_inputs,
    check_levels,
    check_positive,
    check_rate,
    check_sides,
)
from diffusion_jax.networks.layers import wide
from diffusion_jax.networks.remat import rematerialised
from diffusion_jax.registry import register

_NAME = "edm2_unet"

# Published sizes, of latents 64x64x4 (ImageNet-512) and of images 64x64x3; from M on with dropout.
SIZES = {
    "XXS": {"channels": 64},
    "XS": {"channels": 128},
    "S": {"channels": 192},
    "M": {"channels": 256, "dropout": 0.1},
    "L": {"channels": 320, "dropout": 0.1},
    "XL": {"channels": 384, "dropout": 0.1},
    "XXL": {"channels": 448, "dropout": 0.1},
}


class LogVariance(nn.Module):
    """The uncertainty u of a noise level: c_noise real [B] -> [B]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        features = mp.Fourier(self.features, name="features")(t)
        return mp.Linear(1, wide(self.dtype), name="linear")(features)[:, 0]


@register("network", _NAME, input="image", official=True, paper="2312.02696", sizes=SIZES)
class EDM2UNet(nn.Module):
    """Magnitude-preserving U-Net with cosine attention, without biases or norms that are learnt.

    Level l has `channels * channel_mults[l]` channels and 1 / 2**l of the resolution. Going down a level
    holds `num_res_blocks` blocks, going up one more. To be trained with `project` after every step, as the
    method `score` does.

    Args:
      channels: base width.
      channel_mults: multiplier of each level, finest first; its length is the number of levels.
      num_res_blocks: blocks of a level going down.
      attention_resolutions: levels whose feature map has a shorter side listed here attend in every
        block but those that resample. The first block of the decoder always attends.
      head_channels: channels of an attention head; a level with fewer channels does not attend.
      noise_mult: Fourier features of the time over `channels`; None: the first of `channel_mults`.
      embedding_mult: width of the embedding over `channels`; None: the largest of `channel_mults`.
      dropout: rate inside the blocks.
      label_balance, concat_balance, residual_balance, attention_balance: t of the sums and
        concatenations, see `magnitude_preserving`: the share of the label, the skip, the residual
        branch, attention.
      clip: bound on the absolute values of every block's output.
      log_variance_features: Fourier features of the uncertainty.
      out_channels: of the output; None for those of x.
      num_classes: number of classes; None or 0 for an unconditional network. The null class is a
        label of zeros.
      source_channels: channels of the source image, concatenated to x; 0 without source.
      attention_implementation: of `jax.nn.dot_product_attention`.
      remat: see `remat`.
      dtype: compute dtype; parameters and output are float32.
    Shapes: x float [B, H, W, C] with H and W divisible by 2**(levels - 1); t, ln(sigma) / 4 (the c_noise
      of "edm"), real scalar or [B]; label int [B]; source float [B, H, W, source_channels].
    """

    channels: int = 192
    channel_mults: Sequence[int] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: Sequence[int] = (16, 8)
    head_channels: int = 64
    noise_mult: int | None = None
    embedding_mult: int | None = None
    dropout: float = 0.0
    label_balance: float = 0.5
    concat_balance: float = 0.5
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    clip: float = 256.0
    log_variance_features: int = 128
    out_channels: int | None = None
    num_classes: int | None = None
    source_channels: int = 0
    attention_implementation: str | None = None
    remat: Any = False
    dtype: Any = jnp.float32

    project = staticmethod(mp.project)

    def setup(self):
        self.uncertainty = LogVariance(self.log_variance_features, check_dtype(_NAME, self.dtype))

    def log_variance(self, t: jax.Array) -> jax.Array:
        """u of t `[B]`, the logarithm of the expected weighted error there; float32 `[B]` (eq. 21).

        Call as `module.apply({"params": params}, t, method="log_variance")`.
        """
        return self.uncertainty(t)

    @nn.compact
    def __call__(self, x, t, *, label=None, source=None, train: bool = False) -> jax.Array:
        """Evaluates the network; zero at initialisation.

        Returns:
          float32 [B, H, W, out_channels] (float64 for `dtype="float64"`).

        Raises:
          ValueError: a field, a shape, a dtype or a condition does not fit, see `checks`.
        """
        dtype = self._check_fields()
        given = t
        x, t, label, source = check_inputs(
            _NAME,
            "image",
            x,
            t,
            label=label,
            source=source,
            num_classes=self.num_classes,
            source_channels=self.source_channels,
            train=train,
        )
        if getattr(given, "dtype", None) == jnp.float64:
            t = jnp.broadcast_to(given, t.shape)
        if self.is_initializing():
            self.log_variance(t)
        side, levels = min(x.shape[1:3]), len(self.channel_mults)
        check_sides(_NAME, x, levels)
        out_channels = self.out_channels or x.shape[-1]
        block_cls = rematerialised(mp.Block, self.remat, (3,))
        embedding = self._embedding(t, label)

        def block(h, level, name, attends=False, **kind):
            channels = self.channels * self.channel_mults[level]
            heads = channels // self.head_channels if attends else 0
            if heads:
                check_divides(_NAME, "heads", heads, "channels of an attending level", channels)
            return block_cls(
                channels,
                heads=heads,
                dropout=self.dropout,
                residual_balance=self.residual_balance,
                attention_balance=self.attention_balance,
                clip=self.clip,
                implementation=self.attention_implementation,
                dtype=dtype,
                name=name,
                **kind,
            )(h, embedding, train)

        attending = [side >> level in self.attention_resolutions for level in range(levels)]
        parts = [x] if source is None else [x, source]
        parts = [part.astype(dtype) for part in (*parts, jnp.ones_like(x[..., :1]))]
        width = self.channels * self.channel_mults[0]
        h = mp.Conv(width, dtype=dtype, name="input")(jnp.concatenate(parts, axis=-1))
        skips = [h]
        for level in range(levels):
            if level:
                h = block(h, level - 1, f"down_{level}_resample", resample="down")
                skips.append(h)
            for i in range(self.num_res_blocks):
                h = block(h, level, f"down_{level}_block_{i}", attending[level])
                skips.append(h)

        h = block(h, levels - 1, "middle_block_0", True, decoder=True)
        h = block(h, levels - 1, "middle_block_1", decoder=True)
        for level in reversed(range(levels)):
            if level < levels - 1:
                h = block(h, level + 1, f"up_{level}_resample", decoder=True, resample="up")
            for i in range(self.num_res_blocks + 1):
                h = mp.concatenated(h, skips.pop(), self.concat_balance)
                h = block(h, level, f"up_{level}_block_{i}", attending[level], decoder=True)

        gain = self.param("output_gain", nn.initializers.zeros, (), jnp.float32)
        # Few channels: in float32 this layer costs nothing, and the output is not rounded.
        return mp.Conv(out_channels, dtype=wide(dtype), name="output")(h, gain)

    def _embedding(self, t: jax.Array, label: jax.Array | None) -> jax.Array:
        """[B, D] of the noise level and the label."""
        dtype = wide(self.dtype)
        noise = self.channels * (self.noise_mult or self.channel_mults[0])
        width = self.channels * (self.embedding_mult or max(self.channel_mults))
        features = mp.Fourier(noise, name="time_features")(t)
        embedding = mp.Linear(width, dtype, name="time")(features)
        if label is not None:
            told = mp.Labels(self.num_classes, width, dtype, name="label")(label)
            embedding = mp.mixed(embedding, told, self.label_balance)
        return mp.silu(embedding)

    def _check_fields(self):
        check_levels(_NAME, self.channel_mults)
        check_positive(
            _NAME,
            channels=self.channels,
            num_res_blocks=self.num_res_blocks,
            head_channels=self.head_channels,
            log_variance_features=self.log_variance_features,
        )
        check_rate(_NAME, "dropout", self.dropout)
        for field in ("label_balance", "concat_balance", "residual_balance", "attention_balance"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(
                    f"{_NAME}: {field} must be in [0, 1], got {getattr(self, field)!r}"
                )
        return check_dtype(_NAME, self.dtype)
