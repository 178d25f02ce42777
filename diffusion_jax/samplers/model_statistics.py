"""Empirical model statistics (EMS): what DPM-Solver-v3 knows of a model beside its calls.

arXiv 2310.13268, appendix C.1.1. Along lam = log(alpha / sigma), elementwise over the data's axes, with
f = (sigma eps - l x) / alpha and f1 = df/dlam along the probability-flow ODE:
  (1) l = E[diag(sigma d eps / dx)], the best linear part of the noise term
  (2) s = Cov(f, f1) / Var(f), b = E[f1] - s E[f], the best f1 ~ s f + b
over x = alpha x0 + sigma z with x0 from the data.

Everything is a polynomial in l and l' of moments that know neither, so one pass over the data is enough.
With D = x0_hat, u = sigma eps / alpha = x / alpha - D, D1 = dD/dlam along the ODE and p = 1 - l:
  (3) p = alpha E[diag(dD/dx)]            x' = (log alpha)' x - alpha u, for every Gaussian process
  (4) f = p u - l D,  f1 = -(p + l') u - l' D - D1
In these variables nothing cancels at either end of the schedule.

Deviations from the paper: l' is a central difference of l over lam (the paper does not say how). Where
f hardly varies (Gaussian data, pixels that never change), s is 0 / 0: s = 0 is taken there, b is then the
mean of f1, and |s| is limited. The published program has no code for these statistics.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.array_files import read_arrays, write_arrays
from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import example_keys, join_traced, normal_per_example, split_traced
from diffusion_jax.processes import GaussianProcess

_FORMAT = "diffusion_jax.model_statistics.1"
_ARRAYS = ("lam", "l", "s", "b")


def describe(process: Any) -> str:
    """Name and numbers of a process; its interval [t_min, t_max] does not count."""
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"statistics need a Gaussian process, got {type(process).__name__}")
    fields = [f.name for f in dataclasses.fields(process) if f.name not in ("t_min", "t_max")]
    values = {name: np.asarray(getattr(process, name)).tolist() for name in fields}
    return f"{type(process).__name__}({', '.join(f'{k}={v!r}' for k, v in values.items())})"


def _finite_range(process, t_start, t_end):
    """The times asked for, moved to [t_min, t_max] where the log-SNR is infinite."""
    start, end = process.sampling_range
    start, end = (start if t_start is None else t_start), (end if t_end is None else t_end)
    if not 0.0 <= float(end) < float(start) <= 1.0:
        raise ValueError(f"need 0 <= t_end < t_start <= 1, got t_start={start}, t_end={end}")
    start = start if np.isfinite(process.lam(start)) else process.t_max
    end = end if np.isfinite(process.lam(end)) else process.t_min
    return float(start), float(end)


def _lam_nodes(process, t_start, t_end, intervals):
    """Times of the ends, and `intervals` + 1 equidistant values of lam between them."""
    if not isinstance(intervals, int | np.integer) or intervals < 1:
        raise ValueError(f"intervals must be a positive int, got {intervals!r}")
    start, end = _finite_range(process, t_start, t_end)
    ends = float(process.lam(start)), float(process.lam(end))
    return start, end, np.linspace(*ends, int(intervals) + 1)


@dataclasses.dataclass(frozen=True, eq=False)
class ModelStatistics:
    """l, s and b of a model at increasing lam, float64 on the host.

    Attributes:
      lam: `[N + 1]`, increasing from lam(t_start) to lam(t_end).
      l, s, b: `[N + 1, *data]`; `[N + 1]` for statistics that hold for data of any shape.
      process: what they were computed for, as `describe` writes it.
      t_start, t_end: the range in time.
      num: samples of data used; 0 for statistics that need none.
      checksum: of the model's parameters, or None where unknown.
    Raises:
      ValueError: lam that does not increase, arrays of unequal shape, values that are not finite.
    """

    lam: np.ndarray
    l: np.ndarray
    s: np.ndarray
    b: np.ndarray
    process: str
    t_start: float
    t_end: float
    num: int = 0
    checksum: str | None = None

    def __post_init__(self):
        for name in _ARRAYS:
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64))
        shapes = {name: getattr(self, name).shape for name in ("l", "s", "b")}
        count = len(self.lam) if self.lam.ndim == 1 else 0
        if (
            count < 2
            or any(s[:1] != (count,) for s in shapes.values())
            or len({*shapes.values()}) > 1
        ):
            raise ValueError(
                f"statistics need lam [N + 1] and l, s, b [N + 1, *data]; got {self.lam.shape}, {shapes}"
            )
        for name in _ARRAYS:
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(f"statistics: {name} holds values that are not finite")
        if not (np.diff(self.lam) > 0).all():
            raise ValueError("statistics: lam must increase strictly")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example, `()` for statistics that hold for any."""
        return self.l.shape[1:]

    @property
    def intervals(self) -> int:
        """N."""
        return len(self.lam) - 1

    @property
    def constant(self) -> bool:
        """Whether l, s and b are the same at every lam, and so known beyond the range too."""
        return all((v == v[:1]).all() for v in (self.l, self.s, self.b))

    @classmethod
    def data_prediction(cls, process, t_start=None, t_end=None, intervals=1) -> "ModelStatistics":
        """l = 1, s = b = 0 ("degenerated" in the authors' code): DPM-Solver++, for data of any shape."""
        return cls._constant(process, t_start, t_end, intervals, 1.0, 0.0)

    @classmethod
    def noise_prediction(cls, process, t_start=None, t_end=None, intervals=1) -> "ModelStatistics":
        """l = 0, s = -1, b = 0: DPM-Solver, for data of any shape."""
        return cls._constant(process, t_start, t_end, intervals, 0.0, -1.0)

    @classmethod
    def _constant(cls, process, t_start, t_end, intervals, l, s):
        name = describe(process)
        start, end, lam = _lam_nodes(process, t_start, t_end, intervals)
        l, s, b = (np.full(lam.shape, v) for v in (l, s, 0.0))
        return cls(lam, l, s, b, name, start, end)

    def check(self, process: Any, shape: tuple[int, ...] | None = None) -> None:
        """Raises ValueError if the statistics are of another process, or of data of another shape."""
        if describe(process) != self.process:
            raise ValueError(
                f"statistics were computed for {self.process}, the process is {describe(process)}"
            )
        if shape is not None and self.shape not in ((), tuple(shape)):
            raise ValueError(
                f"statistics were computed for data of shape {self.shape}, the data have {tuple(shape)}"
            )

    def save(self, path: str | os.PathLike) -> None:
        """Writes an .npz file, see `array_files`."""
        about = {
            name: getattr(self, name) for name in ("process", "t_start", "t_end", "num", "checksum")
        }
        write_arrays(path, _FORMAT, about, {name: getattr(self, name) for name in _ARRAYS})

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ModelStatistics":
        """Reads what `save` wrote. Nothing in the file is executed.

        Raises:
          FileNotFoundError: no such file.
          ValueError: the file is damaged, or is not one of statistics.
        """
        return read_arrays(
            path, _FORMAT, "model statistics", lambda about, arrays: cls(**arrays, **about)
        )


