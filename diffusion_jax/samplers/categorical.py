"""Drawing tokens from logits: the inverse distribution function of one uniform a token.

The usual way, argmax of logits plus Gumbel noise, is cut off where the noise is: 23-bit uniforms give
none above 16, so rare tokens, and all of them where the mask is one more class, come up too seldom: the
samples are colder than the model (arXiv 2409.02908). It also takes V random numbers a token. Here a
uniform is compared with the cumulative probabilities, whose rounding moves mass of about 1e-7 in float32
from neighbour to neighbour and none from the tail to the head.
"""

import dataclasses
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import is_concrete, pytree_dataclass, static
from diffusion_jax.registry import check_choice

NUCLEUS_RULES = ("cover", "crossing", "below")
PRECISIONS = ("float32", "float64")
_ONE_LEVEL = 64


@pytree_dataclass
class Draw:
    """How a token is drawn from logits; see `build_draw`."""

    temperature: Any = 1.0
    nucleus: Any = None
    top_k: int | None = static(None)
    nucleus_rule: str = static("cover")
    precision: str = static("float32")

    @property
    def filters(self) -> bool:
        """Whether some tokens are ruled out."""
        return self.nucleus is not None or self.top_k is not None

    def uniforms(self, keys, shape) -> jax.Array:
        """Uniforms in [0, 1) of this precision, `[B, *shape]`, one key an example."""
        dtype = jnp.dtype(self.precision)
        return jax.vmap(lambda key: jax.random.uniform(key, shape, dtype))(keys)


def build_draw(**options: Any) -> Draw:
    """A `Draw`, checked.

    Args:
      temperature: divides the logits; 0 takes the most probable token.
      nucleus: keeps the most probable tokens of this mass, in (0, 1]; None keeps all.
      nucleus_rule: what becomes of the token that crosses the mass p: "cover" keeps the smallest set of
        mass at least p (MD4), "crossing" the token whose predecessors have at most p (RADD), "below" only
        tokens up to a mass of p, the first always (ReMDM).
      top_k: keeps this many of the most probable tokens; None keeps all.
      precision: "float32", or "float64", which needs `jax.enable_x64`.
    Raises:
      ValueError: an unknown option or a bad value.
    """
    valid = [name for name in inspect.signature(Draw).parameters]
    for name in options:
        check_choice("option of a token sampler", name, valid)
    draw = Draw(**options)
    if is_concrete(draw.temperature) and draw.temperature < 0:
        raise ValueError(f"temperature must be 0 or positive, got {draw.temperature}")
    if is_concrete(draw.nucleus) and not 0.0 < draw.nucleus <= 1.0:
        raise ValueError(f"nucleus must lie in (0, 1], got {draw.nucleus}")
    if draw.top_k is not None and (not isinstance(draw.top_k, int) or draw.top_k < 1):
        raise ValueError(f"top_k must be a positive int or None, got {draw.top_k!r}")
    check_choice("nucleus_rule", draw.nucleus_rule, NUCLEUS_RULES)
    check_choice("precision", draw.precision, PRECISIONS)
    if draw.precision == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("precision='float64' needs jax.config.update('jax_enable_x64', True)")
    numbers = {"temperature": np.asarray(draw.temperature)} if is_concrete(draw.temperature) else {}
    return dataclasses.replace(draw, **numbers)


