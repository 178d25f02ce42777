"""DDPM++ and NCSN++ (arXiv 2011.13456), exact in the form of EDM's code base (SongUNet, arXiv 2206.00364).

EDM's published networks without their preconditioning, which `denoisers.Denoiser(parameterization="edm")`
is: values, initialisation and parameter counts are the official ones. Beside them the tree holds the fixed
Fourier frequencies of NCSN++, which get no gradient; an optimiser with weight decay would shrink them.

Deviations: labels are dropped by the caller; a source can be concatenated to x; any height and width that
the levels divide.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_inputs,
    check_levels,
    check_positive,
    check_rate,
    check_sides,
)
from diffusion_jax.networks.features import time_features
from diffusion_jax.networks.layers import GroupNorm, wide
from diffusion_jax.networks.remat import rematerialised
from diffusion_jax.networks.unet_blocks import (
    UNetBlock,
    UNetStyle,
    check_augment_labels,
    check_taps,
    conv,
    dense,
    fir_downsample,
    label_vectors,
    resampled,
    xavier,
)
from diffusion_jax.registry import check_choice, register

_NAME = "song_unet"
_EPSILON = 1e-6
_XAVIER = xavier()
_SMALL = xavier(1e-10)  # kernels of 1e-5 times Xavier's
_FREQUENCY_STDDEV = 16.0

EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")

_DDPMPP: dict[str, Any] = {"embedding": "positional", "encoder": "standard"}
_NCSNPP = {
    "embedding": "fourier",
    "encoder": "residual",
    "noise_mult": 2,
    "resample_filter": (1, 3, 3, 1),
}
_CIFAR10 = {"image_size": 32, "channel_mults": (2, 2, 2), "dropout": 0.13, "augment_dim": 9}
_FACES = {"image_size": 64, "channel_mults": (1, 2, 2, 2), "num_classes": 0, "augment_dim": 9}

SIZES = {
    f"{name}-{code}": {**fields, **network}
    for name, fields in {
        "cifar10-32x32-uncond": {**_CIFAR10, "num_classes": 0},
        "cifar10-32x32-cond": {**_CIFAR10, "num_classes": 10},
        "ffhq-64x64-uncond": {**_FACES, "dropout": 0.05},
        "afhqv2-64x64-uncond": {**_FACES, "dropout": 0.25},
    }.items()
    for code, network in {"vp": _DDPMPP, "ve": _NCSNPP}.items()
}


class Fourier(nn.Module):
    """Random Fourier features of a noise level, sines first: real [B] -> [B, features]."""

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        shape = (self.features // 2,)
        drawn = self.param("frequencies", normal(_FREQUENCY_STDDEV), shape, jnp.float32)
        turns = (
            t.astype(self.dtype)[:, None] * jax.lax.stop_gradient(drawn).astype(self.dtype)[None]
        )
        return jnp.concatenate([jnp.sin(2 * jnp.pi * turns), jnp.cos(2 * jnp.pi * turns)], axis=-1)


class FilteredConv(nn.Module):
    """Convolution, then filter and every other pixel of it: [B, H, W, C] -> [B, H / 2, W / 2, channels].

    The two are one: the convolution's result reaches as far beyond the edge as the filter does.
    """

    channels: int
    taps: Sequence[float]
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.channels)
        kernel = self.param("kernel", _XAVIER.kernel, shape, jnp.float32)
        bias = self.param("bias", zeros, (self.channels,), jnp.float32)
        pad = 1 + (len(self.taps) - 1) // 2
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (1, 1),
            [(pad, pad)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = fir_downsample(y, self.taps, pad=0)
        return y + jnp.broadcast_to(bias.astype(self.dtype), y.shape)


@register("network", _NAME, input="image", official=True, paper="2011.13456", sizes=SIZES)
class SongUNet(nn.Module):
    """DDPM++ or NCSN++ U-Net, with the fields of DDPM++ for 32x32 by default.

    Level l has `channels * channel_mults[l]` channels and 1 / 2**l of the resolution. Going down a level
    holds `num_res_blocks` blocks, going up one more, of which only the last may attend.

    Args:
      channels: base width, that of the first layer too.
      channel_mults: multiplier of each level, finest first; its length is the number of levels.
      num_res_blocks: blocks of a level going down.
      attention_resolutions: levels whose side is listed here attend: going down in every block but
        those that resample, going up in the last. The first block of the decoder always attends.
      image_size: side of the images that `attention_resolutions` is about; None for the shorter side
        of x. A network of a given `image_size` attends at the same levels whatever the size of x.
      heads: of attention.
      dropout: rate inside the blocks.
      embedding: "positional" sinusoids of t (DDPM++) or random "fourier" features (NCSN++).
      encoder: "standard" (DDPM++), or a pyramid of the input beside it that is added to its levels,
        resampled ("skip") or a network of its own ("residual", NCSN++).
      decoder: "standard", or "skip": the output is summed up over the levels.
      resample_filter: (1, 1) in DDPM++, (1, 3, 3, 1) in NCSN++.
      noise_mult, embedding_mult: width of the features of t and of the embedding over `channels`.
      augment_dim: length of the vector that says how an image was augmented; 0 without it.
      out_channels: of the output; None for those of x.
      num_classes: number of classes; None or 0 for an unconditional network. The null class is a
        label of zeros.
      source_channels: channels of the source image, concatenated to x; 0 without source.
      time_scale: factor on t.
      attention_implementation: of `jax.nn.dot_product_attention`.
      remat: what the blocks compute again in the backward pass, see `remat`.
      dtype: compute dtype; parameters and output are float32.
    Shapes: x float [B, H, W, C] with H and W divisible by 2**(levels - 1); t, ln(sigma) / 4 (the c_noise
      of "edm"), real scalar or [B]; label int [B]; source float [B, H, W, source_channels];
      augment_labels float [B, augment_dim].
    """

    channels: int = 128
    channel_mults: Sequence[int] = (2, 2, 2)
    num_res_blocks: int = 4
    attention_resolutions: Sequence[int] = (16,)
    image_size: int | None = None
    heads: int = 1
    dropout: float = 0.0
    embedding: str = "positional"
    encoder: str = "standard"
    decoder: str = "standard"
    resample_filter: Sequence[float] = (1, 1)
    noise_mult: int = 1
    embedding_mult: int = 4
    augment_dim: int = 0
    out_channels: int | None = None
    num_classes: int | None = None
    source_channels: int = 0
    time_scale: float = 1.0
    attention_implementation: str | None = None
    remat: bool | str = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x, t, *, label=None, source=None, augment_labels=None, train: bool = False
    ) -> jax.Array:
        """Evaluates the network; about 1e-5 at initialisation.

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
        levels, taps = len(self.channel_mults), tuple(self.resample_filter)
        check_sides(_NAME, x, levels)
        out_channels = self.out_channels or x.shape[-1]
        embedding = self._embedding(t, label, augment_labels)
        style = UNetStyle(
            init=_XAVIER,
            attention=xavier(0.2),
            last=_SMALL,
            epsilon=_EPSILON,
            scale_shift=False,
            project=True,
            gain=0.5**0.5,
            order="edm",
            taps=taps,
        )
        block_cls = rematerialised(UNetBlock, self.remat, static_argnums=(3,))

        def block(h, channels, name, attends=False, resample=None):
            if attends:
                check_divides(
                    _NAME, "heads", self.heads, "channels of an attending level", channels
                )
            return block_cls(
                channels,
                style,
                resample,
                self.heads if attends else 0,
                self.dropout,
                self.attention_implementation,
                dtype,
                name=name,
            )(h, embedding, train)

        side = self.image_size or min(x.shape[1:3])
        attending = [side >> level in self.attention_resolutions for level in range(levels)]
        widths = [self.channels * mult for mult in self.channel_mults]
        x = jnp.concatenate([x] if source is None else [x, source], axis=-1).astype(dtype)

        aux, inputs = x, x.shape[-1]
        h = conv(self.channels, inputs, _XAVIER, "input", dtype)(x)
        skips = [h]
        for level in range(levels):
            if level:
                h = block(h, h.shape[-1], f"down_{level}_resample", resample="down")
                name, width = f"down_{level}_aux", h.shape[-1]
                if self.encoder == "skip":
                    aux = resampled(aux, "down", taps)
                    h = h + dense(width, inputs, _XAVIER, name, dtype)(aux)
                elif self.encoder == "residual":
                    aux = FilteredConv(width, taps, dtype, name=name)(aux)
                    h = aux = (h + aux) * 0.5**0.5
                skips.append(h)
            for i in range(self.num_res_blocks):
                h = block(h, widths[level], f"down_{level}_block_{i}", attending[level])
                skips.append(h)

        h = block(h, h.shape[-1], "middle_block_0", attends=True)
        h = block(h, h.shape[-1], "middle_block_1")
        output = None
        for level in reversed(range(levels)):
            if level < levels - 1:
                h = block(h, h.shape[-1], f"up_{level}_resample", resample="up")
            for i in range(self.num_res_blocks + 1):
                attends = attending[level] and i == self.num_res_blocks
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(h, widths[level], f"up_{level}_block_{i}", attends)
            if self.decoder == "skip" or level == 0:
                if output is not None:
                    output = resampled(output, "up", taps)
                prefix = f"up_{level}_output" if level else "output"
                own = self._output(h, out_channels, prefix, wide(dtype))
                output = own if output is None else output + own
        return output

    def _output(self, h: jax.Array, channels: int, prefix: str, dtype: Any) -> jax.Array:
        # Few channels: in float32 this layer costs nothing, and the output is not rounded.
        h = nn.silu(GroupNorm(dtype, _EPSILON, name=f"{prefix}_norm")(h.astype(dtype)))
        return conv(channels, h.shape[-1], _SMALL, prefix, dtype)(h)

    def _embedding(self, t: jax.Array, label: Any, augment_labels: Any) -> jax.Array:
        """[B, D] of the noise level, the label and the augmentation."""
        dtype, noise = wide(self.dtype), self.channels * self.noise_mult
        augment = check_augment_labels(_NAME, augment_labels, t.shape[0], self.augment_dim)
        if self.embedding == "fourier":
            h = Fourier(noise, dtype, name="time_features")(self.time_scale * t)
        else:
            h = time_features(t, noise, scale=self.time_scale, endpoint=True, dtype=dtype)
            h = jnp.roll(h, noise // 2, axis=-1)  # sines first
        if label is not None:
            rows = label_vectors(label, self.num_classes, noise, _XAVIER.kernel, dtype)
            h = h + self.num_classes**0.5 * rows
            bias = self.param("label_bias", zeros, (noise,), jnp.float32)
            h = h + jnp.broadcast_to(bias.astype(dtype), h.shape)
        if self.augment_dim:
            layer = dense(noise, self.augment_dim, _XAVIER, "augment", dtype, bias=False)
            h = h + layer(augment.astype(dtype))
        width = self.channels * self.embedding_mult
        h = nn.silu(dense(width, noise, _XAVIER, "time_in", dtype)(h))
        return nn.silu(dense(width, width, _XAVIER, "time_out", dtype)(h))

    def _check_fields(self):
        check_levels(_NAME, self.channel_mults)
        check_positive(
            _NAME,
            channels=self.channels,
            num_res_blocks=self.num_res_blocks,
            heads=self.heads,
            noise_mult=self.noise_mult,
            embedding_mult=self.embedding_mult,
            **({} if self.image_size is None else {"image_size": self.image_size}),
        )
        check_rate(_NAME, "dropout", self.dropout)
        check_taps(_NAME, self.resample_filter)
        for field, choices in (
            ("embedding", EMBEDDINGS),
            ("encoder", ENCODERS),
            ("decoder", DECODERS),
        ):
            check_choice(f"{_NAME}: {field}", getattr(self, field), choices)
        return check_dtype(_NAME, self.dtype)
