"""Bidirectional transformer over tokens, the network of masked and discrete diffusion.

With time it is a DiT over tokens (SEDD, arXiv 2310.16834; MDLM, arXiv 2406.07524); without time it
is the network of RADD (arXiv 2406.03736): for absorbing processes the conditional of the clean
tokens does not depend on the time.

Deviations: the label shares the conditioning vector with the time; without a condition the residual
branches start at zero; no scaling of the output by the noise level, which belongs to the objective.
The parameters of the blocks are stacked on a leading axis.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal

from diffusion_jax.networks.checks import (
    check_divides,
    check_dtype,
    check_positive,
    check_rate,
)
from diffusion_jax.networks.features import film, rotary_angles
from diffusion_jax.networks.inputs import enter
from diffusion_jax.networks.layers import (
    LayerNorm,
    Lookup,
    Modulation,
    OutputDense,
    TransformerStack,
)
from diffusion_jax.registry import check_choice, register

_POSITIONS = ("rotary", "learned", "none")


@register("network", "token_transformer", input="tokens")
class TokenTransformer(nn.Module):
    """Transformer from tokens to logits over the clean tokens.

    Args:
      vocab_size: V; tokens are 0..V-1 and V is the mask.
      width: of a token's vector, divisible by `heads`.
      depth: number of blocks.
      heads: attention heads.
      mlp_ratio: width of the MLPs over `width`.
      max_length: longest sequence.
      positions: "rotary" (relative, arXiv 2104.09864), "learned" (absolute) or "none" (a set).
      time_conditioned: False ignores t, which may then be None.
      dropout: rate on the residual branches.
      num_classes: number of classes; None or 0 for an unconditional network.
      time_features: number of sinusoidal time features.
      time_scale: factor on t, see `features.time_features`.
      attention_implementation: see `layers.SelfAttention`.
      remat: recompute the blocks in the backward pass instead of storing their insides.
      dtype: compute dtype; parameters and logits are float32.
    Shapes: x int [B, L] with values 0..V, L <= max_length, or float [B, L, V] or [B, L, V + 1],
      weights of the tokens (Bayesian flow, arXiv 2308.07037): a one-hot row is the token it marks.
      A token outside 0..V gives NaN. t real scalar or [B]; label int [B].
    """

    vocab_size: int
    width: int = 96
    depth: int = 4
    heads: int = 2
    mlp_ratio: int = 4
    max_length: int = 1024
    positions: str = "rotary"
    time_conditioned: bool = True
    dropout: float = 0.0
    num_classes: int | None = None
    time_features: int = 64
    time_scale: float = 1000.0
    attention_implementation: str | None = None
    remat: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x, t, *, label=None, source=None, train: bool = False) -> jax.Array:
        """Evaluates the network; uniform at initialisation.

        Returns:
          float32 logits [B, L, V].

        Raises:
          ValueError: a field, a shape, a dtype or a condition does not fit, see `checks`.
        """
        dtype = self._check_fields()
        x = jnp.asarray(x)
        weighted = jnp.issubdtype(x.dtype, jnp.floating)
        layout = "weights" if weighted else "tokens"
        x, condition = enter(
            self,
            "token_transformer",
            layout,
            x,
            t,
            label,
            source,
            train,
            width=self.width,
            dtype=dtype,
        )
        self._check_sequence(x)
        length = x.shape[1]

        stddev = self.width**-0.5  # vectors of about unit length
        embed = Lookup(self.vocab_size + 1, self.width, stddev, dtype, name="tokens")
        h = embed.mean(x) if weighted else embed(x)
        angles = None
        if self.positions == "rotary":
            angles = rotary_angles(length, self.width // self.heads)
        elif self.positions == "learned":
            table = self.param(
                "positions", normal(stddev), (self.max_length, self.width), jnp.float32
            )
            h = h + table[None, :length].astype(dtype)
        h = nn.Dropout(self.dropout, name="input_dropout")(h, deterministic=not train)

        h = TransformerStack(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.dropout,
            self.attention_implementation,
            self.remat,
            dtype,
            name="blocks",
        )(h, condition, angles, train)

        h = LayerNorm(affine=condition is None, dtype=dtype, name="output_norm")(h)
        if condition is not None:
            shift, scale = Modulation(self.width, 2, dtype=dtype, name="output_modulation")(
                condition
            )
            h = film(h, shift, scale)
        return OutputDense(self.vocab_size, dtype, name="output")(h)

    def _check_fields(self):
        check_positive(
            "token_transformer",
            vocab_size=self.vocab_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            max_length=self.max_length,
        )
        check_divides("token_transformer", "heads", self.heads, "width", self.width)
        check_choice("token_transformer: positions", self.positions, _POSITIONS)
        check_rate("token_transformer", "dropout", self.dropout)
        return check_dtype("token_transformer", self.dtype)

    def _check_sequence(self, x):
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"token_transformer: sequence length {x.shape[1]} exceeds max_length = "
                f"{self.max_length}"
            )
        if x.ndim == 3 and x.shape[2] not in (self.vocab_size, self.vocab_size + 1):
            raise ValueError(
                f"token_transformer: token weights must have a last axis of {self.vocab_size} or "
                f"{self.vocab_size + 1}, got shape {x.shape}"
            )
