"""First-hitting sampling of masked models (Zheng et al., arXiv 2409.02908, section 4).

The mask rate lam at which a position is revealed is uniform in (0, lam_0), independently for all: with n
masks left at rate lam the next reveal happens at lam u^(1/n), u uniform, at a position chosen uniformly.
Drawing one uniform a position and sorting them is the same law, and shows everything beforehand.
  (1) One call a reveal: the result follows the model's law exactly, in as many calls as there are masks.
      Ancestral sampling reaches this law as its steps grow.
  (2) Several reveals a call (the paper's parallel decoding): positions of one call are drawn independently
      of each other, all from the network's output p_k at the first of their times.
  (3) order=2. The paper names variants of high order, by extrapolation and predictor-corrector; there is
      no published code, and what follows is derived here. Two positions of one call miss their dependence,
      two positions of neighbouring calls have it; the latter are given more of it, in the same amount:
        q_k = (1 + w_k) p_k - w_k p_{k-1},   floored at p_k / 10 and normalised,
      where p_k - p_{k-1} is what the tokens of call k-1 taught. With m_k positions in call k,
        w_k = [m_{k-1} (m_{k-1} - 1) / 2] / (m_{k-1} m_k)    (and the pairs of the last call, at the last):
      every pair of positions then carries its dependence once on average over the random order. That is
      the second-order condition of the trapezoidal rule for tau-leaping (arXiv 2502.00234), with the calls
      that are made anyway. The marginals stay, since p_k is a martingale. On a joint table of 4^5
      sequences, exact conditionals, 3 calls: total variation 0.111 -> 0.051, KL divergence 0.046 -> 0.015.

Deviations: bd3lms, the one public code, draws the times while sampling and takes one sequence at a time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import fold_all
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.categorical import (
    build_draw,
    draw_tokens,
    filtered_log_probs,
    inverse_cdf,
    logit_rows,
)
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    check_absorbing,
    check_ends_masked,
    check_length,
    check_logits,
    result,
)

_FLOOR = 0.1  # of p_k: no token of the model's support is lost


class HittingState(NamedTuple):
    """Scan state: positions sorted by the mask rate at which they are revealed.

    Attributes:
      x: int tokens `[B, L]`.
      mask_rate: `[B]`, of the last call.
      order: int32 `[B, L]`, masked positions by falling rate, then the others.
      rates: `[B, L]`, in that order.
      uniform: `[B, L]`, which category each becomes, in that order.
      count: int32 `[B]`, masked positions at the start.
      before: `[B, m, V]`, order 2: what the last call said of the positions of the next; else None.
    """

    x: Any
    mask_rate: Any
    order: Any
    rates: Any
    uniform: Any
    count: Any
    before: Any


def _revealed(calls, num_steps, count, upto):
    """Positions revealed in the first `calls` calls, int `[B]`, of `count` masked ones."""
    if upto is not None:
        shown = jnp.where(calls > 0, upto[jnp.maximum(calls - 1, 0)], 0)
    else:  # spread evenly; one a call where there are calls enough
        shown = jnp.maximum(calls, -(-calls * count // num_steps))
    return jnp.minimum(shown, count)


class _Start(NamedTuple):
    vocab_size: int
    most: int
    order: int

    def __call__(self, rng, start, tokens):
        keys, shape = rng(), tokens.shape[1:]
        masked = tokens == self.vocab_size
        bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(fold_all(keys, 0))
        order = jnp.lexsort((bits, ~masked), axis=1).astype(jnp.int32)  # small bits: high rates
        dtype = jnp.result_type(float)
        first = jnp.asarray(start["rate"], dtype)
        sorted_bits = jnp.take_along_axis(~bits, order, axis=1).astype(dtype)
        uniform = start["draw"].uniforms(fold_all(keys, 1), shape)
        before = None
        if self.order == 2:
            wide = (tokens.shape[0], self.most, self.vocab_size)
            before = jnp.zeros(wide, uniform.dtype)
        return HittingState(
            tokens,
            jnp.full(tokens.shape[:1], first),
            order,
            first * (sorted_bits + 0.5) * 2.0**-32,
            jnp.take_along_axis(uniform, order, axis=1),
            masked.sum(axis=1, dtype=jnp.int32),
            before,
        )


class _Step(NamedTuple):
    vocab_size: int
    most: int
    num_steps: int
    order: int
    even: bool

    def _group(self, state, calls, upto):
        """Where a call's positions stand in the order, `[B, m]`, and how many there are, `[B]`."""
        begin, end = (_revealed(n, self.num_steps, state.count, upto) for n in (calls, calls + 1))
        place = begin[:, None] + jnp.arange(self.most)
        return jnp.minimum(place, state.x.shape[1] - 1), end - begin

    def __call__(self, call, rng, state, inputs):
        number, draw, process = inputs["number"], inputs["draw"], inputs["process"]
        upto = None if self.even else inputs["upto"]
        tokens = state.x
        place, size = self._group(state, number, upto)

        def of(values, place):
            return jnp.take_along_axis(values, place, axis=1)

        position = of(state.order, place)
        wanted = jnp.arange(self.most) < size[:, None]
        wanted &= of(tokens, position) == self.vocab_size  # a hook may have filled it in
        rate = jnp.where(size > 0, of(state.rates, place)[:, 0], state.mask_rate)
        point = {"t": process.t_of_mask_rate(rate), "alpha": 1.0 - rate, "mask_rate": rate}

        def use(logits):
            check_logits(logits, tokens, self.vocab_size)
            rows, before = logit_rows(logits, position), None
            if self.order == 1:
                drawn = draw_tokens(of(state.uniform, place), rows, draw)
            else:
                probs = jnp.exp(filtered_log_probs(rows, draw))
                weight = self._weight(state, number, upto, size)[:, None, None]
                bent = (1.0 + weight) * probs - weight * state.before
                bent = jnp.maximum(bent, _FLOOR * probs)
                drawn = inverse_cdf(bent, of(state.uniform, place).astype(bent.dtype))
                following = of(state.order, self._group(state, number + 1, upto)[0])
                before = jnp.exp(filtered_log_probs(logit_rows(logits, following), draw))
                before = before.astype(state.before.dtype)
            where = jnp.where(wanted, position, tokens.shape[1])  # out of range: dropped
            fill = jax.vmap(lambda x, at, new: x.at[at].set(new, mode="drop"))
            return fill(tokens, where, drawn.astype(tokens.dtype)), before

        kept = (tokens, state.before)
        x, before = call.when(wanted.any(), tokens, point, use, kept, rows=True)
        return state._replace(x=x, mask_rate=rate, before=before), None

    def _weight(self, state, number, upto, size):
        """w_k of eq. (3), `[B]`."""
        last = self._group(state, number - 1, upto)[1]
        missed = last * (last - 1)
        ends = _revealed(number + 1, self.num_steps, state.count, upto) == state.count
        missed = missed + jnp.where(ends, size * (size - 1), 0)
        weight = 0.5 * missed / jnp.maximum(last * size, 1)
        return jnp.where(number > 0, weight, 0.0).astype(state.before.dtype)


