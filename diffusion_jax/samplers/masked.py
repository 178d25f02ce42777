"""Samplers for masked diffusion: ancestral, and first-hitting.

Categories are drawn in two stages: a uniform decides whether a position is revealed, then a categorical
over the V clean tokens says what it becomes. With the mask as one more class of a single categorical
every token's probability is tiny, and float32 Gumbel noise (at most 16) cannot reach the tail: samples
come out colder than the model (arXiv 2409.02908). Two stages have the same law and no such floor; the
Gumbel noise itself is drawn in JAX's "high" mode, whose float32 tail reaches 32.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import expand, fold_all
from diffusion_jax.processes import Absorbing
from diffusion_jax.registry import register
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times


class MaskedState(NamedTuple):
    """Scan state: tokens `[B, L]`, and for first-hitting the mask rate `[B]` of the current time."""

    x: Any
    mask_rate: Any = None


def categorical_per_example(keys, logits, temperature):
    """One draw along the last axis, one key an example; logits `[B, ..., V]` in any dtype."""
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32)) / temperature
    return jax.vmap(lambda k, row: jax.random.categorical(k, row, mode="high"))(keys, logits)


def _tokens(process, length) -> Callable:
    """`Sampler.prepare`: a number of sequences, or tokens `[B, L]` in which masks are to be filled."""

    def prepare(x_init):
        if isinstance(x_init, int | np.integer) and not isinstance(x_init, bool):
            if length is None:
                raise ValueError(
                    "the number of sequences alone does not say their length: pass length"
                )
            if x_init < 1:
                raise ValueError(f"the number of sequences must be positive, got {x_init}")
            return jnp.full((int(x_init), length), process.mask_id, jnp.int32)
        tokens = jnp.asarray(x_init)
        process.check_tokens(tokens, process.mask_id)
        if length is not None and tokens.shape[1] != length:
            raise ValueError(
                f"tokens have length {tokens.shape[1]}, the sampler was built for {length}"
            )
        return tokens

    return prepare


class _Prepare(NamedTuple):
    """Hashable form of `_tokens`, so that equal samplers are one pytree structure."""

    vocab_size: int
    length: int | None

    def __call__(self, x_init):
        return _tokens(Absorbing(self.vocab_size), self.length)(x_init)


def _check(process, length, temperature):
    if not isinstance(process, Absorbing):
        raise ValueError(f"this sampler needs an Absorbing process, got {type(process).__name__}")
    if length is not None and (not isinstance(length, int | np.integer) or length < 1):
        raise ValueError(f"length must be a positive int, got {length!r}")
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def _check_logits(logits, tokens, vocab_size):
    if logits.shape != (*tokens.shape, vocab_size):
        raise ValueError(
            f"denoise returned logits of shape {tuple(logits.shape)}; tokens {tuple(tokens.shape)} with "
            f"{vocab_size} clean tokens need {(*tokens.shape, vocab_size)} (no mask class)"
        )


def _result(state: MaskedState):
    return state.x


def _start_ancestral(rng, start, tokens):
    return MaskedState(tokens)


class _AncestralStep(NamedTuple):
    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        tokens = state.x
        logits = call(tokens, inputs["point"])
        _check_logits(logits, tokens, self.vocab_size)
        keys = rng()
        uniforms = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))(fold_all(keys, 0))
        drawn = categorical_per_example(fold_all(keys, 1), logits, inputs["temperature"])
        reveal = (tokens == self.vocab_size) & (uniforms < inputs["reveal"])
        return MaskedState(jnp.where(reveal, drawn.astype(tokens.dtype), tokens)), logits


@register("sampler", "masked_ancestral", family="discrete", paper="2406.07524")
def masked_ancestral(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    temperature: float = 1.0,
    grid=None,
    t_start=None,
    t_end=None,
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
      temperature: divides the logits.
      grid, t_start, t_end: see `time_grids.build_times`.
    Raises:
      ValueError: not an absorbing process, bad length, temperature or grid.
    """
    _check(process, length, temperature)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=64)
    points = [process.point(t) for t in times]
    reveal = np.array([process.reveal_probability(t, s) for t, s in itertools.pairwise(times)])
    reveal[-1] = 1.0
    stacked = {k: np.array([p[k] for p in points]) for k in points[0]}
    xs = {
        "point": {k: v[:-1] for k, v in stacked.items()},
        "next": {k: v[1:] for k, v in stacked.items()},
        "reveal": reveal,
        "temperature": np.full(len(reveal), temperature),
    }
    return Sampler(
        init=_start_ancestral,
        step=_AncestralStep(process.vocab_size),
        finish=_result,
        xs=xs,
        start=(),
        nfe=len(reveal),
        prepare=_Prepare(process.vocab_size, length),
        stochastic=True,
        name="masked_ancestral",
    )


def _start_first_hitting(rng, process, tokens):
    rate = jnp.asarray(process.mask_rate(1.0), jnp.result_type(float))
    return MaskedState(tokens, jnp.full(tokens.shape[:1], rate))


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
        _check_logits(logits, tokens, self.vocab_size)
        place = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))(fold_all(keys, 1))
        position = jnp.argmax(jnp.where(masked, place, -1.0), axis=1)
        here = jnp.arange(tokens.shape[1])[None, :] == position[:, None]
        chosen = jnp.take_along_axis(logits, position[:, None, None], axis=1)[:, 0]
        drawn = categorical_per_example(fold_all(keys, 2), chosen, inputs["temperature"])
        x = jnp.where(here & masked, expand(drawn.astype(tokens.dtype), tokens), tokens)
        return MaskedState(x, rate), logits


@register("sampler", "first_hitting", family="discrete", paper="2409.02908", calls="length")
def first_hitting(process, length: int, *, temperature: float = 1.0) -> Sampler:
    """First-hitting sampler (Zheng et al., arXiv 2409.02908, section 4): exact, one token a call.

    With n masks left at mask rate r the next reveal happens at rate r u^(1/n), u uniform; a masked
    position is chosen uniformly and drawn from the network's distribution at that time. The result
    follows the model's law exactly (ancestral sampling reaches it only as its steps grow), in `length`
    calls; sequences with fewer masks are finished earlier and stay as they are.

    Args:
      process: an `Absorbing` process.
      length: sequence length L; `x_init` is a number of sequences or tokens `[B, L]` to infill.
      temperature: divides the logits.
    Raises:
      ValueError: not an absorbing process, bad length or temperature.
    """
    if length is None:
        raise ValueError("first_hitting needs the sequence length")
    _check(process, length, temperature)
    # The times are drawn while sampling; what is known beforehand is their mean, L - k of L + 1.
    mean_rate = process.mask_rate(1.0) * np.arange(length, -1, -1) / (length + 1.0)
    points = process.point(process.t_of_mask_rate(mean_rate))
    xs = {
        "point": {k: np.asarray(v)[:-1] for k, v in points.items()},
        "next": {k: np.asarray(v)[1:] for k, v in points.items()},
        "temperature": np.full(length, temperature),
        "process": jax.tree.map(lambda v: np.full(length, v), process),
    }
    return Sampler(
        init=_start_first_hitting,
        step=_FirstHittingStep(process.vocab_size),
        finish=_result,
        xs=xs,
        start=process,
        nfe=int(length),
        prepare=_Prepare(process.vocab_size, int(length)),
        stochastic=True,
        name="first_hitting",
    )
