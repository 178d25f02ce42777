"""Text encoder of Glow-TTS and Grad-TTS (arXiv 2005.11129, 2105.06337).

Symbols -> vectors -> three convolutions -> a transformer whose MLPs are convolutions; from its output a
mean spectrum a symbol and, without a gradient into the rest, the logarithm of its duration.

Deviations: rotary positions in place of learned relative ones; pre-norm blocks that start as the
identity, GELU; a speaker is a vector added before the transformer (Grad-TTS concatenates it).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import zeros

from diffusion_jax.networks.checks import check_divides, check_dtype, check_positive, check_rate
from diffusion_jax.networks.features import rotary_angles
from diffusion_jax.networks.layers import LayerNorm, Lookup, TransformerStack


class TextEncoder(nn.Module):
    """Mean spectrum and log-duration of each symbol of a text.

    Args:
      symbols: number of symbols; texts hold 1..symbols, and 0 where they are padded.
      mels: M, channels of a spectrum.
      speakers: number of speakers, 0 for a single voice.
      width: of a symbol's vector, divisible by `heads` into even parts.
      depth: transformer blocks.
      heads: attention heads.
      mlp_ratio: width of the MLPs over `width`.
      mlp_kernel: symbols that a layer of the MLPs sees.
      prenet_layers, prenet_kernel: convolutions before the transformer, residual as a whole.
      duration_width: of the duration predictor's two convolutions.
      dropout: rate in transformer and duration predictor; 0.5 in the prenet, as published, where it is
        not 0.
      dtype: compute dtype; parameters and outputs are float32.
    """

    symbols: int
    mels: int
    speakers: int = 0
    width: int = 192
    depth: int = 6
    heads: int = 2
    mlp_ratio: int = 4
    mlp_kernel: int = 3
    prenet_layers: int = 3
    prenet_kernel: int = 5
    duration_width: int = 256
    dropout: float = 0.1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        text: jax.Array,
        text_length: jax.Array,
        speaker: jax.Array | None = None,
        train: bool = False,
    ) -> tuple[jax.Array, jax.Array]:
        """Evaluates the encoder. What stands at padding does not change the rest.

        Args:
          text: int `[B, L]`; a symbol outside 0..symbols gives NaN.
          text_length: int `[B]`.
          speaker: int `[B]`, or None for a single voice.
          train: whether dropout is on.
        Returns:
          `(mean [B, L, M], log_duration [B, L])`, float32, zero at padding.
        Raises:
          ValueError: a field, shape, dtype or condition does not fit.
        """
        dtype = self._check_fields()
        text, text_length, speaker = self._check_inputs(text, text_length, speaker)
        length = text.shape[1]
        mask = jnp.arange(length)[None] < text_length[:, None]
        keep = mask[..., None].astype(dtype)

        h = Lookup(self.symbols + 1, self.width, self.width**-0.5, dtype, name="symbol")(text)
        start = h = h * keep
        for i in range(self.prenet_layers):
            h = nn.Conv(self.width, (self.prenet_kernel,), dtype=dtype, name=f"prenet_{i}")(h)
            h = nn.relu(LayerNorm(dtype=dtype, name=f"prenet_norm_{i}")(h))
            rate = 0.5 if self.dropout else 0.0
            h = nn.Dropout(rate, name=f"prenet_dropout_{i}")(h, deterministic=not train) * keep
        h = start + nn.Dense(self.width, kernel_init=zeros, dtype=dtype, name="prenet_out")(h)
        if speaker is not None:
            stddev = self.width**-0.5
            voice = Lookup(self.speakers, self.width, stddev, dtype, name="speaker")(speaker)
            h = h + voice[:, None]

        h = TransformerStack(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.dropout,
            dtype=dtype,
            mlp_kernel=self.mlp_kernel,
            name="blocks",
        )(h, None, rotary_angles(length, self.width // self.heads), train, mask)
        h = LayerNorm(dtype=dtype, name="norm")(h) * keep

        mean = nn.Dense(self.mels, name="mean")(h.astype(jnp.float32))
        d = jax.lax.stop_gradient(h)
        for i in range(2):
            d = nn.Conv(self.duration_width, (3,), dtype=dtype, name=f"duration_{i}")(d)
            d = LayerNorm(dtype=dtype, name=f"duration_norm_{i}")(nn.relu(d))
            d = nn.Dropout(self.dropout, name=f"duration_dropout_{i}")(d, deterministic=not train)
            d = d * keep
        log_duration = nn.Dense(1, name="duration_out")(d.astype(jnp.float32))[..., 0]
        return jnp.where(mask[..., None], mean, 0.0), jnp.where(mask, log_duration, 0.0)

    def _check_fields(self):
        check_positive(
            "text_encoder",
            **{
                name: getattr(self, name)
                for name in (
                    *("symbols", "mels", "width", "depth", "heads", "mlp_ratio", "mlp_kernel"),
                    *("prenet_layers", "prenet_kernel", "duration_width"),
                )
            },
        )
        check_divides("text_encoder", "heads", self.heads, "width", self.width)
        check_rate("text_encoder", "dropout", self.dropout)
        return check_dtype("text_encoder", self.dtype)

    def _check_inputs(self, text, text_length, speaker):
        text, text_length = jnp.asarray(text), jnp.asarray(text_length)
        if text.ndim != 2 or not jnp.issubdtype(text.dtype, jnp.integer):
            raise ValueError(f"text_encoder: text must be integers [B, L], got {_told(text)}")
        batch = text.shape[0]
        if text_length.shape != (batch,):
            raise ValueError(
                f"text_encoder: text_length must be [B] = ({batch},), got {_told(text_length)}"
            )
        if not self.speakers:
            return text, text_length, None
        if speaker is None:
            raise ValueError(
                f"text_encoder: speaker is missing; the network has {self.speakers} speakers"
            )
        speaker = jnp.asarray(speaker)
        if speaker.shape != (batch,) or not jnp.issubdtype(speaker.dtype, jnp.integer):
            raise ValueError(
                f"text_encoder: speaker must be integers [B] = ({batch},), got {_told(speaker)}"
            )
        return text, text_length, speaker


def _told(x):
    return f"{x.dtype} {x.shape}"
