"""Semi-discrete optimal transport from a noise law to finitely many points (as in DPM-OT, arXiv 2307.11308).

The map T from a source law to n points P_j of equal weight, for the squared cost:
  (1) T(x) = P_j* with j* = argmax_j <x, P_j> + h_j
  (2) dual gradient: mass_j - 1 / n, mass_j the source's probability of cell j
  (3) Adam on h with (0.9, 0.999), no bias correction, h <- h - mean(h) after each update
Masses are estimated with fresh draws; when more than `patience` updates in a row fail to lower the
gradient's norm, the draws are doubled and the rate is multiplied by 0.8. It ends when the norm is below
`tolerance` and no cell is empty, or when patience runs out after the last doubling.

The map has n values. `samplers.dpm_ot` samples with it.

Deviations from the official code: the source is standard normal, as the processes' own prior is
(theirs: uniform on [0, 1]^D); running minimum and count of failures start anew after a doubling, moments
are kept.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.array_files import read_arrays, write_arrays
from diffusion_jax.numerics import pytree_dataclass, static
from diffusion_jax.registry import check_choice

SourceFn = Callable[[jax.Array, int], jax.Array]
SOURCES = ("normal", "uniform")
_RATE_DECAY = 0.8
_BETAS, _EPS = (0.9, 0.999), 1e-8


def cells(x: jax.Array, targets: jax.Array, potential: jax.Array, chunk: int = 4096) -> jax.Array:
    """Equation (1): the cell of each point.

    Args:
      x: `[B, D]`; computed in float32 or better.
      targets: `[n, D]`.
      potential: h `[n]`.
      chunk: targets at a time: memory is B times chunk scores.
    Returns:
      int32 `[B]`, the first of equal scores.
    """
    count = targets.shape[0]
    dtype = jnp.promote_types(jnp.result_type(x, targets), jnp.float32)
    x, targets, potential = (jnp.asarray(v, dtype) for v in (x, targets, potential))

    def best_of(points, heights):
        scores = jnp.dot(x, points.T, precision=jax.lax.Precision.HIGHEST) + heights[None]
        return scores.max(axis=1), scores.argmax(axis=1).astype(jnp.int32)

    if count <= chunk:
        return best_of(targets, potential)[1]

    def body(carry, begin):
        best, cell = carry
        points = jax.lax.dynamic_slice_in_dim(targets, begin, chunk)
        value, at = best_of(points, jax.lax.dynamic_slice_in_dim(potential, begin, chunk))
        better = value > best
        return (jnp.where(better, value, best), jnp.where(better, begin + at, cell)), None

    # the last chunk overlaps the one before it: no padding, and a score seen twice changes nothing
    begins = np.minimum(np.arange(0, count, chunk), count - chunk).astype(np.int32)
    worst = jnp.full(x.shape[0], -jnp.inf, dtype), jnp.zeros(x.shape[0], jnp.int32)
    return jax.lax.scan(body, worst, jnp.asarray(begins))[0][1]


class PotentialState(NamedTuple):
    """What equation (3) moves: h, Adam's moments `[n]`, and the rate."""

    potential: Any
    first: Any
    second: Any
    rate: Any


def init_potential(
    count: int, learning_rate: float = 0.1, dtype: Any = jnp.float32
) -> PotentialState:
    """h = 0 for `count` targets."""
    zeros = jnp.zeros(count, dtype)
    return PotentialState(zeros, zeros, zeros, jnp.asarray(learning_rate, dtype))


def update_potential(state: PotentialState, masses: jax.Array) -> PotentialState:
    """Equation (3): one update from the measured masses `[n]`."""
    gradient = masses - 1.0 / masses.shape[0]
    first = _BETAS[0] * state.first + (1.0 - _BETAS[0]) * gradient
    second = _BETAS[1] * state.second + (1.0 - _BETAS[1]) * gradient**2
    potential = state.potential - state.rate * first / (jnp.sqrt(second) + _EPS)
    return PotentialState(potential - potential.mean(), first, second, state.rate)


