"""ADM's U-Net, exact in both of its public forms: guided-diffusion's (arXiv 2105.05233), which DDBM, DBIM and
I2SB use too, and EDM's (DhariwalUNet, arXiv 2206.00364).

The two compute the same function but for `origin`: the groups of the norms (32 of them; in EDM's form fewer
where a group would have less than four channels) and the order of the channels of query, key and value.
EDM's form may be told how an image was augmented. Values, initialisation and parameter counts are the
official ones.

Deviations: labels are dropped by the caller; the null class adds nothing to the embedding, as a label of
zeros does in EDM's form (guided-diffusion's has none); a source can be concatenated to x (`condition_mode`
"concat" of DDBM); any height and width that the levels divide.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal

from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_inputs,
    check_positive,
    check_rate,
    check_sides,
)
from diffusion_jax.networks.features import downsample, time_features, upsample
from diffusion_jax.networks.layers import TORCH, GroupNorm, wide
from diffusion_jax.networks.remat import rematerialised
from diffusion_jax.networks.unet_blocks import (
    ZERO,
    UNetBlock,
    UNetStyle,
    check_augment_labels,
    conv,
    dense,
    label_vectors,
)
from diffusion_jax.registry import check_choice, register

_NAME = "adm_unet"
_EPSILON = 1e-5
_GROUPS = 32

ORIGINS = ("guided_diffusion", "edm")

_AT_64: dict[str, Any] = {
    "image_size": 64,
    "channels": 192,
    "channel_mults": (1, 2, 3, 4),
    "num_res_blocks": 3,
    "dropout": 0.1,
}
_AT_256: dict[str, Any] = {
    "image_size": 256,
    "channels": 256,
    "channel_mults": (1, 1, 2, 2, 4, 4),
    "num_res_blocks": 2,
    "dropout": 0.0,
}
_AT_128 = {**_AT_256, "image_size": 128, "channel_mults": (1, 1, 2, 3, 4), "head_channels": None}
_AT_512 = {**_AT_256, "image_size": 512, "channel_mults": (0.5, 1, 1, 2, 2, 4, 4)}
_GUIDED = {"learn_sigma": True, "num_classes": 1000}
_BRIDGE = {"num_classes": 0, "source_channels": 3}

SIZES = {
    # guided-diffusion
    "64x64": {**_AT_64, **_GUIDED, "new_attention_order": True},
    "128x128": {**_AT_128, **_GUIDED},
    "256x256": {**_AT_256, **_GUIDED},
    "256x256-uncond": {**_AT_256, **_GUIDED, "num_classes": 0},
    "512x512": {**_AT_512, **_GUIDED},
    "lsun-256x256": {**_AT_256, **_GUIDED, "num_classes": 0, "dropout": 0.1},
    # EDM
    "edm-imagenet-64x64-cond": {**_AT_64, "origin": "edm", "num_classes": 1000},
    # bridges: the source beside x, no variances
    "ddbm-edges2handbags-64x64": {**_AT_64, **_BRIDGE, "new_attention_order": True},
    "ddbm-diode-256x256": {**_AT_256, **_BRIDGE, "new_attention_order": True, "dropout": 0.1},
    "dbim-imagenet-256x256": {
        **_AT_256,
        **_BRIDGE,
        "num_classes": 1000,
        "time_scale": 1000.0,
    },
    # I2SB's 1000 noise levels run from 0.1 to 1000
    "i2sb-imagenet-256x256": {
        **_AT_256,
        "num_classes": 0,
        "time_scale": 999.9,
        "time_offset": 0.1,
    },
}


class Resample(nn.Module):
    """Half or twice the size without a residual block: mean or nearest neighbour, or with a convolution.

    A convolution halves by its stride, and follows the doubling.
    """

    how: str
    learned: bool
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.how == "up":
            x = upsample(x)
        elif not self.learned:
            x = downsample(x)
        if not self.learned:
            return x
        stride = 2 if self.how == "down" else 1
        options = {"strides": (stride, stride), "padding": [(1, 1), (1, 1)]}
        return conv(x.shape[-1], x.shape[-1], TORCH, "conv", self.dtype, **options)(x)


@register("network", _NAME, input="image", official=True, paper="2105.05233", sizes=SIZES)
class ADMUNet(nn.Module):
    """ADM U-Net, with the fields of ImageNet at 64x64 by default.

    Level l has `channels * channel_mults[l]` channels and 1 / 2**l of the resolution. Going down a level
    holds `num_res_blocks` blocks, going up one more.

    Args:
      channels: base width.
      channel_mults: multiplier of each level, finest first; its length is the number of levels.
      num_res_blocks: blocks of a level going down.
      attention_resolutions: levels whose side is listed here attend in every block but those that
        resample. The first of the two middle blocks always attends.
      image_size: side of the images that `attention_resolutions` is about; None for the shorter side
        of x. A network of a given `image_size` attends at the same levels whatever the size of x.
      head_channels: channels of an attention head; None: `heads` of them everywhere.
      heads, heads_upsample: number of heads, and of those going up (None: the same); without effect
        beside `head_channels`.
      scale_shift: the embedding modulates the second norm of a block; otherwise it is added before it.
      resblock_updown: residual blocks change the resolution; otherwise convolutions do, or, without
        `conv_resample`, mean and nearest neighbour.
      new_attention_order: query, key and value are split before the heads (guided-diffusion).
      origin: "guided_diffusion" or "edm", see the top of this file.
      dropout: rate inside the blocks.
      embedding_mult: width of the embedding over `channels`.
      augment_dim: length of the vector that says how an image was augmented; 0 without it.
      learn_sigma: the output has twice the channels, the second half for the variance.
      out_channels: of the output, instead; None for those of x.
      num_classes: number of classes; None or 0 for an unconditional network.
      source_channels: channels of the source image, concatenated to x; 0 without source.
      time_scale, time_offset: the network's own time is `time_scale t + time_offset`.
      attention_implementation: of `jax.nn.dot_product_attention`.
      remat: what the blocks compute again in the backward pass, see `remat`.
      dtype: compute dtype; parameters and output are float32.
    Shapes: x float [B, H, W, C] with H and W divisible by 2**(levels - 1); t real scalar or [B]: the step
      0..999 (guided-diffusion), ln(sigma) / 4 (EDM), 250 ln(t) (DDBM), or what `time_scale` and
      `time_offset` make one of these; label int [B]; source float [B, H, W, source_channels];
      augment_labels float [B, augment_dim].
    """

    channels: int = 192
    channel_mults: Sequence[float] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: Sequence[int] = (32, 16, 8)
    image_size: int | None = None
    head_channels: int | None = 64
    heads: int = 4
    heads_upsample: int | None = None
    scale_shift: bool = True
    resblock_updown: bool = True
    conv_resample: bool = True
    new_attention_order: bool = False
    origin: str = "guided_diffusion"
    dropout: float = 0.0
    embedding_mult: int = 4
    augment_dim: int = 0
    learn_sigma: bool = False
    out_channels: int | None = None
    num_classes: int | None = None
    source_channels: int = 0
    time_scale: float = 1.0
    time_offset: float = 0.0
    attention_implementation: str | None = None
    remat: bool | str = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x, t, *, label=None, source=None, augment_labels=None, train: bool = False
    ) -> jax.Array:
        """Evaluates the network; zero at initialisation.

        `augment_labels` is zero, like None, for an image as it is.

        Returns:
          float32 [B, H, W, out_channels] (float64 for `dtype="float64"`).

        Raises:
          ValueError: a field, a shape, a dtype or a condition does not fit, see `checks`.
        """
        dtype = self._check_fields()
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
        levels, widths = len(self.channel_mults), self.widths
        check_sides(_NAME, x, levels)
        out_channels = self.out_channels or x.shape[-1] * (2 if self.learn_sigma else 1)
        embedding = self._embedding(t, label, augment_labels)
        order = "new" if self.new_attention_order else "legacy"
        groups = None if self.origin == "edm" else _GROUPS
        style = UNetStyle(
            init=TORCH,
            attention=TORCH,
            last=ZERO,
            epsilon=_EPSILON,
            groups=groups,
            scale_shift=self.scale_shift,
            order="edm" if self.origin == "edm" else order,
        )
        block_cls = rematerialised(UNetBlock, self.remat, static_argnums=(3,))

        def block(h, channels, name, heads=0, resample=None):
            for field, width in ((f"input channels of {name}", h.shape[-1]), (name, channels)):
                self._check_groups(field, width)
            return block_cls(
                channels,
                style,
                resample,
                heads,
                self.dropout,
                self.attention_implementation,
                dtype,
                name=name,
            )(h, embedding, train)

        def between(h, name, how):
            if self.resblock_updown:
                return block(h, h.shape[-1], name, resample=how)
            return Resample(how, self.conv_resample, dtype, name=name)(h)

        attending = self.attending(min(x.shape[1:3]))
        x = jnp.concatenate([x] if source is None else [x, source], axis=-1).astype(dtype)
        h = conv(widths[0], x.shape[-1], TORCH, "input", dtype)(x)
        skips = [h]
        for level in range(levels):
            if level:
                h = between(h, f"down_{level}_resample", "down")
                skips.append(h)
            heads = self.heads_of(widths[level]) if attending[level] else 0
            for i in range(self.num_res_blocks):
                h = block(h, widths[level], f"down_{level}_block_{i}", heads)
                skips.append(h)

        h = block(h, h.shape[-1], "middle_block_0", self.heads_of(h.shape[-1]))
        h = block(h, h.shape[-1], "middle_block_1")
        for level in reversed(range(levels)):
            if level < levels - 1:
                h = between(h, f"up_{level}_resample", "up")
            heads = self.heads_of(widths[level], up=True) if attending[level] else 0
            for i in range(self.num_res_blocks + 1):
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, widths[level], f"up_{level}_block_{i}", heads)

        # Few channels: in float32 this layer costs nothing, and the output is not rounded.
        h, dtype = h.astype(wide(dtype)), wide(dtype)
        h = nn.silu(GroupNorm(dtype, _EPSILON, groups, name="output_norm")(h))
        return conv(out_channels, h.shape[-1], ZERO, "output", dtype)(h)

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [int(self.channels * mult) for mult in self.channel_mults]

    def attending(self, side: int) -> list[bool]:
        """Which levels attend; `side` is used if there is no `image_size`."""
        side = self.image_size or side
        return [side >> level in self.attention_resolutions for level in range(len(self.widths))]

    def heads_of(self, channels: int, up: bool = False) -> int:
        """Attention heads of a block of so many channels, going up or not."""
        if self.head_channels is None:
            heads = self.heads_upsample if up and self.heads_upsample else self.heads
        else:
            heads = channels // self.head_channels
            if self.origin != "edm":
                field = "channels of an attending level"
                check_divides(_NAME, "head_channels", self.head_channels, field, channels)
        if heads:
            check_divides(_NAME, "heads", heads, "channels of an attending level", channels)
        return heads

    def _check_groups(self, field: str, channels: int) -> None:
        if self.origin != "edm":
            check_divides(_NAME, "the number of groups", _GROUPS, field, channels)

    def _embedding(self, t: jax.Array, label: Any, augment_labels: Any) -> jax.Array:
        """[B, D] of the time, the label and the augmentation."""
        dtype, width = wide(self.dtype), self.channels * self.embedding_mult
        augment = check_augment_labels(_NAME, augment_labels, t.shape[0], self.augment_dim)
        t = self.time_scale * t.astype(dtype) + self.time_offset
        h = time_features(t, self.channels, scale=1.0, dtype=dtype)
        if augment is not None:
            layer = dense(self.channels, self.augment_dim, ZERO, "augment", dtype, bias=False)
            h = h + layer(augment.astype(dtype))
        h = nn.silu(dense(width, self.channels, TORCH, "time_in", dtype)(h))
        h = dense(width, width, TORCH, "time_out", dtype)(h)
        if label is not None:
            h = h + label_vectors(label, self.num_classes, width, normal(1.0), dtype)
        return nn.silu(h)

    def _check_fields(self):
        check_positive(
            _NAME,
            channels=self.channels,
            num_res_blocks=self.num_res_blocks,
            heads=self.heads,
            embedding_mult=self.embedding_mult,
            **{
                field: value
                for field in ("head_channels", "heads_upsample", "image_size")
                if (value := getattr(self, field)) is not None
            },
        )
        if not self.channel_mults or min(self.channel_mults) <= 0 or 0 in self.widths:
            raise ValueError(
                f"{_NAME}: channel_mults must name one positive multiplier for each level, got"
                f" {tuple(self.channel_mults)}"
            )
        check_rate(_NAME, "dropout", self.dropout)
        check_choice(f"{_NAME}: origin", self.origin, ORIGINS)
        if self.origin == "edm" and self.new_attention_order:
            raise ValueError(f"{_NAME}: origin 'edm' has an order of attention channels of its own")
        return check_dtype(_NAME, self.dtype)