def _check_sizes(sizes, length, num_steps):
    if sizes is None:
        return None
    sizes = np.asarray(sizes)
    if sizes.ndim != 1 or sizes.dtype.kind not in "iu" or (sizes < 1).any():
        raise ValueError(f"sizes must be positive ints, got {sizes.tolist()}")
    if sizes.sum() != length or num_steps not in (None, len(sizes)):
        wanted = "" if num_steps is None else f" in {num_steps} calls"
        raise ValueError(f"sizes {sizes.tolist()} do not reveal {length} positions{wanted}")
    return sizes


@register(
    "sampler", "first_hitting", family="discrete", paper="2409.02908", calls="length", parallel=True
)
def first_hitting(
    process,
    length: int,
    num_steps: int | None = None,
    *,
    order: int = 1,
    sizes: Sequence[int] | None = None,
    **drawing,
) -> Sampler:
    """First-hitting sampler: exact with one call a token, parallel with fewer (see the module).

    A sequence with fewer masks than calls is finished earlier, and calls in which none has any left are
    not made; hooks see no logits.

    Equivalences: with `length` calls, any-order autoregression in a random order.

    Args:
      process: an `Absorbing` process.
      length: sequence length L; `x_init` is a number of sequences or tokens `[B, L]` to infill.
      num_steps: calls, at most L (default); fewer reveal several positions each, as evenly as can be.
      order: 1, or 2 for the extrapolated probabilities of eq. (3), which keep `[B, m, V]` numbers.
      sizes: positions revealed by each call, summing to L, in place of an even spread.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, one that does not mask nearly all tokens at t = 1, a bad
        length, num_steps, order or sizes, an unknown or bad option.
    """
    if length is None:
        raise ValueError("first_hitting needs the sequence length")
    check_absorbing(process)
    check_length(length)
    check_ends_masked(process)
    check_choice("order", order, (1, 2))
    length = int(length)
    sizes = _check_sizes(sizes, length, num_steps)
    calls = length if num_steps is None else num_steps
    calls = calls if sizes is None else len(sizes)
    if isinstance(calls, bool) or not isinstance(calls, int | np.integer) or calls < 1:
        raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
    if calls > length:
        raise ValueError(f"{length} positions are revealed in at most {length} calls, not {calls}")
    calls = int(calls)
    most = -(-length // calls) if sizes is None else int(sizes.max())
    draw = build_draw(**drawing)
    # The times are drawn while sampling; what is known beforehand is their mean, L - k of L + 1.
    if sizes is None:
        shown = np.append(0, -(-np.arange(1, calls + 1) * length // calls))
    else:
        shown = np.append(0, np.cumsum(sizes))
    mean_rate = process.mask_rate(1.0) * (length - shown) / (length + 1.0)
    points = process.point(process.t_of_mask_rate(mean_rate))
    xs = {
        "point": {k: np.asarray(v)[:-1] for k, v in points.items()},
        "next": {k: np.asarray(v)[1:] for k, v in points.items()},
        "number": np.arange(calls, dtype=np.int32),
        "draw": jax.tree.map(lambda v: np.full(calls, v), draw),
        "process": jax.tree.map(lambda v: np.full(calls, v), process),
    }
    if sizes is not None:
        xs["upto"] = np.tile(shown[1:].astype(np.int32), (calls, 1))
    return Sampler(
        init=_Start(process.vocab_size, most, order),
        step=_Step(process.vocab_size, most, calls, order, sizes is None),
        finish=result,
        xs=xs,
        start={"rate": process.mask_rate(1.0), "draw": draw},
        nfe=calls,
        prepare=MaskedPrepare(process.vocab_size, length),
        stochastic=True,
        name="first_hitting",
    )
