"""Ancestral sampling where every token has its own reveal rate (GenMD4, arXiv 2406.04329, section 5).

A step t -> s reveals a masked position as v with probability mu_v (1 - (s / t)^w_v), mu the network's law
at time t. In two stages: whether it is revealed, with the sum over v, and then as what. The last step
reveals all that is left with law mu. First order in the number of steps.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import fold_all
from diffusion_jax.processes import Absorbing
from diffusion_jax.processes.state_masking import StateMasking
from diffusion_jax.registry import register
from diffusion_jax.samplers.categorical import build_draw, draw_where, filtered_log_probs
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    check_ends_masked,
    check_length,
    check_logits,
    result,
)


class StateMaskedState(NamedTuple):
    """Scan state: tokens `[B, L]`, and the process with its powers."""

    x: Any
    process: Any


def _start(rng, process, tokens):
    return StateMaskedState(tokens, process)


def log_stay(process, t, s):
    """`log (1 - alpha_v(s)) / (1 - alpha_v(t))`, `[V]` or a scalar where all tokens have one schedule."""
    if isinstance(process, StateMasking):
        return process.log_stay(t, s)
    return jnp.log(process.mask_rate(s)) - jnp.log(process.mask_rate(t))


class _Step(NamedTuple):
    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        tokens = state.x
        logits = call(tokens, inputs["point"])
        check_logits(logits, tokens, self.vocab_size)
        keys, draw, shape = rng(), inputs["draw"], tokens.shape[1:]
        # the filters act on the network's law; what is drawn from is that law times the reveal rates
        law = filtered_log_probs(logits, draw)
        stay = log_stay(state.process, inputs["point"]["t"], inputs["next"]["t"])
        stay = jnp.where(inputs["last"], -jnp.inf, stay).astype(law.dtype)
        revealed = law + jnp.log(-jnp.expm1(stay))
        chance = jnp.exp(jax.nn.logsumexp(revealed, axis=-1))
        uniforms = jax.vmap(lambda k: jax.random.uniform(k, shape))(fold_all(keys, 0))
        reveal = (tokens == self.vocab_size) & (inputs["last"] | (uniforms < chance))
        plain = dataclasses.replace(draw, temperature=1.0, nucleus=None, top_k=None)
        x = draw_where(plain.uniforms(fold_all(keys, 1), shape), revealed, reveal, plain, tokens)
        return state._replace(x=x), logits


@register("sampler", "state_masked_ancestral", family="discrete", paper="2406.04329")
def state_masked_ancestral(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Ancestral sampling of GenMD4 (arXiv 2406.04329); on an `Absorbing` process, of any masked model.

    The network must be told the time: what a mask says about its token changes with it.

    Equivalences: equal powers have the law of `masked_ancestral`.

    Args:
      process: a `StateMasking` process, or an `Absorbing` one.
      num_steps: network calls, default 64.
      length: sequence length, needed where `x_init` is a number of sequences. Tokens `[B, L]` as
        `x_init` are infilled: what is not the mask id stays.
      grid, t_start, t_end: see `time_grids.build_times`.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: another process, a bad length or grid, an unknown or bad option.
    """
    if not isinstance(process, StateMasking | Absorbing):
        raise ValueError(
            f"this sampler needs a StateMasking or Absorbing process, got {type(process).__name__}"
        )
    if isinstance(process, Absorbing):
        check_ends_masked(process)
    check_length(length)
    draw = build_draw(**drawing)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=64)
    points = [process.point(t) for t in times]
    stacked = {k: np.array([p[k] for p in points]) for k in points[0]}
    steps = len(times) - 1
    xs = {
        "point": {k: v[:-1] for k, v in stacked.items()},
        "next": {k: v[1:] for k, v in stacked.items()},
        "last": np.arange(steps) == steps - 1,
        "draw": jax.tree.map(lambda v: np.full(steps, v), draw),
    }
    return Sampler(
        init=_start,
        step=_Step(process.vocab_size),
        finish=result,
        xs=xs,
        start=process,
        nfe=steps,
        prepare=MaskedPrepare(process.vocab_size, length),
        stochastic=True,
        name="state_masked_ancestral",
    )
