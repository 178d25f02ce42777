"""Masked cross-entropy: every likelihood bound of masked diffusion is a weight on one sum.

With M the masked positions of x_t, S the cross-entropy summed over them, r = 1 - alpha the mask rate:
  (1) -log p(x0) <= integral over t of w(t) E[S] dt, w = -alpha' / (1 - alpha)
                                            MDLM (2406.07524, eq. 10), MD4 (2406.04329, eq. 4), t-DCE
  (2)             = integral over r of E[S] / r dr                  lambda-DCE (RADD, 2406.03736; SMDM)
  (3)             = E over k ~ U{1..L} of (L / k) E over |M| = k of S   k-DCE, any-order autoregression
  (4) -log p_T(x0) <= sum over T steps t -> s of (alpha_s - alpha_t) / (1 - alpha_t) E[S]   MD4, finite T
A masking says which positions are masked and what S weighs: the loss is the same for all. (1) to (3) are
equal for a network that does not see t. What differs is the variance: S grows like r, so that the
second moment of S / r diverges logarithmically at r -> 0, while (3) is bounded. (3) needs no lower limit
either, and its mean is the bound exactly; clipped at t_min, (1) leaves out what lies below.

Score entropy of normalised scores (RADD's DSE) has the integrand of (1); RADD's t-DCE adds a term
without gradient, `score_offset`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.numerics import example_keys, is_concrete, namespace
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import build_times, stratified
from diffusion_jax.objectives.token_cross_entropy import cross_entropy, token_cross_entropy
from diffusion_jax.registry import check_choice


class Masking(NamedTuple):
    """Masked sequences and the weight of their cross-entropy.

    Attributes:
      x: int `[B, L]`, mask ids among the tokens.
      t: `[B]`, the time that the network is told.
      weight: `[B]`.
    """

    x: Any
    t: Any
    weight: Any


# Weights.


def finite_time(t, steps: int):
    """The step of a grid of `steps` that t lies in, by its end: `(floor(t T) + 1) / T`, at most 1."""
    xp = namespace(t)
    return xp.minimum(xp.floor(t * steps) + 1.0, steps) / steps


def finite_weight(process, t, steps: int):
    """`T (alpha_s - alpha_t) / (1 - alpha_t)` of a step t -> s = t - 1/T (MD4, arXiv 2406.04329)."""
    return steps * process.reveal_probability(t, t - 1.0 / steps)


def count_weight(count, free):
    """`free / count`: of `count` masks among `free` positions that may be masked; 0 without masks."""
    xp = namespace(count, free)
    return xp.where(count > 0, free / xp.maximum(count, 1), 0.0)


def score_offset(process, t, count):
    """`count w(t) log(e^sigma_bar - 1)`: what RADD's t-DCE holds beside `w(t) S` (arXiv 2406.03736, eq. 3.5).

    It has no gradient, and integrates to 0 over all mask rates; at one t it is large.

    Args:
      t: `[B]`.
      count: `[B]`, masked positions.
    """
    rate = process.mask_rate(t)
    xp = namespace(rate, count)
    # nothing is masked at rate 0, and at rate 1 the score itself vanishes
    inner = xp.clip(rate, xp.finfo(rate.dtype).tiny, 1.0 - xp.finfo(rate.dtype).eps)
    odds = xp.log(inner) - xp.log1p(-inner)
    return xp.where(count > 0, count * process.weight(t) * odds, 0.0)


def uniform_reconstruction(process, length: int, t=None):
    """Nats of decoding uniformly what is masked at t: `L (1 - alpha(t)) log V` (MD4's last term).

    With t = `process.t_min`, the default, it closes the bound (1) below the times that are drawn.
    """
    t = process.t_min if t is None else t
    rate = process.mask_rate(t)
    return length * rate * namespace(rate).log(process.vocab_size)


# Maskings: `(process, key, tokens, index, total, where) -> Masking`.


def _independent(process, key, tokens, index, t, weight, where):
    x = process.corrupt(example_keys(key, index), tokens, t)
    x = x if where is None else jnp.where(where, x, tokens)
    return Masking(x, t, weight)


def by_time(process, key, tokens, index, total, where, times: str | Callable = "uniform"):
    """Independent masks at drawn times, weight w(t) / p(t): (1), any schedule, on [t_min, 1]."""
    t_key, mask_key = jax.random.split(key)
    t, inverse_density = build_times(times)(process, t_key, index, total)
    weight = process.weight(t) * inverse_density
    return _independent(process, mask_key, tokens, index, t, weight, where)


def log_mask_rate(process, key, index, total):
    """Times whose log mask rate is uniform: with them w(t) / p(t) is constant.

    MDLM's importance sampling and change of variables (arXiv 2406.07524) for its `-f_0`: there the range
    of the log rate is taken to end at 0.

    Raises:
      ValueError: nothing is masked at t_min.
    """
    if is_concrete(process.t_min) and process.mask_rate(process.t_min) <= 0:
        raise ValueError(
            f"the masking 'importance' needs a mask rate above 0 at t_min, got t_min = {process.t_min}"
        )
    ends = (process.mask_rate(jnp.asarray(t, jnp.float32)) for t in (process.t_min, 1.0))
    low, high = (jnp.log(end) for end in ends)
    rate = jnp.exp(low + (high - low) * stratified(key, index, total))
    t = process.t_of_mask_rate(rate)
    return t, (high - low) / process.weight(t)


def by_rate(process, key, tokens, index, total, where, eps: float = 0.0):
    """Independent masks at a uniform rate r = (1 - eps) u + eps, weight 1 / r: (2), whatever the schedule.

    `eps = 1e-3` is the loss of LLaDA and SMDM (arXiv 2410.18514): a little more than the bound near
    r = 0, and less variance.
    """
    rate_key, mask_key = jax.random.split(key)
    rate = 1.0 - (1.0 - eps) * stratified(rate_key, index, total)  # in (0, 1]
    draw = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))
    hit = draw(example_keys(mask_key, index)) < rate[:, None]
    hit = hit if where is None else hit & where
    x = jnp.where(hit, jnp.asarray(process.mask_id, tokens.dtype), tokens)
    return Masking(x, process.t_of_mask_rate(rate), 1.0 / rate)


def by_count(process, key, tokens, index, total, where):
    """Exactly k masks, k ~ U{1..L} spread evenly over the batch, weight L / k: (3).

    Every position draws a uniform, and those of the k smallest are masked. The k-th smallest is the
    mask rate at which this happens, so the loss of a network that sees t is unbiased too.
    """
    count_key, mask_key = jax.random.split(key)
    free = jnp.full(tokens.shape[:1], tokens.shape[1]) if where is None else where.sum(axis=1)
    count = jnp.floor(stratified(count_key, index, total) * free).astype(jnp.int32) + 1
    count = jnp.minimum(count, free)
    draw = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))
    uniform = draw(example_keys(mask_key, index))
    uniform = uniform if where is None else jnp.where(where, uniform, 2.0)
    order = jnp.argsort(uniform, axis=1)
    hit = jnp.argsort(order, axis=1) < count[:, None]
    last = jnp.take_along_axis(order, jnp.maximum(count - 1, 0)[:, None], axis=1)
    rate = jnp.take_along_axis(uniform, last, axis=1)[:, 0]
    x = jnp.where(hit, jnp.asarray(process.mask_id, tokens.dtype), tokens)
    t = process.t_of_mask_rate(jnp.minimum(rate, 1.0))
    return Masking(x, t, count_weight(count, free).astype(rate.dtype))


def by_step(process, key, tokens, index, total, where, steps: int = 1000):
    """Independent masks at a step of an even grid of T steps: (4)."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    t_key, mask_key = jax.random.split(key)
    t = finite_time(stratified(t_key, index, total), steps)
    weight = finite_weight(process, t, steps)
    return _independent(process, mask_key, tokens, index, t, weight, where)


MASKINGS = {
    "continuous": by_time,
    "importance": functools.partial(by_time, times=log_mask_rate),
    "lambda": by_rate,
    "count": by_count,
    "finite": by_step,
}


def build_masking(masking: str | Callable, **options: Any) -> Callable:
    """A masking from a name or a callable, with its options bound.

    "continuous" (times: a name of `objectives.times` or a time sampler), "importance", "lambda" (eps),
    "count", "finite" (steps).

    Raises:
      ValueError: no such name.
    """
    if not callable(masking):
        check_choice("masking", masking, MASKINGS)
        masking = MASKINGS[masking]
    return functools.partial(masking, **options) if options else masking


def masked_sum(logits, tokens, masked):
    """Cross-entropy summed over masked positions: logits `[B, L, V]` -> `[B]`, at least float32."""
    return jnp.where(masked, cross_entropy(logits, tokens), 0.0).sum(axis=1)


def masked_cross_entropy(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    masking: str | Callable = "continuous",
    where=None,
    index=None,
    total: int | None = None,
    **options: Any,
):
    """One-sample estimate of a likelihood bound, nats a sequence, one value an example.

    Args:
      process: an `Absorbing` process.
      denoise: `(x_t int [B, L], t [B]) -> logits [B, L, V]`; a bound network makes them in pieces
        (`token_cross_entropy`).
      key: split into times (rates, counts) and masks; example i's mask is folded with `index[i]`.
      tokens: int `[B, L]`, clean.
      masking, options: see `build_masking`.
      where: bool `[B, L]`, the positions that may be masked (default: all). The loss then bounds the
        likelihood of these given the others, as for the answer to a prompt.
      index, total: positions in, and size of, the global batch.
    Returns:
      `(losses [B], aux)`; aux holds `t`, `masked` (the fraction masked) and `cross_entropy`, the
      mean over masked positions, all `[B]`.
    Raises:
      ValueError: tokens that are not clean integers `[B, L]`, logits or `where` of another shape.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    if where is not None and (where.shape != tokens.shape or where.dtype != bool):
        raise ValueError(
            f"where must be bool of shape {tokens.shape}, got {where.dtype} {where.shape}"
        )
    index, total = global_index(tokens, index, total)
    drawn = build_masking(masking, **options)(process, key, tokens, index, total, where)
    masked = drawn.x == process.mask_id
    each = token_cross_entropy(denoise, drawn.x, process.point(drawn.t), tokens)
    summed = jnp.where(masked, each, 0.0).sum(axis=1)
    count = masked.sum(axis=1)
    # at t = 0 the weight is infinite, and nothing is masked
    losses = jnp.where(count > 0, drawn.weight, 0.0) * summed
    return losses, {
        "t": drawn.t,
        "masked": count / tokens.shape[1],
        "cross_entropy": summed / jnp.maximum(count, 1),
    }