def _schedule(process, lam):
    """Points at lam and their derivatives in lam: two dictionaries of float64 `[N + 1]`."""
    points = process.point(np.asarray(process.t_of_lam(lam)))
    with jax.enable_x64(True):
        at = jnp.asarray(lam, jnp.float64)
        _, rates = jax.jvp(
            lambda v: process.point(process.t_of_lam(v)), (at,), (jnp.ones_like(at),)
        )
        rates = {k: np.asarray(v) for k, v in rates.items()}
    return {k: np.broadcast_to(v, lam.shape) for k, v in points.items()}, rates


_PAIRS = (("D", "D"), ("D", "u"), ("u", "u"), ("D", "D1"), ("u", "D1"))


def _one_level(denoise, x0, noise, probes, weight, point, rate):
    """Moments over a chunk at one lam: means of D, u, D1, p, and centred second moments `_PAIRS`."""
    alpha, sigma = point["alpha"], point["sigma"]
    x = alpha * x0 + sigma * noise

    def predict(x, point):
        return evaluate(denoise, x, point)[0]

    def along(v):
        return jax.jvp(lambda x: predict(x, point), (x,), (v,))[1]

    data = predict(x, point)
    u = x / alpha - data
    dx = rate["alpha"] / alpha * x - alpha * u
    values = {"D": data, "u": u, "D1": jax.jvp(predict, (x, point), (dx, rate))[1]}
    if probes is None:
        size = int(np.prod(x.shape[1:]))

        def entry(i):
            unit = jax.nn.one_hot(i, size, dtype=x.dtype).reshape(x.shape[1:])
            return along(jnp.broadcast_to(unit, x.shape)).reshape(len(x), size)[:, i]

        diagonal = jax.lax.map(entry, jnp.arange(size)).T.reshape(x.shape)
    else:
        diagonal = jax.lax.map(lambda v: v * along(v), probes).mean(axis=0)
    values["p"] = alpha * diagonal
    w = (weight / weight.sum()).reshape(-1, *(1,) * (x.ndim - 1))
    means = {name: (w * value).sum(axis=0) for name, value in values.items()}
    centred = {name: value - means[name] for name, value in values.items()}
    return means, {pair: (w * centred[pair[0]] * centred[pair[1]]).sum(axis=0) for pair in _PAIRS}


