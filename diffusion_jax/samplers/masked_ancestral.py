"""Ancestral sampling of masked models, with network calls only where something is revealed.

In step t -> s a masked token is revealed with probability u = (alpha_s - alpha_t) / (1 - alpha_t),
whatever the others do (MDLM, arXiv 2406.07524; MD4, 2406.04329). So the step at which a token is revealed
has a law of its own,
  (1) P(step k) = r_k = u_k prod_{j<k} (1 - u_j) = (lam_{t_k} - lam_{s_k}) / lam_{t_0},  lam = 1 - alpha,
and every token draws it beforehand with one uniform, and with a second one the number that will pick its
category (`categorical`). The steps draw nothing. What a step needs the network for is known too, so that
  (2) the expected number of steps in which a sequence of L tokens changes is sum_k 1 - (1 - r_k)^L
is the number of calls that it needs (RADD, arXiv 2406.03736, section 3.3, found by looking whether the
last step changed anything, which costs up to one call more: 1 + the changes of all steps but the last).

Deviations: RADD's cache serves a whole batch and is void as soon as one sequence changes. Here every
sequence walks its own list of steps, at times of its own: the calls of a batch are the largest number of
steps that one of its sequences needs, not the number of steps in which any changes. A network that looks
at the time profits alike, since outputs that reveal nothing are not used. The mask is not a class of the
categorical; `categorical="gumbel"` makes it one (`gumbel`), for comparison.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import LogitRows
from diffusion_jax.numerics import fold_all
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.categorical import build_draw, draw_where
from diffusion_jax.samplers.gumbel import check_bits, draw_joint
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    TokenState,
    check_absorbing,
    check_ends_masked,
    check_length,
    check_logits,
    result,
)

RATES = ("analytic", "euler")


class RevealState(NamedTuple):
    """Scan state of planned reveals.

    A hook that masks tokens again says in `step` when they are to be revealed, and uses a sampler with
    `cached=False`: the cached one has as many steps as the tokens of a sequence have reveals.

    Attributes:
      x: int tokens `[B, L]`.
      step: int32 `[B, L]`, the step of the time grid that reveals a position.
      uniform: `[B, L]`, which category it then becomes.
      points: the grid, `Point`s stacked `[N + 1]`.
      at: int32 `[B]`, the step of the grid that each sequence made last.
    """

    x: Any
    step: Any
    uniform: Any
    points: Any
    at: Any


def reveal_probabilities(process, times, rate: str = "analytic") -> np.ndarray:
    """The chance u_k that a masked token is revealed in step k, `[N]` float64; the last is 1.

    Args:
      process: an `Absorbing` process.
      times: decreasing, `[N + 1]`.
      rate: "analytic", `(alpha_s - alpha_t) / (1 - alpha_t)` (Tweedie tau-leaping, SEDD and RADD), or
        "euler", `(t - s) (-alpha'_t) / (1 - alpha_t)`, no more than 1. Equal where alpha is linear.
    """
    check_choice("rate", rate, RATES)
    t, s = np.asarray(times[:-1], np.float64), np.asarray(times[1:], np.float64)
    if rate == "analytic":
        reveal = process.reveal_probability(t, s)
    else:
        reveal = np.minimum((t - s) * process.weight(t), 1.0)
    return np.append(reveal[:-1], 1.0)


def reveal_masses(reveal) -> np.ndarray:
    """Eq. (1): the law of the step that reveals a token, `[N]`, from `reveal_probabilities`."""
    left = np.concatenate([[1.0], np.cumprod(1.0 - reveal)])
    return left[:-1] - left[1:]


def expected_nfe(
    process,
    num_steps: int | None,
    length: int,
    *,
    rate: str = "analytic",
    grid=None,
    t_start=None,
    t_end=None,
) -> float:
    """Eq. (2): the network calls that a sequence of `length` masked tokens needs on average.

    On a uniform grid with the linear schedule `N (1 - (1 - 1/N)^L)`, at most min(N, L). A cache shared
    by B sequences has the value of length B L.

    Args: as `masked_ancestral`.
    """
    check_absorbing(process)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=64)
    masses = reveal_masses(reveal_probabilities(process, times, rate))
    return float(-np.expm1(length * np.log1p(-np.minimum(masses, 1.0 - 1e-16))).sum())


def reveal_edges(reveal) -> np.ndarray:
    """Where the steps end among the 2^32 values of the bits that pick one, uint32 `[N]`.

    Args:
      reveal: `[N]`, see `reveal_probabilities`.
    """
    ends = np.cumsum(reveal_masses(reveal)) * 2.0**32
    return np.minimum(np.round(ends), 2.0**32 - 1).astype(np.uint32)


class _Start(NamedTuple):
    """Draws what the steps need: when each position is revealed, and the number that picks its token."""

    vocab_size: int

    def __call__(self, rng, start, tokens):
        keys, shape, steps = rng(), tokens.shape[1:], start["edges"].shape[0]
        bits = jax.vmap(lambda key: jax.random.bits(key, shape, jnp.uint32))(fold_all(keys, 0))
        step = jnp.searchsorted(start["edges"], bits, side="right").astype(jnp.int32)
        uniform = start["draw"].uniforms(fold_all(keys, 1), shape)
        at = jnp.full(tokens.shape[:1], -1, jnp.int32)
        return RevealState(tokens, jnp.minimum(step, steps - 1), uniform, start["points"], at)


def _reveal(state, reveal, draw, vocab_size, steps):
    """What to do with logits: draw the tokens at `reveal`."""
    most = -(-state.x.shape[1] // (2 * steps))  # half of what a step reveals on average

    def use(logits):
        check_logits(logits, state.x, vocab_size)
        return draw_where(state.uniform, logits, reveal, draw, state.x, most)

    return use


class _EveryStep(NamedTuple):
    """One call a step, of the whole batch at one time."""

    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        steps = state.points["t"].shape[0] - 1
        reveal = (state.x == self.vocab_size) & (state.step <= inputs["number"])
        logits = call(state.x, inputs["point"], rows=True)
        x = _reveal(state, reveal, inputs["draw"], self.vocab_size, steps)(logits)
        at = jnp.full_like(state.at, inputs["number"])
        # made only where a hook reads them
        logits = logits.all() if isinstance(logits, LogitRows) else logits
        return state._replace(x=x, at=at), logits


class _NextReveal(NamedTuple):
    """Each sequence goes to the next step that reveals something of it; no call where none has any."""

    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        steps = state.points["t"].shape[0] - 1
        masked = state.x == self.vocab_size
        at = jnp.where(masked, state.step, steps).min(axis=1)
        reveal = masked & (state.step <= at[:, None])
        point = {k: v[jnp.minimum(at, steps - 1)] for k, v in state.points.items()}
        use = _reveal(state, reveal, inputs["draw"], self.vocab_size, steps)
        x = call.when(reveal.any(), state.x, point, use, state.x, rows=True)
        return state._replace(x=x, at=jnp.where(at < steps, at, state.at)), None


class _JointGumbel(NamedTuple):
    """One categorical over the tokens and the mask at every position, by noise of so many bits."""

    vocab_size: int
    bits: int

    def __call__(self, call, rng, state, inputs):
        logits = call(state.x, inputs["point"])
        check_logits(logits, state.x, self.vocab_size)
        drawn = draw_joint(rng(), logits, inputs["reveal"], inputs["draw"], self.bits)
        x = jnp.where(state.x == self.vocab_size, drawn.astype(state.x.dtype), state.x)
        return TokenState(x), logits


def _start_tokens(rng, start, tokens):
    return TokenState(tokens)


@register("sampler", "masked_ancestral", family="discrete", paper="2406.07524")
def masked_ancestral(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    cached: bool = False,
    rate: str = "analytic",
    categorical: str = "inverse",
    bits: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Ancestral sampling of a masked model (MDLM, arXiv 2406.07524; MD4, 2406.04329; RADD, 2406.03736).

    First order: the total variation to the model's law halves when `num_steps` doubles.

    Equivalences: `cached` True and False give the same samples for the same key; `first_hitting` is the
    limit of many steps.

    Args:
      process: an `Absorbing` process.
      num_steps: steps N of the time grid, default 64.
      length: sequence length L, needed where `x_init` is a number of sequences. Tokens `[B, L]` as
        `x_init` are infilled: what is not the mask id stays.
      cached: False makes all N calls. True calls the network only for steps in which something is
        revealed, at most min(N, L) times, each sequence at times `[B]` of its own; hooks see no logits,
        and `StepInfo.point` is the grid's, thinned out (`RevealState.at` says where a sequence stands).
      rate: "analytic" or "euler", see `reveal_probabilities`.
      categorical: "inverse", or "gumbel": the papers' float32 artefact, see `gumbel`; for comparison.
      bits: of the uniforms under "gumbel", default 23 (JAX's float32; torch has 24).
      grid, t_start, t_end: see `time_grids.build_times`; grid "cosine" is MD4's.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, one that does not mask nearly all tokens at t = 1 (with a
        t_start of one's own it need not), a bad length or grid, an unknown or bad option.
    """
    check_absorbing(process)
    check_length(length)
    if t_start is None:
        check_ends_masked(process)
    check_choice("categorical", categorical, ("inverse", "gumbel"))
    check_choice("cached", cached, (True, False))
    draw = build_draw(**drawing)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=64)
    reveal = reveal_probabilities(process, times, rate)
    steps = len(reveal)
    points = process.point(times)
    gumbel = categorical == "gumbel"
    if gumbel and cached:
        raise ValueError("categorical='gumbel' draws anew in every step: it cannot be cached")
    if bits is not None and not gumbel:
        raise ValueError(f"bits = {bits} is an option of categorical='gumbel'")
    if gumbel:
        init, step, start = _start_tokens, _JointGumbel(process.vocab_size, check_bits(bits)), ()
    else:
        init = _Start(process.vocab_size)
        step = (_NextReveal if cached else _EveryStep)(process.vocab_size)
        start = {"edges": reveal_edges(reveal), "points": points, "draw": draw}
    calls = steps
    if cached and length is not None:
        calls = min(steps, int(length))
    thinned = np.arange(calls) * steps // calls
    xs = {
        "point": {k: v[thinned] for k, v in points.items()},
        "next": {k: v[np.append(thinned[1:], steps)] for k, v in points.items()},
        "number": thinned.astype(np.int32),
        "reveal": reveal[thinned],
        "draw": jax.tree.map(lambda v: np.full(calls, v), draw),
    }
    return Sampler(
        init=init,
        step=step,
        finish=result,
        xs=xs,
        start=start,
        nfe=calls,
        prepare=MaskedPrepare(process.vocab_size, length),
        stochastic=True,
        name="masked_ancestral",
    )


@register("sampler", "radd", family="discrete", paper="2406.03736", skips=True)
def radd(process, num_steps: int | None = None, **options) -> Sampler:
    """`masked_ancestral(..., cached=True)`: RADD's sampler, the same samples with fewer calls.

    `nfe` is the most calls a run may make, `expected_nfe` what a sequence needs of them on average;
    `CountedCalls` counts those made.
    """
    return dataclasses.replace(
        masked_ancestral(process, num_steps, **{"cached": True, **options}), name="radd"
    )
