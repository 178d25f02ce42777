"""Text to spectrogram: a text encoder and an image network over frames and mel channels.

The decoder is any image network of the library that takes a source: it sees x beside the encoder's
aligned output and the mask of the example's frames, 1 where there is one. Spectrograms are padded to a
size that its levels divide; `patch` x `patch` pixels become channels first (arXiv 2301.11093).
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks.checks import check_positive
from diffusion_jax.networks.features import patchify, unpatchify
from diffusion_jax.networks.text_encoder import TextEncoder
from diffusion_jax.registry import entry, names, register


class TextToSpectrogram(nn.Module):
    """Encoder and decoder, the parameters of one model. Built by `tts`.

    Args:
      encoder: `TextEncoder`.
      decoder: an image network with `patch**2` channels in and out and twice as many of source.
      speakers: number of speakers, 0 for a single voice.
      patch: side of the squares of the spectrogram that become channels.
      multiple: the decoder's sides must be divisible by this.
    """

    encoder: nn.Module
    decoder: nn.Module
    speakers: int = 0
    patch: int = 1
    multiple: int = 1

    def __call__(self, x, t, text, text_length, speaker=None):
        """Calls both parts once, for `init`: x `[B, T, M]`, t `[B]`, the rest as `encode`."""
        self.encode(text, text_length, speaker)
        mask = jnp.ones(x.shape[:2], bool)
        return self.decode(x, t, x, mask, speaker)

    def encode(self, text, text_length, speaker=None, train: bool = False):
        """`(mean [B, L, M], log_duration [B, L])`, see `TextEncoder`."""
        return self.encoder(text, text_length, speaker if self.speakers else None, train)

    def decode(self, x, t, source, mask, speaker=None, train: bool = False) -> jax.Array:
        """The network of a denoiser.

        Args:
          x: float `[B, T, M]`.
          t: float `[B]` or scalar.
          source: `[B, T, M]`, the encoder's output, one vector a frame.
          mask: bool `[B, T]`, True at an example's frames: elsewhere nothing is read, and zero comes
            out.
          speaker: int `[B]`, or None for a single voice.
          train: whether dropout is on.
        Returns:
          float32 `[B, T, M]`.
        """
        frames, mels = x.shape[1:]
        keep = mask[..., None].astype(x.dtype)
        shown = jnp.broadcast_to(keep, x.shape)
        side = self.patch * self.multiple
        rest = ((0, 0), (0, -frames % side), (0, -mels % side), (0, 0))
        planes = [jnp.pad(v[..., None], rest) for v in (x * keep, source * keep, shown)]
        size = planes[0].shape[1:3]
        x, *told = (patchify(v, self.patch).reshape(self._grid(v)) for v in planes)
        label = {"label": speaker} if self.speakers else {}
        y = self.decoder(x, t, source=jnp.concatenate(told, axis=-1), train=train, **label)
        y = unpatchify(y.reshape(y.shape[0], -1, y.shape[-1]), self.patch, *size)
        return y[:, :frames, :mels, 0] * keep

    def _grid(self, image):
        batch, height, width, _ = image.shape
        return batch, height // self.patch, width // self.patch, -1


@register("network", "tts", input="text", paper="2105.06337")
def tts(
    *,
    symbols: int,
    mels: int,
    speakers: int = 0,
    patch: int = 1,
    encoder: Mapping[str, Any] | None = None,
    decoder: Mapping[str, Any] | None = None,
) -> TextToSpectrogram:
    """Text encoder and decoder from their options.

    Args:
      symbols: number of the text's symbols, without padding.
      mels: channels of a spectrum.
      speakers: number of speakers, 0 for a single voice.
      patch: side of the squares of the spectrogram that become channels.
      encoder: arguments of `TextEncoder`.
      decoder: `name` of an image network, default "unet", and its arguments.
    Raises:
      ValueError: not an image network, or arguments that do not exist.
    """
    check_positive("tts", symbols=symbols, mels=mels, patch=patch)
    options = {"name": "unet", **(decoder or {})}
    name = options.pop("name")
    found = entry("network", name)
    if found.meta["input"] != "image":
        images = ", ".join(
            n for n in names("network") if entry("network", n).meta["input"] == "image"
        )
        raise ValueError(
            f"tts: the decoder must be an image network, got {name!r}; valid: {images}"
        )
    told = {
        "out_channels": patch**2,
        "source_channels": 2 * patch**2,
        "num_classes": speakers or None,
    }
    try:
        network = found.build(**{**told, **options})
        text_encoder = TextEncoder(symbols, mels, speakers, **(encoder or {}))
    except TypeError as error:
        raise ValueError(f"tts: {error}") from error
    levels = len(getattr(network, "channel_mults", (1,)))
    multiple = getattr(network, "patch_size", 2 ** (levels - 1))
    return TextToSpectrogram(text_encoder, network, speakers, patch, multiple)
