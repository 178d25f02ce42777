"""DDiT: the transformer of SEDD, MDLM and RADD, layer for layer, with their parameter counts.

SEDD (arXiv 2310.16834), MDLM (2406.07524), RADD (2406.03736); BD3LM (2503.09573), UDLM (2412.10193) and
others train MDLM's. With e the tokens' vectors and s the noise level sigma_bar = -log alpha:

  c = SiLU(W2 SiLU(W1 f(s)))                f: 256 cosines and sines; SEDD
  c = SiLU(W2 SiLU(W1 f(0)))                the same network, told nothing: MDLM, BD3LM
  no c, and no modulation                   RADD, MDLM's autoregressive baseline
  x = x + gate(c) F(LN(x) (1 + scale(c)) + shift(c))

The norms have a gain and no bias, but RADD's have both; the attention has rotary positions and no
biases, the MLP a GELU by tanh. Linear layers begin as PyTorch's, the modulations and the output layer at zero,
RADD's norms with biases of one.

What the authors do with the output belongs to objectives and samplers here: SEDD's scaling by the noise
level to `methods.score_entropy`, the mask's logit of minus infinity and the copied tokens of MDLM to those of
masked models, which read nothing but the logits of clean tokens at masked positions. So the mask's logit is
left out unless `mask_logit` asks for it.

In bfloat16 the tokens' vectors and their sums stay float32, as under the authors' autocast. Deviations:
logits are not rounded to bfloat16; labels, which the authors' networks do not have, are added to the second
layer of c. The parameters of the blocks are stacked on a leading axis.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import ones

from diffusion_jax.networks.checks import check_inputs, check_positive
from diffusion_jax.networks.layers import (
    TORCH,
    BlockStyle,
    Condition,
    Lookup,
    OutputDense,
    wide,
)
from diffusion_jax.networks.token_transformer import TokenTransformer
from diffusion_jax.registry import register

_SMALL = {"width": 768, "depth": 12, "heads": 12}
_MEDIUM = {"width": 1024, "depth": 24, "heads": 16}
_TINY = {"width": 512, "depth": 8, "heads": 8}
_MDLM = {"time_conditioned": False, "dropout": 0.1}
_RADD = {"time_conditioned": False, "modulated": False, "dropout": 0.02}

SIZES = {
    "sedd-small": {**_SMALL, "dropout": 0.1},
    "sedd-medium": {**_MEDIUM, "dropout": 0.1},
    "sedd-small-uniform": {**_SMALL, "dropout": 0.1, "mask_token": False},
    "mdlm-tiny": {**_TINY, **_MDLM},
    "mdlm-small": {**_SMALL, **_MDLM},
    "radd-small": {**_SMALL, **_RADD},
    "radd-medium": {**_MEDIUM, **_RADD},
}


@register("network", "ddit", input="tokens", official=True, paper="2310.16834", sizes=SIZES)
class DDiT(TokenTransformer):
    """The transformer of SEDD, MDLM and RADD: tokens to logits over the clean tokens.

    `t` is the total noise sigma_bar = -log alpha; methods hand it over because of `time_input`. Attention by
    blocks, causal attention, caches and `hidden` are those of `TokenTransformer`.

    Args:
      vocab_size, max_length, num_classes, attention, block_size, attention_implementation, remat, dtype: as of
        `TokenTransformer`.
      width, depth, heads, mlp_ratio, dropout: by default SEDD small's; `SIZES` has the published ones.
      time_conditioned: False tells c that the noise is 0, whatever it is, as MDLM.
      modulated: False leaves c out, as RADD; without time alone. Labels bring it back.
      norm_bias: whether norms have a bias; None: where c is left out, as RADD.
      condition_width: of c.
      mask_token: False for networks of uniform noise, which know no mask: V rows instead of V + 1.
      mask_logit: return the mask's logit behind the V of the clean tokens, as the authors' networks do.
      time_features: number of sinusoidal features of the noise.
      time_scale: factor on it.
    Shapes: x int [B, L] with values 0..V (0..V - 1 without mask), or weights of the tokens; t real scalar or
      [B]; label int [B]. Logits float32 [B, L, V], with `mask_logit` [B, L, V + 1].
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    dropout: float = 0.1
    time_features: int = 256
    time_scale: float = 1.0
    modulated: bool = True
    norm_bias: bool | None = None
    condition_width: int = 128
    mask_token: bool = True
    mask_logit: bool = False

    _network = "ddit"

    @property
    def time_input(self) -> str:
        """What methods tell as t, see `methods.base.Network`."""
        return "total_noise" if self.time_conditioned else "time"

    @property
    def states(self) -> int:
        """Number of values that a token may take: rows of the tokens' table and of the output layer."""
        return self.vocab_size + self.mask_token

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have a bias."""
        told = self.modulated or bool(self.num_classes)
        return not told if self.norm_bias is None else self.norm_bias

    def _enter(self, x, t, label, source, train, dtype):
        layout = "weights" if jnp.issubdtype(x.dtype, jnp.floating) else "tokens"
        x, t, label, _ = check_inputs(
            "ddit",
            layout,
            x,
            t,
            label=label,
            source=source,
            num_classes=self.num_classes,
            uses_time=self.time_conditioned,
            train=train,
        )
        if self.modulated and not self.time_conditioned:
            t = jnp.zeros(x.shape[:1], jnp.float32)
        condition = Condition(
            self.condition_width,
            self.num_classes,
            self.time_features,
            self.time_scale,
            dtype,
            linear_init=TORCH,
            name="condition",
        )(t, label)
        return x, None if condition is None else nn.silu(condition)

    def _table(self, stddev, dtype):
        def within(key, shape, dtype):  # PyTorch's kaiming_uniform_(a=sqrt(5))
            return jax.random.uniform(key, shape, dtype, -stddev, stddev)

        kept = wide(dtype)  # and with it the sums of all blocks
        return Lookup(self.states, self.width, stddev, kept, table_init=within, name="tokens")

    def _style(self):
        return BlockStyle(
            epsilon=1e-5,
            gain=True,
            shift=self.has_norm_bias,
            shift_init=ones,
            qkv_bias=False,
            out_bias=False,
            activated=True,
            identity=False,
            init=TORCH,
        )

    def _input_dropout(self):
        return 0.0

    @nn.nowrap
    def _head(self, name=None):
        own = super()._head()
        only = None if self.mask_logit else self.vocab_size
        return OutputDense(self.states, own.dtype, only, name=name)

    def _check_fields(self):
        dtype = super()._check_fields()
        check_positive("ddit", condition_width=self.condition_width)
        if self.time_conditioned and not self.modulated:
            raise ValueError("ddit: modulated=False needs time_conditioned=False")
        if not self.mask_token and (self.attention != "full" or self.mask_logit):
            raise ValueError(
                f"ddit: attention {self.attention!r} with mask_logit={self.mask_logit} needs "
                "mask_token=True"
            )
        return dtype