@pytree_dataclass
class TransportMap:
    """The map (1); `transport(x)` is `[B, ...] -> [B, ...]`, differentiable nowhere.

    Attributes:
      potential: h float32 `[n]`.
      targets: `[n, ...]`.
      masses: the last measured masses `[n]`, 1 / n each where the fit is perfect.
      grad_norm: norm of (2) at `potential`, with the noise of its measurement.
      steps: updates made.
      t: the time that the targets are states of, or None.
      source: "normal", "uniform" (static) or "custom": the law that it was fitted for.
      chunk: targets at a time (static).
    """

    potential: Any
    targets: Any
    masses: Any = None
    grad_norm: Any = None
    steps: Any = None
    t: float | None = None
    source: str = static("normal")
    chunk: int = static(4096)

    def cells(self, x: jax.Array) -> jax.Array:
        """The index of the target of each point: `[B, ...] -> int32 [B]`.

        Raises:
          ValueError: points of another shape than the targets.
        """
        shapes = jnp.shape(x)[1:], jnp.shape(self.targets)[1:]
        if shapes[0] != shapes[1]:
            raise ValueError(f"the transport map takes points {shapes[1]}, got {shapes[0]}")
        flat = jnp.reshape(jnp.asarray(self.targets), (np.shape(self.targets)[0], -1))
        return cells(jnp.reshape(x, (jnp.shape(x)[0], -1)), flat, self.potential, self.chunk)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The targets `[B, ...]` of points of the source `[B, ...]`."""
        return jnp.asarray(self.targets)[self.cells(x)].astype(x.dtype)

    def save(self, path: str | os.PathLike) -> Path:
        """Writes an .npz file, see `array_files`."""
        arrays = {f: getattr(self, f) for f in _ARRAYS if getattr(self, f) is not None}
        return write_arrays(path, _FORMAT, {"source": self.source, "chunk": self.chunk}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TransportMap":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: no such file.
          ValueError: a damaged file, or none of a transport map.
        """

        def build(about, held):
            numbers = {n: held.pop(n).item() for n in ("t", "grad_norm", "steps") if n in held}
            return cls(**{name: jnp.asarray(v) for name, v in held.items()}, **numbers, **about)

        return read_arrays(path, _FORMAT, "transport map", build)


_FORMAT = "diffusion_jax.transport_map.1"
_ARRAYS = ("potential", "targets", "masses", "grad_norm", "steps", "t")


def _source(source: str | SourceFn, size: int) -> tuple[str, SourceFn]:
    if callable(source):
        return "custom", source
    check_choice("source", source, SOURCES)
    draw = jax.random.normal if source == "normal" else jax.random.uniform
    return source, lambda key, count: draw(key, (count, size))


class _Fit(NamedTuple):
    state: PotentialState
    masses: Any
    norm: Any
    best: Any
    bad: Any
    doublings: Any
    step: Any
    done: Any


