"""Ancestral sampling of masked models.

A token is drawn in two stages: a uniform decides whether a position is revealed, then one of the V clean
tokens is drawn (see `categorical`). With the mask as one more class of a single categorical every token's
probability is tiny, and noise of 23 bits cannot reach the tail (arXiv 2409.02908).
"""

import itertools
from typing import NamedTuple

import jax
import numpy as np

from diffusion_jax.numerics import fold_all
from diffusion_jax.registry import register
from diffusion_jax.samplers.categorical import build_draw, draw_where
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    TokenState,
    check_absorbing,
    check_length,
    check_logits,
    result,
)


def _start_ancestral(rng, start, tokens):
    return TokenState(tokens)


class _AncestralStep(NamedTuple):
    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        tokens = state.x
        logits = call(tokens, inputs["point"])
        check_logits(logits, tokens, self.vocab_size)
        keys = rng()
        draw, shape = inputs["draw"], tokens.shape[1:]
        uniforms = jax.vmap(lambda k: jax.random.uniform(k, shape))(fold_all(keys, 0))
        reveal = (tokens == self.vocab_size) & (uniforms < inputs["reveal"])
        x = draw_where(draw.uniforms(fold_all(keys, 1), shape), logits, reveal, draw, tokens)
        return TokenState(x), logits


@register("sampler", "masked_ancestral", family="discrete", paper="2406.07524")
def masked_ancestral(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Ancestral sampling of a masked model (MDLM, arXiv 2406.07524; MD4, 2406.04329).

    In step t -> s each masked position is revealed with probability (alpha_s - alpha_t) / (1 - alpha_t)
    and then drawn from the network's distribution; the last step reveals what is left. First order: the
    total variation to the model's law halves when `num_steps` doubles.

    Args:
      process: an `Absorbing` process.
      num_steps: network calls, default 64.
      length: sequence length, needed where `x_init` is a number of sequences. Tokens `[B, L]` as
        `x_init` are infilled: what is not the mask id stays.
      grid, t_start, t_end: see `time_grids.build_times`.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, a bad length or grid, an unknown or bad option.
    """
    check_absorbing(process)
    check_length(length)
    draw = build_draw(**drawing)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=64)
    points = [process.point(t) for t in times]
    reveal = np.array([process.reveal_probability(t, s) for t, s in itertools.pairwise(times)])
    reveal[-1] = 1.0
    stacked = {k: np.array([p[k] for p in points]) for k in points[0]}
    xs = {
        "point": {k: v[:-1] for k, v in stacked.items()},
        "next": {k: v[1:] for k, v in stacked.items()},
        "reveal": reveal,
        "draw": jax.tree.map(lambda v: np.full(len(reveal), v), draw),
    }
    return Sampler(
        init=_start_ancestral,
        step=_AncestralStep(process.vocab_size),
        finish=result,
        xs=xs,
        start=(),
        nfe=len(reveal),
        prepare=MaskedPrepare(process.vocab_size, length),
        stochastic=True,
        name="masked_ancestral",
    )
