"""Deterministic Gaussian solvers as points of a vector space: what `fit_table` moves in.

For N network calls and a history of K predictions:
  (1) y_{i+1} = r_i (1 + rho_i) y_i + k_i sum_{j < K} theta_ij nabla^j D_i,  D_i = denoise(y_i, t_i)
  (2) r_i = sigma_{i+1} / sigma_i,  k_i = alpha_{i+1} - r_i alpha_i  follow the times
  (3) the inner times lie between fixed ends by increments of lam = log(alpha / sigma) that stay positive
nabla^j are backward differences: smaller with every order, so they are a far better conditioned basis
than the predictions themselves. rho = 0 with theta_i0 = 1 carries a constant prediction exactly (DDIM has
no other theta).
With the whole history (K = N) form (1) is every explicit linear solver of N calls; tables of noise
predictions are the same set, as eps_j = (y_j - alpha_j D_j) / sigma_j.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import namespace
from diffusion_jax.samplers.linear import D, H, LinearStep, Rows, Y
from diffusion_jax.samplers.scan import Sampler


def unroll(sampler: Sampler) -> tuple[np.ndarray, np.ndarray]:
    """Every iterate of a deterministic table as `y_i = a_i x + sum_j W_ij D_j`: a `[N + 1]`, W `[N + 1, N]`.

    Raises:
      ValueError: not a table, one that draws noise, has a source, an init row, a constant column or
        coefficients with data axes.
    """
    structure = getattr(sampler.step, "structure", None)
    if not isinstance(sampler.step, LinearStep):
        raise ValueError(f"sampler {sampler.name!r} is not a table")
    columns = {column for _, row in structure.rows for column in row}
    odd = [name for name, kind in columns if kind == "v" or name == "one"]
    if sampler.stochastic or structure.source or structure.init or odd:
        raise ValueError(
            f"sampler {sampler.name!r}: only deterministic tables of scalar coefficients, without "
            "source, constant column or init row, can be unrolled"
        )
    size = sampler.nfe
    y = np.eye(1 + size)[0]
    registers = {name: y for name, _ in structure.rows if name not in ("y", "push")}
    history, path = [np.zeros_like(y)] * structure.history, [y]
    for i in range(size):
        basis = {"y": y, "D": np.eye(1 + size)[1 + i], **registers}
        basis |= {f"h{k + 1}": entry for k, entry in enumerate(history)}
        scalars, written = iter(np.asarray(sampler.xs["scalars"][i], np.float64)), {}
        for output, row in structure.rows:
            terms = [basis[name] * (1.0 if kind == "1" else next(scalars)) for name, kind in row]
            written[output] = sum(terms, np.zeros_like(y))
        y = written["y"]
        registers = {name: written[name] for name in registers}
        history = [written["push"], *history[:-1]] if history else history
        path.append(y)
    path = np.stack(path)
    return path[:, 0], path[:, 1:]


@dataclasses.dataclass(frozen=True)
class TableForm:
    """The parametrisation (1)-(3): a vector `[P]` -> times and coefficients, on the host or traced.

    Attributes:
      process: the forward process.
      first, last: points where the first call is made and where the result stands.
      span: ends of lam between which the inner times lie.
      size, depth: N and K.
      consistent: whether constant predictions stay exact.
      with_times: whether the times are fitted.
      increments: `[n]`, those of lam at the start.
    """

    process: Any
    first: Any
    last: Any
    span: tuple
    size: int
    depth: int
    consistent: bool
    with_times: bool
    increments: Any

    def entries(self):
        """Rows and orders of the fitted thetas."""
        low = 1 if self.consistent else 0
        rows = [(i, j) for i in range(self.size) for j in range(low, min(i + 1, self.depth))]
        return np.array(rows, np.int32).reshape(-1, 2)

    def differences(self):
        """Row j holds the weights of `nabla^j D` on `D_i, D_{i-1}, ...`."""
        return np.array(
            [[(-1.0) ** m * math.comb(j, m) for m in range(self.depth)] for j in range(self.depth)]
        )

    def split(self, vector):
        """Log increments, rho and theta of a vector `[P]`."""
        times = len(self.increments) if self.with_times else 0
        rhos = 0 if self.consistent else self.size
        return vector[:times], vector[times : times + rhos], vector[times + rhos :]

    def inner_lam(self, logs):
        """lam at the inner times, `[N - 1]`."""
        xp = namespace(logs)
        steps = xp.asarray(self.increments, getattr(logs, "dtype", np.float64))
        steps = steps * xp.exp(logs) if self.with_times else steps
        low, high = self.span
        lam = low + (high - low) * xp.cumsum(steps) / steps.sum()
        return lam[: self.size - 1]

    def __call__(self, vector):
        """`(point with [N] entries, c [N], B [N, K])`: y' = c y + sum_j B_j D_{i-j}."""
        xp = namespace(vector)
        logs, rho, theta = self.split(vector)
        inner = self.process.point(self.process.t_of_lam(self.inner_lam(logs)))
        dtype = vector.dtype
        point = {
            name: xp.concatenate([xp.asarray(self.first[name], dtype).reshape(1), values])
            for name, values in inner.items()
        }
        alpha, sigma = (
            xp.concatenate([point[name], xp.asarray(self.last[name], dtype).reshape(1)])
            for name in ("alpha", "sigma")
        )
        r = sigma[1:] / sigma[:-1]
        k = alpha[1:] - r * alpha[:-1]
        rows, columns = self.entries().T
        theta = _put(xp, (self.size, self.depth), rows, columns, theta)
        if self.consistent:
            theta = theta + xp.eye(1, self.depth, dtype=dtype)
        else:
            r = r * (1.0 + rho)
        return point, r, k[:, None] * (theta @ xp.asarray(self.differences(), dtype))

    def start(self, weights, scales):
        """The vector whose table is the given one: weights `B [N, K]`, scales `c [N]`."""
        alpha, sigma = self.schedule()
        r = sigma[1:] / sigma[:-1]
        k = alpha[1:] - r * alpha[:-1]
        rho = np.where(r > 0, scales / np.where(r > 0, r, 1.0) - 1.0, 0.0)
        rows, columns = self.entries().T
        theta = np.linalg.solve(self.differences().T, (weights / k[:, None]).T).T[rows, columns]
        logs = np.zeros(len(self.increments) if self.with_times else 0)
        return np.concatenate([logs, [] if self.consistent else rho, theta])

    def schedule(self):
        """alpha and sigma `[N + 1]` at the start's times."""
        logs = np.zeros(len(self.increments))
        inner = self.process.point(self.process.t_of_lam(self.inner_lam(logs)))
        return (
            np.concatenate([[self.first[name]], inner[name], [self.last[name]]]).astype(np.float64)
            for name in ("alpha", "sigma")
        )

    def sampler(self, vector, name) -> Sampler:
        """The table in float64, built like any other solver."""
        point, c, weights = self(np.asarray(vector, np.float64))
        rows = Rows()
        for i in range(self.size):
            y = c[i] * Y + weights[i, 0] * D
            for j in range(1, min(i + 1, self.depth)):
                y = y + weights[i, j] * H(j)
            here = self.first if i == 0 else {n: v[i] for n, v in point.items()}
            rows.add(here, y, push=D)
        return rows.sampler(self.last, name=name)