def inverse_cdf(weights, uniform):
    """Categories int32 `[...]` of weights `[..., V]` by uniforms `[...]` in [0, 1).

    The category is the first whose cumulative weight exceeds uniform times the total; one of weight 0 is
    never drawn. Two levels, blocks and then the members of one, make it one pass over the weights.

    Args:
      weights: non-negative, not all zero; they need not sum to 1.
    """
    size = weights.shape[-1]
    if size <= _ONE_LEVEL:
        return _first_above(weights, uniform * weights.sum(axis=-1))
    width = math.isqrt(size - 1) + 1
    blocks = -(-size // width)
    padding = [(0, 0)] * (weights.ndim - 1) + [(0, blocks * width - size)]
    grouped = jnp.pad(weights, padding).reshape(*weights.shape[:-1], blocks, width)
    mass = grouped.sum(axis=-1)
    target = uniform * mass.sum(axis=-1)
    block = _first_above(mass, target)
    before = jnp.where(jnp.arange(blocks) < block[..., None], mass, 0.0).sum(axis=-1)
    members = jnp.take_along_axis(grouped, block[..., None, None], axis=-2)[..., 0, :]
    return block * width + _first_above(members, target - before)


def _first_above(weights, target):
    """The first index whose cumulative weight exceeds `target`; the last of positive weight at most."""
    cumulative = jnp.cumsum(weights, axis=-1)
    top = cumulative[..., -1]
    below_top = jnp.nextafter(top, jnp.zeros_like(top))
    bounded = jnp.clip(target, 0.0, below_top)
    return (cumulative <= bounded[..., None]).sum(axis=-1, dtype=jnp.int32)


def _wide(logits, draw):
    return logits.astype(jnp.promote_types(logits.dtype, jnp.dtype(draw.precision)))


def _filtered(logits, draw):
    """Logits over the temperature, -inf where a filter rules a token out."""
    temperature = jnp.asarray(draw.temperature, logits.dtype)
    logits = logits / jnp.where(temperature > 0, temperature, 1.0)
    if not draw.filters:
        return logits
    top_k = None if draw.top_k is None else min(draw.top_k, logits.shape[-1])
    if draw.nucleus is None:
        kept = jax.lax.top_k(logits, top_k)[1]
        return jnp.where(_marked(kept, True, logits.shape), logits, -jnp.inf)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ordered = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    reached = jnp.cumsum(ordered, axis=-1)
    before = reached - ordered
    limit = jnp.asarray(draw.nucleus, logits.dtype)
    within = {
        "cover": before < limit,
        "crossing": before <= limit,
        "below": reached <= limit,
    }[draw.nucleus_rule]
    within = within.at[..., 0].set(True)
    within |= limit >= 1.0  # sums may round to 1 too soon
    if top_k is not None:
        within &= jnp.arange(logits.shape[-1]) < top_k
    return jnp.where(_marked(order, within, logits.shape), logits, -jnp.inf)


def _marked(index, values, shape):
    """bool `shape`: `values` at the places `index` `[..., n]` of the last axis, False elsewhere."""
    index = index.reshape(-1, index.shape[-1])
    values = jnp.broadcast_to(values, index.shape) if isinstance(values, bool) else values
    fill = jax.vmap(lambda row, i, v: row.at[i].set(v, unique_indices=True))
    empty = jnp.zeros((index.shape[0], shape[-1]), bool)
    return fill(empty, index, values.reshape(index.shape)).reshape(shape)


def filtered_log_probs(logits, draw: Draw):
    """Log-probabilities `[..., V]` after temperature, top-k and nucleus (temperature 0: one-hot)."""
    filtered = _filtered(_wide(logits, draw), draw)
    greedy = jax.nn.one_hot(jnp.argmax(filtered, axis=-1), logits.shape[-1], dtype=filtered.dtype)
    cold = jnp.asarray(draw.temperature) > 0
    return jnp.where(cold, jax.nn.log_softmax(filtered, axis=-1), jnp.log(greedy))


def draw_tokens(uniform, logits, draw: Draw):
    """Tokens int32 `[...]` from logits `[..., V]` of any dtype by uniforms `[...]` (`Draw.uniforms`)."""
    filtered = _filtered(_wide(logits, draw), draw)

    def drawn():
        weights = jnp.exp(filtered - filtered.max(axis=-1, keepdims=True))
        return inverse_cdf(weights, uniform.astype(weights.dtype))

    def likeliest():
        return jnp.argmax(filtered, axis=-1).astype(jnp.int32)

    # not `where`: on a CPU the argmax takes longer than the draw
    return jax.lax.cond(jnp.asarray(draw.temperature) > 0, drawn, likeliest)


def logit_rows(logits, position):
    """Rows `[B, n, V]` of logits `[B, L, V]`, an array or `denoisers.LogitRows`, at int `[B, n]`."""
    if hasattr(logits, "rows"):
        return logits.rows(position)
    return jnp.take_along_axis(logits, position[..., None], axis=1, mode="clip")


def draw_where(uniform, logits, where, draw: Draw, tokens, most: int = 8):
    """`tokens` with new draws at the positions `where`; the work grows with their number only.

    Args:
      uniform: `[B, L]`.
      logits: `[B, L, V]`, an array or `denoisers.LogitRows`.
      where: bool `[B, L]`.
      tokens: int `[B, L]`, kept elsewhere.
      most: positions of a sequence drawn at a time (a loop runs until all are).
    """
    batch, length = tokens.shape
    most = min(most, length)
    count = where.sum(axis=1)
    order = jnp.argsort(~where, axis=1, stable=True)  # the positions to draw come first
    order = jnp.pad(order, ((0, 0), (0, -length % most)), constant_values=length)
    rows = jnp.arange(batch)[:, None]

    def chunk(state):
        begin, tokens = state
        place = jax.lax.dynamic_slice_in_dim(order, begin, most, axis=1)
        drawn = draw_tokens(
            jnp.take_along_axis(uniform, place, axis=1, mode="clip"),
            logit_rows(logits, place),
            draw,
        )
        wanted = (begin + jnp.arange(most)) < count[:, None]
        place = jnp.where(wanted, place, length)  # out of range: dropped
        return begin + most, tokens.at[rows, place].set(drawn.astype(tokens.dtype), mode="drop")

    return jax.lax.while_loop(lambda s: s[0] < count.max(), chunk, (0, tokens))[1]
