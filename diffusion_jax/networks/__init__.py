"""Networks (flax.linen), all but `tts` with the call `(x, t, *, label=None, source=None, train=False)`.

| name                | input                     | output                       |
|---------------------|---------------------------|------------------------------|
| `mlp`               | points [B, D]             | [B, out_features]            |
| `unet`, `dit`       | images [B, H, W, C]       | [B, H, W, out_channels]      |
| `uvit`              | images [B, H, W, C]       | [B, H, W, out_channels]      |
| `song_unet`         | images [B, H, W, C]       | [B, H, W, out_channels]      |
| `adm_unet`          | images [B, H, W, C]       | [B, H, W, out_channels]      |
| `edm2_unet`         | images [B, H, W, C]       | [B, H, W, out_channels]      |
| `token_transformer` | tokens [B, L]             | logits [B, L, V]             |
| `ddit`, `smdm`      | tokens [B, L]             | logits [B, L, V]             |
| `tts`               | text and spectrogram      | see `networks.speech`          |

`t` is a scalar or [B]. `label` is [B] with values 0..num_classes, where `num_classes` (like None)
is the null class. A `token_transformer` that attends causally or by blocks also takes `clean` tokens
beside noisy ones, or a key-value `cache` (`visibility`). Dropout draws from the collection "dropout".
`InceptionV3` and `GPT2` judge samples and have calls of their own.
Parameters and outputs are float32; the field `dtype` chooses the compute dtype. Every network is zero at
initialisation but `uvit` and `song_unet`, which begin as their authors' do.
"""

from diffusion_jax.networks.adm_unet import ADMUNet
from diffusion_jax.networks.ddit import DDiT
from diffusion_jax.networks.dit import DiT
from diffusion_jax.networks.edm2_unet import EDM2UNet
from diffusion_jax.networks.gpt2 import GPT2
from diffusion_jax.networks.inception import InceptionV3
from diffusion_jax.networks.mlp import MLP
from diffusion_jax.networks.smdm import SMDM
from diffusion_jax.networks.song_unet import SongUNet
from diffusion_jax.networks.speech import TextToSpectrogram, tts
from diffusion_jax.networks.text_encoder import TextEncoder
from diffusion_jax.networks.token_transformer import TokenTransformer
from diffusion_jax.networks.unet import UNet
from diffusion_jax.networks.uvit import UViT

__all__ = [
    "GPT2",
    "MLP",
    "SMDM",
    "ADMUNet",
    "DDiT",
    "DiT",
    "EDM2UNet",
    "InceptionV3",
    "SongUNet",
    "TextEncoder",
    "TextToSpectrogram",
    "TokenTransformer",
    "UNet",
    "UViT",
    "tts",
]
