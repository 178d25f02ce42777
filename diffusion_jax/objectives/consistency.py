"""Consistency training (arXiv 2303.01469) in pieces that know no process: pair, gap, weight, distance.

A path of the probability-flow ODE passes through x_t and x_r, r < t. A consistency function h maps both
to the path's end, and is trained by
  (1) E weight(t, r) distance(h(x_t, t), stop_gradient(h_target(x_r, r)))
with x_r from one of two *pairs*:
  (2) training      x_t and x_r from the same data and the same noise
  (3) distillation  x_r by one step of a teacher's ODE solver from x_t
(2) is (3) in expectation: the first-order step with the exact denoiser is E[x_r | x_t], so that their
gradients agree to first order in t - r. What differs between processes is `corrupt`, the
teacher's step, and the form of h (bridges: `guidance.bridge_consistency`); nothing here.

Gaps, `(t, step, t_end) -> r`, and distances, `(x, y) -> [B]`, are named or callable.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import fold_all, normal_per_example, sum_per_example
from diffusion_jax.objectives.per_example import global_index, times_and_keys
from diffusion_jax.registry import check_choice

_START = 1  # separates the choice of t_start from an example's noise


def training_pair(corrupt: Callable) -> Callable:
    """Pair (2): `corrupt(eps, t) -> x_t` at both times, with the same eps."""

    def make(eps, t, r):
        return corrupt(eps, t), corrupt(eps, r)

    return make


def distillation_pair(corrupt: Callable, step: Callable) -> Callable:
    """Pair (3): `step(x_t, t, r) -> x_r`, without gradient."""

    def make(eps, t, r):
        x = corrupt(eps, t)
        return x, jax.lax.stop_gradient(step(x, t, r))

    return make


def constant_gap(t, step, t_end, *, dt=0.1):
    """`r = max(t_end, t - dt)`, the same in all of training (CDBM, arXiv 2410.22637, first choice)."""
    return jnp.maximum(t - dt, t_end)


def shrinking_gap(t, step, t_end, *, interval, q=2.0, k=8.0, b=1.0, first=1):
    """`t - r = t (1 + k sigmoid(-b t)) / q^n`, n = first + step // interval; r at least t_end.

    Gaps shrink by the factor q every `interval` steps (ECT, arXiv 2406.14548, and CDBM's second choice).
    Where the factor exceeds 1, as with `first = 1` in the beginning, r is t_end and the target the data
    itself: denoising. A model that was trained as a denoiser can begin further on.

    Args:
      interval: training steps to a stage, positive.
      q: above 1. k, b: the gap is relatively larger, by up to 1 + k / 2, at t below 1 / b.
      first: exponent of the first stage.
    """
    stage = first + jnp.asarray(step, jnp.float32) // interval
    share = (1.0 + k * jax.nn.sigmoid(-b * t)) * q**-stage
    return jnp.maximum(t * (1.0 - share), t_end)


GAPS = {"constant": constant_gap, "shrinking": shrinking_gap}


def squared_l2(x, y):
    """`|x - y|^2`, `[B]`."""
    return sum_per_example(jnp.square(x - y))


def pseudo_huber(x, y, *, scale=0.03):
    """`sqrt(|x - y|^2 + c^2) - c`, c = scale sqrt(dimension) (arXiv 2310.14189), `[B]`."""
    c = scale * (x.size // x.shape[0]) ** 0.5
    # the quotient is the difference without cancellation for small |x - y|
    square = squared_l2(x, y)
    return square / (jnp.sqrt(square + c**2) + c)


DISTANCES = {"squared_l2": squared_l2, "pseudo_huber": pseudo_huber}


def _reciprocal(value):
    return jnp.where(value > 0, 1.0 / jnp.where(value > 0, value, 1.0), 0.0)


WEIGHTS = {
    "constant": lambda t, r: jnp.ones_like(t),
    "inverse_gap": lambda t, r: _reciprocal(t - r),
    "relative_gap": lambda t, r: t * _reciprocal(t - r),
}


def build_gap(gap: str | Callable, **options: Any) -> Callable:
    """A gap by name ("constant", "shrinking") or as it is, with its options bound.

    Raises:
      ValueError: an unknown name, an option out of range or one it does not have.
    """
    if callable(gap):
        return functools.partial(gap, **options) if options else gap
    check_choice("gap", gap, GAPS)
    for name, least in (("interval", 0), ("q", 1), ("dt", 0)):
        if name in options and not options[name] > least:
            raise ValueError(f"gap {gap!r}: {name} must exceed {least}, got {options[name]!r}")
    return _bound("gap", gap, GAPS[gap], options, (jnp.ones(1), 0, 0.0))


def build_distance(distance: str | Callable, **options: Any) -> Callable:
    """A distance by name ("squared_l2", "pseudo_huber") or as it is, with its options bound.

    Raises:
      ValueError: an unknown name, a scale below 0, or options it does not have.
    """
    if callable(distance):
        return functools.partial(distance, **options) if options else distance
    check_choice("distance", distance, DISTANCES)
    if not options.get("scale", 1.0) > 0:
        raise ValueError(f"distance {distance!r}: scale must be positive, got {options['scale']}")
    return _bound("distance", distance, DISTANCES[distance], options, (jnp.ones((1, 1)),) * 2)


def _bound(kind, name, function, options, example):
    """The function with its options, tried once so that a wrong option is refused where it is given."""
    made = functools.partial(function, **options)
    try:
        jax.eval_shape(made, *example)
    except TypeError as error:
        raise ValueError(f"{kind} {name!r}: {error}") from error
    return made


def build_weight(weight: str | Callable) -> Callable:
    """A weight `(t, r) -> [B]` by name or as it is.

    "constant" is 1, "inverse_gap" 1 / (t - r), "relative_gap" t / (t - r).

    Raises:
      ValueError: an unknown name.
    """
    if callable(weight):
        return weight
    check_choice("weight", weight, WEIGHTS)
    return WEIGHTS[weight]


def consistency(
    process,
    student: Callable,
    target: Callable,
    pair: Callable,
    key,
    like,
    *,
    gap: Callable,
    weight: str | Callable = "inverse_gap",
    distance: str | Callable = "pseudo_huber",
    times: str | Callable = "uniform",
    step: Any = 0,
    t_start: float | None = None,
    t_end: float | None = None,
    start_share: float = 0.0,
    index=None,
    total: int | None = None,
):
    """Consistency loss (1), one value an example.

    Args:
      process: gives `point(t)`, t_min and t_max.
      student, target: consistency functions `(x, t) -> end of the path` (or with `at(x, point)`); no
        gradient passes through the target's value.
      pair: `(eps, t, r) -> (x_t, x_r)`, see `training_pair` and `distillation_pair`.
      key: split into times and noise; example i's noise is folded with `index[i]`.
      like: an array of the shape and dtype of x, `[B, ...]`.
      gap: `(t, step, t_end) -> r`, see `build_gap`.
      weight: a name or `(t, r) -> [B]`.
      distance: a name or `(x, y) -> [B]`.
      times: a registered name or a time sampler (see `objectives.times`).
      step: the training step (may be traced).
      t_start, t_end: times are cut to this interval; defaults t_max and t_min.
      start_share: chance that an example's time is t_start, where sampling begins, instead.
      index, total: positions in, and size of, the global batch (default: this batch is all of it).
    Returns:
      `(losses [B], aux)`; aux holds `t`, `r`, the unweighted `distance` and the mean squared `error`
      between student and target, all `[B]`.
    Raises:
      ValueError: shapes that do not fit, unknown names.
    """
    index, total = global_index(like, index, total)
    distance, weight = build_distance(distance), build_weight(weight)
    t_start = process.t_max if t_start is None else t_start
    t_end = process.t_min if t_end is None else t_end
    t, _, keys = times_and_keys(process, key, index, total, times)
    t = jnp.clip(t, t_end, t_start)
    if start_share:
        at_start = jax.vmap(jax.random.bernoulli, (0, None))(fold_all(keys, _START), start_share)
        t = jnp.where(at_start, t_start, t)
    r = gap(t, step, t_end)
    x_t, x_r = pair(normal_per_example(keys, like), t, r)
    reached, _ = evaluate(student, x_t, process.point(t))
    aim, _ = evaluate(target, x_r, process.point(r))
    if reached.shape != like.shape or aim.shape != like.shape:
        raise ValueError(
            f"a consistency function returned shape {reached.shape} for data of shape {like.shape}"
        )
    wide = jnp.promote_types(like.dtype, jnp.float32)
    reached, aim = reached.astype(wide), jax.lax.stop_gradient(aim.astype(wide))
    between = distance(reached, aim)
    error = squared_l2(reached, aim) / (like.size // like.shape[0])
    return weight(t, r) * between, {"t": t, "r": r, "distance": between, "error": error}
