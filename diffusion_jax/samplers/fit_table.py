"""`fit_table`: a solver is a table, a table is data, so it can be fitted to the model it will serve.

Own method of this library. The times and all coefficients of a deterministic solver (`table_form`) are
fitted by least squares of its end points against a fine solver from the same starts, by
Levenberg-Marquardt. The parameters are given to every example apart, so a row of the Jacobian costs one
backward pass through the solver for *all* of them; end points of many coordinates are projected on a few
random directions for the curvature alone (the gradient stays exact). Starts held out decide which
iterate is returned. The result is an ordinary table in float64, made for this model and this process;
`save_table` keeps it.

Relatives: solvers distilled with trained coefficients (arXiv 2310.19075, 2403.01329), which descend by
stochastic gradients.
Limits: coefficients are scalars; noise is not fitted; errors are those of the end points, so the states
on the way need not follow the flow.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import batch_size, join_traced, split_traced
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.registry import entry
from diffusion_jax.samplers.build import build_sampler
from diffusion_jax.samplers.dpm_solver import dpm_solver_pp
from diffusion_jax.samplers.linear import D, LinearStep, Rows, Structure, Y
from diffusion_jax.samplers.scan import Sampler, sample
from diffusion_jax.samplers.table_form import TableForm, table_form

_STARTS = tuple((n, g) for n in ("ddim", "dpmpp_2m", "dpmpp_3m") for g in ("log_snr", "quadratic"))


class FitReport(NamedTuple):
    """What a fit did; errors are root mean squares over examples and coordinates.

    Attributes:
      start: name of the table it began with.
      start_train, start_held_out: errors of that table against the teacher.
      train, held_out: errors of the returned table.
      best: the iteration that is returned (0: the start).
      history: `(train, held_out)` after each iteration.
      seconds: wall time, compilation and teacher included.
    """

    start: str
    start_train: float
    start_held_out: float
    train: float
    held_out: float
    best: int
    history: tuple
    seconds: float


def _runner(form: TableForm, shape, dtype):
    """`(denoise, vectors [B, P], x [B, ...]) -> y_N`: the table with parameters of each example apart."""
    ones = (1,) * (len(shape) - 1)
    names = [*(f"h{j}" for j in range(1, form.depth)), "D"]
    push = (("push", (("D", "1"),)),) if form.depth > 1 else ()
    row = ("y", (("y", "v"), *((name, "v") for name in names)))
    table = Rows()
    table.add(form.first, Y, push=D)
    like = table.sampler(form.last)
    structure = Structure((row, *push), form.depth - 1, None, (), False)
    step, init = LinearStep(structure), dataclasses.replace(like.init, structure=structure)

    def run(denoise, vectors, x):
        point, c, weights = jax.vmap(form)(vectors)

        def rows(values):  # [B, N] -> [N, B, 1, ...]
            return values.T.reshape(form.size, -1, *ones).astype(dtype)

        columns = [weights[:, :, j] for j in (*range(1, form.depth), 0)]
        point = {name: values.T for name, values in point.items()}
        xs = {
            "scalars": jnp.zeros((form.size, 0)),
            "arrays": tuple(rows(v) for v in (c, *columns)),
            "point": point,
            "next": point,
        }
        fitted = dataclasses.replace(like, init=init, step=step, xs=xs, nfe=form.size)
        return sample(fitted, denoise, None, x, remat=True)

    return run


def _flat(x):
    return x.reshape(x.shape[0], -1)


def _candidates(process, nfe):
    fitting = [s for s in _STARTS if entry("sampler", s[0]).meta.get("min_steps", 1) <= nfe]
    return [build_sampler(process, name, nfe, grid=grid) for name, grid in fitting]


def _check_options(process, x_init, nfe, history, held_out, directions, steps):
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"fit_table needs a Gaussian process, got {type(process).__name__}")
    for name, value, low in (
        ("nfe", nfe, 1),
        ("history", 1 if history is None else history, 1),
        ("directions", directions, 1),
        ("steps", steps, 0),
    ):
        if not isinstance(value, int | np.integer) or value < low:
            raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")
    if getattr(x_init, "ndim", 0) < 2 or not jnp.issubdtype(x_init.dtype, jnp.floating):
        raise ValueError(
            f"x_init must be floating-point starts [S, ...], got {getattr(x_init, 'shape', x_init)!r}"
        )
    count = len(x_init) - round(held_out * len(x_init))
    if not 0.0 < held_out < 1.0 or not 0 < count < len(x_init):
        raise ValueError(
            f"held_out = {held_out} of {len(x_init)} starts leaves none to fit on or none to judge by"
        )
    return count


def fit_table(
    process,
    denoise: Callable,
    key: Any,
    x_init: Any,
    *,
    nfe: int,
    start: Sampler | None = None,
    history: int | None = 4,
    consistent: bool = False,
    fit_times: bool = True,
    target: Any = None,
    teacher: Sampler | None = None,
    batch: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    features: Callable | None = None,
    held_out: float = 0.25,
    directions: int = 4,
    steps: int = 60,
    patience: int = 15,
) -> tuple[Sampler, FitReport]:
    """Fits a deterministic solver of `nfe` network calls to one model.

    Args:
      process: a Gaussian process.
      denoise: the denoiser the table will serve (whose `t` may be `[B]`); with `batch`, a function
        `batch -> denoiser`, e.g. `jax.tree_util.Partial(method.denoiser, params)`.
      key: a `jax.random.key`, for the random directions of the curvature.
      x_init: starts `[S, ...]` at the start table's first time, e.g. `process.prior(key, shape)`;
        its dtype is the dtype of the fit.
      nfe: network calls of the result.
      start: the table to begin with, calls at decreasing times; its first and last time are kept.
        Default: the best of DDIM, DPM-Solver++(2M) and (3M) on the log-SNR and the quadratic grid.
      history: K, how many predictions a step combines; None for all before it.
      consistent: keep constant predictions exact.
      fit_times: fit the inner times too.
      target: end points `[S, ...]` to reach; default those of `teacher`.
      teacher: default DPM-Solver++(3M, exact) with 300 steps on the log-SNR grid between the ends of
        the start table.
      batch: conditions of the starts, arrays `[S, ...]`.
      chunk: starts at a time (memory); must divide S. Default all. Needs `batch` if the denoiser
        closes over conditions of each example.
      features: `[B, ...] -> [B, ...]`, what is compared at the end points (default the points).
      held_out: fraction of the starts, the last ones, that only judge.
      directions: random directions of the curvature, for outputs of more coordinates than that.
      steps: most iterations; one costs `1 + directions` backward passes.
      patience: iterations without a better held-out error after which the fit ends.
    Returns:
      `(sampler, FitReport)`: the iterate best on the held-out starts, never worse there than the
      start.
    Raises:
      ValueError: another kind of process, an option out of range, a start table of another number of
        calls or of another kind, targets of another shape, a teacher that is not finite.
    """
    began = time.perf_counter()
    count = _check_options(process, x_init, nfe, history, held_out, directions, steps)
    total = batch_size((x_init, dict(batch or {})))
    chunk = total if chunk is None else chunk
    if not isinstance(chunk, int) or chunk < 1 or total % chunk:
        raise ValueError(f"chunk = {chunk!r} must divide the number of starts, {total}")
    x = jnp.asarray(x_init)
    arrays, static = split_traced(denoise)
    parts = jax.tree.map(
        lambda v: jnp.asarray(v).reshape(-1, chunk, *np.shape(v)[1:]), (x, dict(batch or {}))
    )
    compare = features or (lambda v: v)

    def bound(arrays, conditions):
        model = join_traced(arrays, static)
        return model(conditions) if batch is not None else model

    @jax.jit
    def ends(sampler, arrays):
        def one(part):
            return sample(sampler, bound(arrays, part[1]), None, part[0])

        return jax.lax.map(one, parts).reshape(x.shape)

    starts = [start] if start is not None else _candidates(process, nfe)
    if any(s.nfe != nfe for s in starts):
        raise ValueError(f"start table {start.name!r} makes {start.nfe} calls, nfe is {nfe}")
    forms = [table_form(process, s, history, consistent, fit_times) for s in starts]
    if target is None:
        if teacher is None:
            ends_at = {"t_start": starts[0].times[0], "t_end": starts[0].xs["next"]["t"][-1]}
            ends_at = {name: float(t) for name, t in ends_at.items()}
            teacher = dpm_solver_pp(process, 300, order=3, exact_d2=True, grid="log_snr", **ends_at)
        target = ends(teacher, arrays)
    target = jnp.asarray(target, x.dtype)
    if target.shape != x.shape:
        raise ValueError(f"target has shape {target.shape}, x_init {x.shape}")
    if not bool(jnp.isfinite(target).all()):
        raise ValueError("the teacher's end points are not finite")
    wanted = _flat(compare(target))
    train = np.arange(total) < count

    def rms(squares):
        mean = np.asarray(squares, np.float64)
        return float(np.sqrt(mean[train].mean())), float(np.sqrt(mean[~train].mean()))

    begun = [rms(((_flat(compare(ends(s, arrays))) - wanted) ** 2).mean(axis=1)) for s in starts]
    chosen = int(np.argmin([b[0] if np.isfinite(b[0]) else np.inf for b in begun]))
    form, vector = forms[chosen]
    evaluate, linearise = _functions(
        form, bound, parts, wanted, jnp.asarray(train, x.dtype), compare, chunk, directions
    )
    fitted = _descend(
        lambda v: rms(evaluate(arrays, jnp.asarray(v, x.dtype))),
        lambda v, i: linearise(arrays, jnp.asarray(v, x.dtype), jax.random.fold_in(key, i)),
        vector,
        steps,
        patience,
    )
    vector, best, errors, path = fitted
    sampler = form.sampler(vector, f"fit_table_{nfe}")
    if errors[1] >= begun[chosen][1]:
        sampler, best, errors = starts[chosen], 0, begun[chosen]
    seconds = time.perf_counter() - began
    name = starts[chosen].name
    return sampler, FitReport(name, *begun[chosen], *errors, best, tuple(path), seconds)


def _functions(form, bound, parts, wanted, train, compare, chunk, directions):
    """Compiled: mean squares an example `[S]` of a vector, and its normal equations `(J'J, J'r)`."""
    x, _ = parts
    dtype, width = wanted.dtype, wanted.shape[1]
    run = _runner(form, x.shape[1:], dtype)
    parts = (*parts, wanted.reshape(-1, chunk, width), train.reshape(-1, chunk))
    exact = width <= directions

    def residual(arrays, vectors, x, conditions, wanted):
        return _flat(compare(run(bound(arrays, conditions), vectors, x))) - wanted

    @jax.jit
    def evaluate(arrays, vector):
        def one(part):
            x, conditions, wanted, _ = part
            vectors = jnp.broadcast_to(vector, (chunk, *vector.shape))
            return (residual(arrays, vectors, x, conditions, wanted) ** 2).mean(axis=1)

        return jax.lax.map(one, parts).reshape(-1)

    @jax.jit
    def linearise(arrays, vector, key):
        def one(total, scanned):
            i, (x, conditions, wanted, mask) = scanned
            vectors = jnp.broadcast_to(vector, (chunk, *vector.shape))
            r, pull = jax.vjp(lambda v: residual(arrays, v, x, conditions, wanted), vectors)
            if exact:
                rows = jnp.broadcast_to(jnp.eye(width, dtype=dtype)[:, None], (width, *r.shape))
            else:
                drawn = jax.random.normal(jax.random.fold_in(key, i), (directions, *r.shape), dtype)
                rows = jnp.concatenate([r[None], drawn / np.sqrt(directions)])
            rows = jax.vmap(lambda v: pull(v)[0])(rows * mask[:, None])
            if exact:
                gradient = jnp.einsum("fbp,bf->p", rows, r)
            else:
                gradient, rows = rows[0].sum(axis=0), rows[1:]
            flat = rows.reshape(-1, rows.shape[-1])
            return (total[0] + flat.T @ flat, total[1] + gradient), None

        size = vector.shape[0]
        zero = jnp.zeros((size, size), dtype), jnp.zeros((size,), dtype)
        return jax.lax.scan(one, zero, (jnp.arange(x.shape[0]), parts))[0]

    return evaluate, linearise


def _descend(errors_of, linearise, vector, steps, patience):
    """Levenberg-Marquardt; `(vector, iteration, errors)` best on the held-out starts, and the path."""
    now, damping, path = errors_of(vector), 1e-2, []
    best = (vector, 0, now)
    for i in range(1, steps + 1):
        curvature, gradient = (np.asarray(v, np.float64) for v in linearise(vector, i))
        scale = np.diag(curvature)
        scale = scale + 1e-10 * max(scale.max(), 1e-300)
        found = None
        # a trial costs a forward pass, a linearisation ten: the damping is searched, not guessed
        for factor in (0.25, 4.0):
            level = damping if factor < 1 else damping * factor
            while 1e-10 < level < 1e6:
                step = np.linalg.solve(curvature + level * np.diag(scale), -gradient)
                tried = errors_of(vector + step)
                if not tried[0] < (now[0] if found is None else found[0][0]):
                    if found is None and factor > 1:
                        level *= factor
                        continue
                    break
                found = (tried, step, level)
                level *= factor
            if found is not None and found[2] < damping:
                break
        if found is None:
            break
        now, step, damping = found
        vector = vector + step
        path.append(now)
        if now[1] < best[2][1]:
            best = (vector, i, now)
        if i - best[1] >= patience:
            break
    return (*best, path)