def _chunk_pass(arrays, static, x0, noise, probes, weight, points, rates):
    """Moments of a chunk at every lam, one after another: `[N + 1, *data]` each, no sample axis."""
    denoise = join_traced(arrays, static)
    return jax.lax.map(
        lambda row: _one_level(denoise, x0, noise, probes, weight, *row), (points, rates)
    )


class _Moments:
    """Means and second moments of all chunks so far, merged in float64."""

    def __init__(self):
        self.count, self.means, self.products = 0, None, None

    def merge(self, count, means, products):
        means, products = (
            {k: np.asarray(v, np.float64) for k, v in part.items()} for part in (means, products)
        )
        if self.count == 0:
            self.count, self.means, self.products = count, means, products
            return
        share = count / (self.count + count)
        step = {k: means[k] - self.means[k] for k in means}
        for pair in _PAIRS:
            between = share * (1.0 - share) * step[pair[0]] * step[pair[1]]
            step_in = share * (products[pair] - self.products[pair])
            self.products[pair] = self.products[pair] + step_in + between
        self.means = {k: self.means[k] + share * step[k] for k in means}
        self.count += count


def _solve(lam, moments, slope_limit, resolution):
    """l, s and b from the moments, formulas (2) and (4)."""
    m, c = moments.means, moments.products
    p = m["p"]
    l, dl = 1.0 - p, np.gradient(-p, lam, axis=0)
    parts = p**2 * c["u", "u"] + l**2 * c["D", "D"]
    variance = parts - 2.0 * p * l * c["D", "u"]
    # f = p u - l D against f1 = -(p + l') u - l' D - D1
    covariance = (
        -p * (p + dl) * c["u", "u"]
        + l * dl * c["D", "D"]
        + (l * (p + dl) - p * dl) * c["D", "u"]
        - p * c["u", "D1"]
        + l * c["D", "D1"]
    )
    varies = variance > resolution * parts
    s = np.where(varies, covariance / np.where(varies, variance, 1.0), 0.0)
    s = s.clip(-slope_limit, slope_limit)
    f = p * m["u"] - l * m["D"]
    f1 = -(p + dl) * m["u"] - dl * m["D"] - m["D1"]
    return l, s, f1 - s * f


@jax.jit
def _draw_noise(keys, like):
    return normal_per_example(keys, like)


@jax.jit
def _draw_probe(keys, like):
    return jax.vmap(lambda k: jax.random.rademacher(k, like.shape[1:], like.dtype))(keys)


