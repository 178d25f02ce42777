"""ODE and SDE samplers of stochastic interpolants, with the diffusion chosen after training.

(Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797.) From a sample x1 of the source at t = 1 down to t = 0:

  (1) dx = (u - eps s) dt + sqrt(2 eps) dW, time running down, u the velocity and s the score;

every eps(t) >= 0 gives the same marginals, eps = 0 is the ODE. A denoiser of these samplers is a field: it
returns the drift, `fields.InterpolantField` or `oracles.GaussianInterpolant`, which reads "epsilon"
from the point of the call. These samplers are for models that are not told the source: it is the start and nothing
else (`bridge_euler` and `dbim` are for models that are told).

  (2) Euler-Maruyama: x' = x + h D(x, t) + sqrt(2 eps(t) |h|) z
  (3) Heun: x~ = x + h D(x, t) + w z, x' = x + h/2 (D(x, t) + D(x~, t')) + w z, with the same z and
      w^2 = |h| (eps(t) + eps(t')): weak order 2, the noise being additive. A last step to where c = 0 is
      (2): there u is infinite like 1 / c unless the data have a smooth density.

Where c is not 0 throughout, the default grid is "both_ends": u and s change within times like c^2, fast at
both ends. On Gaussian ends with epsilon = 1 and 20 steps, (3) with it is ten times nearer to the data's law than
with equal steps. Its longest steps are in the middle: few of them with a large epsilon are unstable.

Deviations: the authors' "heun" adds the noise before both stages and evaluates both at t', which is of
order 1 and no better than (2); (3) is the trapezoidal rule.
"""

import itertools
from collections.abc import Callable, Mapping

import numpy as np

from diffusion_jax.processes import BridgeProcess
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.linear import A, D, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times

# What a number epsilon multiplies, as a function of (process, t).
SHAPES = {
    "constant": lambda process, t: 1.0,
    "gamma": lambda process, t: process.c(t),
    "gamma_squared": lambda process, t: process.c(t) ** 2,
    "sde": lambda process, t: 0.5 * process.diffusion_squared(t),
}


class _Path:
    """Times of the states, points of the calls, and eps at both."""

    def __init__(self, process, num_steps, epsilon, shape, ode_end, backward, grid, ends, steps):
        if not isinstance(process, BridgeProcess):
            raise ValueError(
                f"an interpolant sampler needs a bridge process, got {type(process).__name__}"
            )
        if grid is None and process.c(0.5) > 0:
            grid = "both_ends"
        whole = [end is None or end == limit for end, limit in zip(ends, (1.0, 0.0))]
        inner = [None if is_whole else end for is_whole, end in zip(whole, ends)]
        times = build_times(process, num_steps, grid, *inner, default_steps=steps)
        if grid is None or isinstance(grid, str | Mapping) or callable(grid):  # else times as given
            times[0], times[-1] = 1.0 if whole[0] else times[0], 0.0 if whole[1] else times[-1]
        self.t = times[::-1] if backward else times
        self.called = np.clip(self.t, process.t_min, process.t_max)
        self.process, self.sign = process, -1.0 if backward else 1.0
        self.epsilon = _diffusion(process, self.called, epsilon, shape)
        self.ode_end, self.steps = ode_end, len(times) - 1
        self.stochastic = any(sum(self.of_step(i)) > 0 for i in range(self.steps))

    def of_step(self, i):
        """eps at the start and the end of step i."""
        if self.ode_end and i == self.steps - 1:
            return 0.0, 0.0
        return self.epsilon[i], self.epsilon[i + 1]

    def ends_without_noise(self, i):
        """Whether step i arrives where c = 0 from where it was not."""
        c = [self.process.c(t) for t in self.t[i : i + 2]]
        return c[0] > 0 and c[1] == 0

    def point(self, i, epsilon):
        """The point at which the field is called for the state at `t[i]`."""
        point = self.process.point(self.called[i])
        return {**point, "epsilon": self.sign * epsilon} if self.stochastic else point


