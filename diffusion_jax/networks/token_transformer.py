"""Transformer over tokens, the network of masked, block and autoregressive models.

With time it is a DiT over tokens (SEDD, arXiv 2310.16834; MDLM, arXiv 2406.07524); without time it
is the network of RADD (arXiv 2406.03736): for absorbing processes the conditional of the clean
tokens does not depend on the time. `attention` makes it bidirectional, causal or block-causal, with a
key-value cache for the latter two; parameters are the same for all three.

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
    OWN_STYLE,
    Kept,
    KeyValues,
    LayerNorm,
    Lookup,
    Modulation,
    OutputDense,
    TransformerStack,
    wide,
)
from diffusion_jax.networks.visibility import block_limits, streams, up_to
from diffusion_jax.registry import check_choice, register

_POSITIONS = ("rotary", "learned", "axial", "none")
_ATTENTION = ("full", "causal", "block")


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
      positions: "rotary" (relative, arXiv 2104.09864), "learned" (absolute), "axial" (learned for the row
        plus learned for the column of a grid in row-major order) or "none" (a set).
      columns: of the grid, for "axial".
      time_conditioned: False ignores t, which may then be None.
      dropout: rate on the residual branches.
      num_classes: number of classes; None or 0 for an unconditional network.
      attention: "full", "causal" (the logits at position i are of the token there given those before it;
        the mask id stands at the beginning) or "block" (a position sees its own block and those before).
        The last two take no time: it would differ from position to position.
      block_size: tokens in a block of "block", or in a segment of "causal" with `clean` tokens.
      time_features: number of sinusoidal time features.
      time_scale: factor on t, see `features.time_features`.
      attention_implementation: see `layers.SelfAttention`.
      remat: what the blocks compute again in the backward pass instead of storing it, see `remat`.
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
    columns: int | None = None
    time_conditioned: bool = True
    dropout: float = 0.0
    num_classes: int | None = None
    attention: str = "full"
    block_size: int | None = None
    time_features: int = 64
    time_scale: float = 1000.0
    attention_implementation: str | None = None
    remat: bool | str = False
    dtype: Any = jnp.float32

    _network = "token_transformer"  # in messages

    @property
    def states(self) -> int:
        """Number of values that a token may take: V + 1, the mask is one."""
        return self.vocab_size + 1

    @nn.compact
    def __call__(
        self,
        x,
        t,
        *,
        label=None,
        source=None,
        clean=None,
        cache: KeyValues | None = None,
        begin=0,
        limit=None,
        train: bool = False,
        hidden: bool = False,
    ) -> Any:
        """Evaluates the network; uniform at initialisation.

        Args:
          clean: int [B, L], clean tokens beside the noisy x: a block of x is then seen with the clean
            tokens of the blocks before. Attention "causal" reads them causally (arXiv 2510.26583) and
            returns their logits behind those of x, [B, 2 L, V].
          cache: keys and values of earlier calls, see `init_cache`. x then holds what stands in the slots
            begin..begin + L - 1 (see `visibility`; nothing is shifted), all of them inside the cache.
          begin: int scalar, with a cache.
          limit: int [L], the last slot that each slot of x sees, with a cache.

        Returns:
          float32 logits [B, L, V], or with `hidden` what `logits` makes them of, [B, L, C]; with a
          cache `(logits, cache)`, the slots of x written.

        Raises:
          ValueError: a field, a shape, a dtype or a condition does not fit, see `checks`.
        """
        dtype = self._check_fields()
        x = jnp.asarray(x)
        weighted = jnp.issubdtype(x.dtype, jnp.floating)
        x, condition = self._enter(x, t, label, source, train, dtype)
        self._check_sequence(x)
        length = x.shape[1]
        told = clean is not None or cache is not None
        if self.attention == "full" and not told:
            slots, sees = None, None  # all of them
        else:
            x, slots, sees = self._arrange(x, clean, cache, begin, limit)

        stddev = self.width**-0.5  # vectors of about unit length
        style, embed = self._style(), self._table(stddev, dtype)
        h = embed.mean(x) if weighted else embed(x)
        angles = None
        if self.positions == "rotary":
            reach = length if slots is None else self._reach(length, clean, cache)
            angles = rotary_angles(reach, self.width // self.heads, dtype=wide(dtype))
            angles = angles if slots is None else angles[slots]
        elif self.positions in ("learned", "axial"):
            table = self._position_table(stddev)
            rows = table[None, :length] if slots is None else jnp.asarray(table)[slots][None]
            h = h + rows.astype(dtype)
        h = nn.Dropout(self._input_dropout(), name="input_dropout")(h, deterministic=not train)

        h = TransformerStack(
            self.depth,
            self.heads,
            self.mlp_ratio,
            self.dropout,
            self.attention_implementation,
            self.remat,
            dtype,
            style=style,
            name="blocks",
        )(
            h,
            condition,
            angles,
            train,
            sees=sees,
            kept=None if cache is None else Kept(cache, begin),
        )
        if cache is not None:
            h, cache = h
        if clean is not None and self.attention == "block":
            h = h[:, :length]

        h = LayerNorm(affine=condition is None, dtype=dtype, style=style, name="output_norm")(h)
        if condition is not None:
            shift, scale = Modulation(
                self.width, 2, dtype=dtype, activated=style.activated, name="output_modulation"
            )(condition)
            h = film(h, shift, scale)
        if not hidden:
            h = self._head("output")(h)
        return h if cache is None else (h, cache)

    def _enter(self, x, t, label, source, train, dtype):
        """x checked, and the condition [B, C], None where nothing is told."""
        layout = "weights" if jnp.issubdtype(x.dtype, jnp.floating) else "tokens"
        given = (x, t, label, source, train)
        return enter(self, self._network, layout, *given, width=self.width, dtype=dtype)

    def _table(self, stddev, dtype):
        """The tokens' vectors."""
        return Lookup(self.states, self.width, stddev, dtype, name="tokens")

    def _style(self):
        return OWN_STYLE

    def _input_dropout(self):
        return self.dropout

    @nn.nowrap
    def _head(self, name=None):
        """The last layer."""
        return OutputDense(self.vocab_size, check_dtype(self._network, self.dtype), name=name)

    @nn.nowrap
    def init_cache(self, batch_size: int, slots: int) -> KeyValues:
        """An empty cache: zeros, keys and values [depth, B, slots, heads, C / heads] each.

        Raises:
          ValueError: attention "full", where every slot sees the later ones too; more slots than there
            are learned positions.
        """
        if self.attention == "full":
            raise ValueError(f"{self._network}: attention 'full' cannot be cached")
        self._check_slots(slots)
        shape = (self.depth, batch_size, slots, self.heads, self.width // self.heads)
        zeros = jnp.zeros(shape, check_dtype(self._network, self.dtype))
        return KeyValues(zeros, zeros)

    def _arrange(self, x, clean, cache, begin, limit):
        """What is read, in which slots, and what they see: `(x [B, L'], slots int [L'], sees)`."""
        length = x.shape[1]
        if self.attention == "full":
            raise ValueError(f"{self._network}: clean and cache need attention 'causal' or 'block'")
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{self._network}: attention {self.attention!r} reads integer tokens")
        if cache is not None:
            if clean is not None or limit is None or limit.shape != (length,):
                raise ValueError(
                    f"{self._network}: a cache needs limit [L] = ({length},) and no clean tokens"
                )
            return x, begin + jnp.arange(length), up_to(limit, cache.key.shape[2])
        slots = jnp.arange(length)
        if clean is None and self.attention == "causal":
            return self._shifted(x), slots, "causal"
        if self.block_size is None:
            raise ValueError(
                f"{self._network}: block_size is missing; attention {self.attention!r} "
                "needs it here"
            )
        if clean is None:
            return x, slots, up_to(block_limits(slots, self.block_size), length)
        clean = jnp.asarray(clean)
        if clean.shape != x.shape or not jnp.issubdtype(clean.dtype, jnp.integer):
            raise ValueError(
                f"{self._network}: clean must be integers {x.shape}, got {clean.dtype} {clean.shape}"
            )
        block = slots // self.block_size
        before, clean = block * self.block_size, clean.astype(x.dtype)
        if self.attention == "block":
            both, limits, shift = (x, clean), block_limits(slots, self.block_size), 0
        else:  # clean slots are a place later than their tokens, and so is the noisy copy
            both, limits, shift = (x, self._shifted(clean)), slots, 1
        self._check_slots(length + shift)
        sees = streams(block, before + shift, limits)
        return jnp.concatenate(both, axis=1), jnp.concatenate([slots + shift, slots]), sees

    def _shifted(self, x):
        """Slots of a causal reading: the beginning, then all tokens but the last."""
        return jnp.concatenate([jnp.full_like(x[:, :1], self.vocab_size), x[:, :-1]], axis=1)

    def _position_table(self, stddev):
        """What is added to the tokens of each slot, `[max_length, width]`, of length about 1."""
        if self.positions == "learned":
            shape = (self.max_length, self.width)
            return self.param("positions", normal(stddev), shape, jnp.float32)
        slots = jnp.arange(self.max_length)
        draw, each = normal(stddev * 0.5**0.5), self.max_length // self.columns
        rows = self.param("rows", draw, (each, self.width), jnp.float32)
        columns = self.param("columns", draw, (self.columns, self.width), jnp.float32)
        return rows[slots // self.columns] + columns[slots % self.columns]

    def _reach(self, length, clean, cache):
        """How many slots there are."""
        if cache is not None:
            return cache.key.shape[2]
        return length + (clean is not None and self.attention == "causal")

    def _check_slots(self, slots):
        if self.positions in ("learned", "axial") and slots > self.max_length:
            raise ValueError(
                f"{self._network}: {slots} slots exceed max_length = {self.max_length}"
            )

    @nn.nowrap
    def logits(self, params, hidden) -> jax.Array:
        """The last layer alone: hidden states [..., C] -> float32 logits [..., V].

        For losses that go over the positions in pieces, so that [B, L, V] never exists at once.
        """
        return self._head().apply({"params": params["output"]}, hidden)

    def _check_fields(self):
        check_positive(
            self._network,
            vocab_size=self.vocab_size,
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            max_length=self.max_length,
        )
        check_divides(self._network, "heads", self.heads, "width", self.width)
        check_choice(f"{self._network}: positions", self.positions, _POSITIONS)
        if (self.positions == "axial") != (self.columns is not None):
            raise ValueError(
                f"{self._network}: positions='axial' and columns go together, got "
                f"{self.positions!r} and {self.columns}"
            )
        if self.columns is not None:
            check_positive(self._network, columns=self.columns)
            check_divides(self._network, "columns", self.columns, "max_length", self.max_length)
        check_choice(f"{self._network}: attention", self.attention, _ATTENTION)
        if self.attention != "full" and self.time_conditioned:
            raise ValueError(
                f"{self._network}: attention {self.attention!r} needs time_conditioned=False"
            )
        if self.block_size is not None or self.attention == "block":
            check_positive(self._network, block_size=self.block_size)
        check_rate(self._network, "dropout", self.dropout)
        return check_dtype(self._network, self.dtype)

    def _check_sequence(self, x):
        if x.shape[1] > self.max_length:
            raise ValueError(
                f"{self._network}: sequence length {x.shape[1]} exceeds max_length = "
                f"{self.max_length}"
            )
        if x.ndim == 3 and x.shape[2] not in (self.vocab_size, self.states):
            raise ValueError(
                f"{self._network}: token weights must have a last axis of "
                f"{' or '.join(map(str, range(self.vocab_size, self.states + 1)))}, got shape {x.shape}"
            )
