"""The network of SMDM (arXiv 2410.18514): Llama's transformer, without the causal mask.

Layer by layer: norms that divide by the root mean square, rotary positions, MLPs W3 (SiLU(W1 x) W2 x), no
biases, no time. 16 C^2 parameters a block, beside its norms. Deviation: branches and the output layer begin at
zero, the other layers at variance 1 / inputs, as everywhere in this library.
"""

import flax.linen as nn

from diffusion_jax.networks.checks import check_dtype
from diffusion_jax.networks.layers import BlockStyle, OutputDense
from diffusion_jax.networks.token_transformer import TokenTransformer
from diffusion_jax.registry import register

SIZES = {
    "170m": {"width": 768, "depth": 18, "heads": 12},
    "1b": {"width": 1792, "depth": 20, "heads": 14},
}


@register("network", "smdm", input="tokens", official=True, paper="2410.18514", sizes=SIZES)
class SMDM(TokenTransformer):
    """Llama's transformer over tokens, bidirectional or (the paper's baseline) causal.

    Fields, shapes and errors as `TokenTransformer`'s; time and labels, where they are given, modulate the norms.
    """

    width: int = 768
    depth: int = 18
    heads: int = 12
    max_length: int = 2048
    time_conditioned: bool = False

    _network = "smdm"

    def _style(self):
        return BlockStyle(
            epsilon=1e-5,
            rms=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            gated=True,
        )

    def _input_dropout(self):
        return 0.0

    @nn.nowrap
    def _head(self, name=None):
        dtype = check_dtype("smdm", self.dtype)
        return OutputDense(self.vocab_size, dtype, use_bias=False, name=name)