def _diffusion(process, times, epsilon, shape):
    check_choice("shape", shape, SHAPES)
    if callable(epsilon):
        if shape != "constant":
            raise ValueError(
                f"epsilon is a function already: shape must be left out, got {shape!r}"
            )
        values = [epsilon(t) for t in times]
    else:
        # not 0 * shape: a schedule may be infinite where nothing is asked of it
        values = [epsilon * SHAPES[shape](process, t) if epsilon else 0.0 for t in times]
    values = np.asarray([np.asarray(v, np.float64) for v in values])
    if values.shape != np.shape(times) or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(
            f"epsilon must be a finite number not below 0 at every time, got {epsilon} with values {values}"
        )
    return values


@register(
    "sampler", "interpolant_euler", family="bridge", paper="2303.08797", calls="n", output="drift"
)
def interpolant_euler(
    process,
    num_steps: int | None = None,
    *,
    epsilon: float | Callable = 0.0,
    shape: str = "constant",
    ode_end: bool = False,
    backward: bool = False,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """Euler-Maruyama on an interpolant's SDE (Euler on its ODE); `x_init` is a sample of the source.

    Numbers may be swept without compiling again; only epsilon = 0 everywhere is another program, one
    that draws nothing.

    Args:
      process: an interpolant, or any bridge process.
      num_steps: steps and network calls, default 50.
      epsilon: eps, a number or a function of t.
      shape: what a number multiplies: "constant" 1, "gamma" c(t), "gamma_squared" c(t)^2, "sde" half the
        g(t)^2 of the process (then a bridge of an SDE runs that SDE in reverse).
      ode_end: the last step follows the ODE, so that no noise is left in the result.
      backward: from data (`x_init`) to the source instead.
      grid, t_start, t_end: see `time_grids.build_times`; default "both_ends" where the process has noise,
        from 1 to 0. Calls outside [t_min, t_max] of
        the process are made at its ends.
    Raises:
      ValueError: an epsilon below 0 or not finite, an unknown shape, not a bridge, or a bad grid.
    """
    ends = t_start, t_end
    p = _Path(process, num_steps, epsilon, shape, ode_end, backward, grid, ends, 50)
    rows = Rows()
    for i, (t, t_next) in enumerate(itertools.pairwise(p.t)):
        here, _ = p.of_step(i)
        h, noise = t_next - t, np.sqrt(2.0 * here * abs(t_next - t))
        rows.add(p.point(i, here), Y + h * D + noise * Z)
    order = None if p.stochastic else 1
    return rows.sampler(p.point(p.steps, 0.0), order=order, name="interpolant_euler")


@register(
    "sampler", "interpolant_heun", family="bridge", paper="2303.08797", calls="2n-1", output="drift"
)
def interpolant_heun(
    process,
    num_steps: int | None = None,
    *,
    epsilon: float | Callable = 0.0,
    shape: str = "constant",
    ode_end: bool = False,
    backward: bool = False,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """Heun's rule on an interpolant's SDE or ODE: order 2, in law where there is noise.

    Two network calls a step, one on a last step to where c = 0; 25 steps by default. The arguments and errors
    are those of `interpolant_euler`.
    """
    ends = t_start, t_end
    p = _Path(process, num_steps, epsilon, shape, ode_end, backward, grid, ends, 25)
    rows = Rows()
    for i, (t, t_next) in enumerate(itertools.pairwise(p.t)):
        here, there = p.of_step(i)
        h, noise = t_next - t, np.sqrt((here + there) * abs(t_next - t))
        if p.ends_without_noise(i):
            rows.add(p.point(i, here), Y + h * D + noise * Z)
            continue
        rows.add(p.point(i, here), Y + h * D + noise * Z, anchor=Y + 0.5 * h * D + noise * Z)
        rows.add(p.point(i + 1, there), A + 0.5 * h * D, anchor=Y)
    order = None if p.stochastic else 2
    return rows.sampler(p.point(p.steps, 0.0), order=order, name="interpolant_heun")
