"""Networks (flax.linen), all but `tts` with the call `(x, t, *, label=None, source=None, train=False)`.

| name                | input                     | output                       |
|---------------------|---------------------------|------------------------------|
| `mlp`               | points [B, D]             | [B, out_features]            |
| `unet`, `dit`       | images [B, H, W, C]       | [B, H, W, out_channels]      |
| `token_transformer` | tokens [B, L]             | logits [B, L, V]             |
| `tts`               | text and spectrogram      | see `networks.speech`          |

`t` is a scalar or [B]. `label` is [B] with values 0..num_classes, where `num_classes` (like None)
is the null class. A `token_transformer` that attends causally or by blocks also takes `clean` tokens
beside noisy ones, or a key-value `cache` (`visibility`). Dropout draws from the collection "dropout".
Parameters and outputs are float32; the field `dtype` chooses the compute dtype. Every network is zero at
initialisation.
"""

from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.mlp import MLP
from diffusion_jax.networks.speech import TextToSpectrogram, tts
from diffusion_jax.networks.text_encoder import TextEncoder
from diffusion_jax.networks.token_transformer import TokenTransformer
from diffusion_jax.networks.unet import UNet

__all__ = ["MLP", "DiT", "TextEncoder", "TextToSpectrogram", "TokenTransformer", "UNet", "tts"]