def semi_discrete_transport(
    key: jax.Array,
    targets: Any,
    source: str | SourceFn = "normal",
    *,
    learning_rate: float = 0.1,
    draws: int | None = None,
    batch_size: int = 4096,
    patience: int = 50,
    max_doublings: int = 3,
    tolerance: float = 8e-4,
    max_steps: int = 10_000,
    chunk: int = 4096,
    t: float | None = None,
) -> TransportMap:
    """Fits the map (1) from a source law to points of equal weight; one compiled loop.

    Memory is `batch_size` times `chunk` scores beside the targets, whatever their number.

    Args:
      key: of the draws; used once.
      targets: `[n, ...]` floating, n >= 2.
      source: "normal" (standard), "uniform" (on [0, 1]^D), or `(key, count) -> [count, D]`, a pure
        function of jax.
      learning_rate: of (3), in the unit of h (squared length).
      draws: source points for the first estimates of the masses, default 10 n.
      batch_size: source points at a time.
      patience: updates in a row that may fail to lower the gradient's norm.
      max_doublings: how often the draws are doubled.
      tolerance: norm of (2) to stop at. An estimate from N draws has itself a norm of about N^(-1/2).
      max_steps: most updates.
      chunk: targets at a time.
      t: recorded in the map, see `TransportMap`.
    Raises:
      ValueError: targets of another kind, an unknown source or one of another shape, sizes that are
        not positive.
    """
    targets = jnp.asarray(targets)
    if targets.ndim < 2 or targets.shape[0] < 2 or not jnp.issubdtype(targets.dtype, jnp.floating):
        raise ValueError(
            f"targets must be floating [n, ...] with n >= 2, got {targets.dtype} {targets.shape}"
        )
    count, flat = targets.shape[0], targets.reshape(targets.shape[0], -1)
    draws = 10 * count if draws is None else draws
    sizes = {
        "draws": draws,
        "batch_size": batch_size,
        "patience": patience,
        "max_steps": max_steps,
        "chunk": chunk,
    }
    for name, value in {**sizes, "max_doublings": max_doublings + 1}.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be positive, got {learning_rate}")
    law, draw = _source(source, flat.shape[1])
    batch_size = min(batch_size, draws)
    drawn = jax.eval_shape(lambda k: draw(k, batch_size), key)
    if drawn.shape != (batch_size, flat.shape[1]):
        raise ValueError(
            f"the source draws shape {drawn.shape} for {batch_size} points, targets have"
            f" {flat.shape[1]} values"
        )

    @jax.jit
    def fit(key, flat, learning_rate, tolerance):
        return _fit(
            key, flat, draw, learning_rate, tolerance, -(-draws // batch_size), batch_size,
            patience, max_doublings, max_steps, chunk,
        )  # fmt: skip

    end = fit(key, flat, learning_rate, tolerance)
    return TransportMap(
        potential=end.state.potential,
        targets=targets,
        masses=end.masses,
        grad_norm=float(end.norm),
        steps=int(end.step),
        t=None if t is None else float(t),
        source=law,
        chunk=chunk,
    )


def _fit(
    key, flat, draw, rate, tolerance, batches, batch_size, patience, max_doublings, max_steps, chunk
):
    count = flat.shape[0]

    def measure(potential, key, batches):
        def add(i, counts):
            points = draw(jax.random.fold_in(key, i), batch_size)
            return counts.at[cells(points, flat, potential, chunk)].add(1)

        counts = jax.lax.fori_loop(0, batches, add, jnp.zeros(count, jnp.int32))
        return counts.astype(jnp.float32) / (batches * batch_size).astype(jnp.float32)

    def body(fit: _Fit) -> _Fit:
        masses = measure(
            fit.state.potential, jax.random.fold_in(key, fit.step), batches * 2**fit.doublings
        )
        norm = jnp.sqrt(jnp.sum((masses - 1.0 / count) ** 2))
        better = norm < fit.best
        bad = jnp.where(better, 0, fit.bad + 1)
        failed = bad > patience
        solved = (norm < tolerance) & (masses.min() > 0)
        done = solved | (failed & (fit.doublings >= max_doublings)) | (fit.step >= max_steps)
        double = failed & ~done
        moved = update_potential(fit.state, masses)
        moved = moved._replace(rate=jnp.where(double, _RATE_DECAY * moved.rate, moved.rate))
        return _Fit(
            state=jax.tree.map(lambda new, old: jnp.where(done, old, new), moved, fit.state),
            masses=masses,
            norm=norm,
            best=jnp.where(double, jnp.inf, jnp.minimum(norm, fit.best)),
            bad=jnp.where(double, 0, bad),
            doublings=fit.doublings + double,
            step=fit.step + ~done,
            done=done,
        )

    zero = jnp.zeros((), jnp.int32)
    start = _Fit(
        init_potential(count, rate),
        jnp.zeros(count, jnp.float32),
        jnp.float32(jnp.inf),
        jnp.float32(jnp.inf),
        zero,
        zero,
        zero,
        jnp.zeros((), bool),
    )
    return jax.lax.while_loop(lambda fit: ~fit.done, body, start)