def _put(xp, shape, rows, columns, values):
    if xp is np:
        table = np.zeros(shape)
        table[rows, columns] = values
        return table
    return jnp.zeros(shape, values.dtype).at[rows, columns].set(values)


def table_form(
    process, start: Sampler, history: int | None, consistent: bool, fit_times: bool
) -> tuple[TableForm, np.ndarray]:
    """The parametrisation around a start table, and the vector `[P]` of that table.

    Raises:
      ValueError: a start table that cannot be unrolled, or whose calls are not at decreasing times.
    """
    a, dense = unroll(start)
    size = start.nfe
    depth = size if history is None else min(history, size)
    points = start.xs["point"]
    first = {name: float(v[0]) for name, v in points.items()}
    last = {name: float(v[-1]) for name, v in start.xs["next"].items()}
    t = np.append(np.asarray(start.times, np.float64), last["t"])
    if not (np.diff(t) < 0).all():
        raise ValueError(
            f"start table {start.name!r} must make its calls at decreasing times (a multistep table)"
        )
    with np.errstate(divide="ignore"):
        lam = np.asarray(process.lam(t), np.float64)
    low = lam[0] if np.isfinite(lam[0]) else float(process.lam(process.t_max))
    high = lam[-1] if np.isfinite(lam[-1]) else float(process.lam(process.t_min))
    inner = lam[1:-1]
    low, high = min([low, *inner[:1]]), max([high, *inner[-1:]])
    increments = np.diff(np.concatenate([[low], inner, [high]]))
    # where an end of lam is infinite the limit is not a point, and an inner time may stand on it
    increments = np.maximum(increments, 1e-4 * (high - low))
    form = TableForm(
        process, first, last, (low, high), size, depth, consistent, fit_times, increments
    )
    scales = np.array([a[i + 1] / a[i] if a[i + 1] else 0.0 for i in range(size)])
    whole = dense[1:] - scales[:, None] * dense[:-1]
    weights = np.zeros((size, depth))
    for i in range(size):
        for j in range(i + 1):  # what is older than the table remembers goes to its oldest entry
            weights[i, min(j, depth - 1)] += whole[i, i - j]
    return form, form.start(weights, scales)
