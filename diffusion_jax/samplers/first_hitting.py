"""First-hitting sampling of masked models: exact in as many calls as there are tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import expand, fold_all
from diffusion_jax.registry import register
from diffusion_jax.samplers.categorical import build_draw, draw_tokens
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    check_absorbing,
    check_length,
    check_logits,
    result,
)


class HittingState(NamedTuple):
    """Scan state: tokens `[B, L]`, the mask rate `[B]` of the current time."""

    x: Any
    mask_rate: Any


def _start_first_hitting(rng, process, tokens):
    rate = jnp.asarray(process.mask_rate(1.0), jnp.result_type(float))
    return HittingState(tokens, jnp.full(tokens.shape[:1], rate))


class _FirstHittingStep(NamedTuple):
    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        tokens, process = state.x, inputs["process"]
        keys = rng()
        masked = tokens == self.vocab_size
        left = masked.sum(axis=1)
        # the first of n exponential clocks: the mask rate shrinks by the largest of n uniforms
        tiny = jnp.finfo(state.mask_rate.dtype).tiny
        uniform = jax.vmap(lambda k: jax.random.uniform(k, (), tiny.dtype, minval=tiny))
        shrink = uniform(fold_all(keys, 0)) ** (1.0 / jnp.maximum(left, 1).astype(tiny.dtype))
        rate = jnp.where(left > 0, state.mask_rate * shrink, state.mask_rate)
        t = process.t_of_mask_rate(rate)
        logits = call(tokens, {"t": t, "alpha": 1.0 - rate, "mask_rate": rate})
        check_logits(logits, tokens, self.vocab_size)
        place = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))(fold_all(keys, 1))
        position = jnp.argmax(jnp.where(masked, place, -1.0), axis=1)
        here = jnp.arange(tokens.shape[1])[None, :] == position[:, None]
        chosen = jnp.take_along_axis(logits, position[:, None, None], axis=1)[:, 0]
        draw = inputs["draw"]
        drawn = draw_tokens(draw.uniforms(fold_all(keys, 2), ()), chosen, draw)
        x = jnp.where(here & masked, expand(drawn.astype(tokens.dtype), tokens), tokens)
        return HittingState(x, rate), logits


@register("sampler", "first_hitting", family="discrete", paper="2409.02908", calls="length")
def first_hitting(process, length: int, **drawing) -> Sampler:
    """First-hitting sampler (Zheng et al., arXiv 2409.02908, section 4): exact, one token a call.

    With n masks left at mask rate r the next reveal happens at rate r u^(1/n), u uniform; a masked
    position is chosen uniformly and drawn from the network's distribution at that time. The result
    follows the model's law exactly (ancestral sampling reaches it only as its steps grow), in `length`
    calls; sequences with fewer masks are finished earlier and stay as they are.

    Args:
      process: an `Absorbing` process.
      length: sequence length L; `x_init` is a number of sequences or tokens `[B, L]` to infill.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, a bad length, an unknown or bad option.
    """
    if length is None:
        raise ValueError("first_hitting needs the sequence length")
    check_absorbing(process)
    check_length(length)
    draw = build_draw(**drawing)
    # The times are drawn while sampling; what is known beforehand is their mean, L - k of L + 1.
    mean_rate = process.mask_rate(1.0) * np.arange(length, -1, -1) / (length + 1.0)
    points = process.point(process.t_of_mask_rate(mean_rate))
    xs = {
        "point": {k: np.asarray(v)[:-1] for k, v in points.items()},
        "next": {k: np.asarray(v)[1:] for k, v in points.items()},
        "draw": jax.tree.map(lambda v: np.full(length, v), draw),
        "process": jax.tree.map(lambda v: np.full(length, v), process),
    }
    return Sampler(
        init=_start_first_hitting,
        step=_FirstHittingStep(process.vocab_size),
        finish=result,
        xs=xs,
        start=process,
        nfe=int(length),
        prepare=MaskedPrepare(process.vocab_size, int(length)),
        stochastic=True,
        name="first_hitting",
    )