def model_statistics(
    process: Any,
    denoise: Callable,
    key: Any,
    x0: Any,
    *,
    conditions: Any = None,
    intervals: int = 120,
    t_start: float | None = None,
    t_end: float | None = None,
    batch_size: int = 64,
    probes: int = 1,
    exact_diagonal: bool = False,
    slope_limit: float = 5.0,
    noise: Any = None,
    probe_vectors: Any = None,
    checksum: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ModelStatistics:
    """The statistics of a denoiser on data, for `dpm_solver_v3`.

    Memory does not grow with the number of samples: chunks of data go through one compiled program that
    walks lam, and only sums come back. A sample costs, at each of the N + 1 values of lam, a network call
    with `1 + probes` forward derivatives. The noise and the probes of a sample are the same at every lam
    (its own number decides them), so that l varies smoothly and l' is not noise.

    Take the statistics of the very function that is sampled with, guidance and clipping included: the
    solver's formula is exact for any l, s and b, and best for those of the function it integrates.

    Args:
      process: a Gaussian process.
      denoise: `(x, t) -> x0_hat`, differentiable in x and t; with `conditions` a function from a chunk of
        them to such a denoiser (a pytree, as `Method.denoiser` returns: a closure compiles every time).
      key: a `jax.random.key`.
      x0: data `[num, *shape]`, floating point; anything that slices to arrays. 512 to 4096 samples are
        usual: their number matters more than that of the intervals.
      conditions: a pytree with leading axis num (labels of the data), or None.
      intervals: N; 120 to 1200 in the paper.
      t_start, t_end: range, default that of the process's samplers, kept where the log-SNR is finite.
      batch_size: samples at a time.
      probes: Rademacher vectors a sample for the diagonal.
      exact_diagonal: one derivative for each of the data's numbers instead: for tests and small data.
      slope_limit: bound on |s|: few data and a network that has learnt little make it a ratio of noise, and
        the solver takes its exponential. Exact models stay near [-2, 2].
      noise, probe_vectors: draws to use instead of those of `key`, `[num, *shape]` and
        `[probes, num, *shape]`.
      checksum: of the model's parameters, to be kept with the statistics.
      progress: called with (samples done, num) after each chunk.
    Raises:
      ValueError: a number out of range, too few data, draws of another shape, a denoiser whose output is
        not finite or not of the data's shape.
    """
    name = describe(process)
    start, end, lam = _lam_nodes(process, t_start, t_end, intervals)
    for option, value in {"batch_size": batch_size, "probes": probes}.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{option} must be a positive int, got {value!r}")
    num, shape = len(x0), tuple(np.shape(x0)[1:])
    dtype = jnp.promote_types(getattr(x0, "dtype", jnp.float32), jnp.float32)
    if num < 2 or not jnp.issubdtype(getattr(x0, "dtype", jnp.float32), jnp.floating):
        raise ValueError(
            f"x0 must be at least two floating-point samples [num, *shape]; got {num} of "
            f"{getattr(x0, 'dtype', type(x0).__name__)}"
        )
    given = {"noise": (noise, (num, *shape)), "probe_vectors": (probe_vectors, (num, *shape))}
    for option, (value, need) in given.items():
        got = None if value is None else np.shape(value)[1 if option == "probe_vectors" else 0 :]
        if got not in (None, need):
            raise ValueError(f"{option} must end in the data's shape {need}; got {np.shape(value)}")
    points, rates = _schedule(process, lam)
    points, rates = ({k: v.astype(dtype) for k, v in part.items()} for part in (points, rates))
    # a function of this call: the program, and what the denoiser closes over, go when it ends
    run = jax.jit(lambda *chunk: _chunk_pass(*chunk), static_argnums=1)
    streams = [jax.random.fold_in(key, i) for i in range(1 + probes)]
    moments, size = _Moments(), min(batch_size, num)
    for begin in range(0, num, size):
        count = min(size, num - begin)
        rows = np.minimum(np.arange(begin, begin + size), num - 1)  # the last chunk is filled up
        weight = (np.arange(size) < count).astype(dtype)
        part = jnp.asarray(np.asarray(x0[begin : begin + count]), dtype)[rows - begin]
        own = denoise
        if conditions is not None:
            chunk = jax.tree.map(lambda v, rows=rows: jnp.asarray(np.asarray(v)[rows]), conditions)
            own = denoise(chunk)
        keys = [example_keys(stream, jnp.asarray(rows, jnp.int32)) for stream in streams]
        z = _draw_noise(keys[0], part) if noise is None else jnp.asarray(noise[rows], dtype)
        v = None
        if not exact_diagonal and probe_vectors is not None:
            v = jnp.asarray(np.asarray(probe_vectors)[:, rows], dtype)
        elif not exact_diagonal:
            v = jnp.stack([_draw_probe(k, part) for k in keys[1:]])
        means, products = run(*split_traced(own), part, z, v, weight, points, rates)
        moments.merge(count, means, products)
        if progress is not None:
            progress(begin + count, num)
    for pair, value in moments.products.items():
        bad = ~np.isfinite(value.reshape(len(lam), -1)).all(axis=1)
        if bad.any():
            raise ValueError(
                f"the denoiser is not finite at lam = {lam[bad.argmax()]:.4g} (moment {pair})"
            )
    resolution = 16.0 * float(jnp.finfo(dtype).eps)
    l, s, b = _solve(lam, moments, slope_limit, resolution)
    return ModelStatistics(lam, l, s, b, name, start, end, num, checksum)
