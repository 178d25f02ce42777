"""Euler's method for bridges, from the probability-flow ODE to SDEs of any diffusion.

With s = grad log q(x_t | x1) the score, v the velocity of the flow and time running down, all of
  (1) dx = [v - (kappa g^2 / 2) s] dt + sqrt(kappa) g dw
have the marginals q(x_t | x1) (stochastic interpolants, arXiv 2303.08797, where epsilon is
kappa g^2 / 2): kappa = 0 is the flow, 1 the reverse SDE, more is more noise to the same law. For the
bridge of an SDE (DDBM, arXiv 2309.16948) with h = grad log q(x1 | x_t) the bracket is
  (2) f x - (1 + kappa)/2 g^2 (alpha x0_hat - x) / (alpha rho)^2 + (1 - kappa)/2 g^2 h:
only h is singular at the source, and kappa = 1 has none of it: x1 drops out.

Where it starts: kappa = 1 on the bridge of an SDE at the source, t = t_max. Otherwise v and s are
infinite there. Where kappa >= 1 the source is put 1e-4 (of the paper's clock) below t = 1, as DDBM
does: the noise forgets it, as (gap / (1 - t))^(kappa / 2). Where kappa < 1 it would do so too late,
and the flow never: it would give one answer for a source. There the first call is a boot:
- kappa > 0: it lands one n-th of the way down, n the number of calls.
- kappa = 0: behind the boot the residual grows like sqrt(1 - t), of which Euler makes 1.13 times as
  much with any number of equal steps. So the flow has a grid uniform in lam, from 1/100 of the way
  down, and tens of steps to make; `dbim` has no such trouble. A table (I2SB) cannot follow that
  grid: it keeps its own, and the excess.
"""

import itertools
from collections.abc import Callable

import numpy as np

from diffusion_jax.processes import SDEBridge
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.bridge_steps import (
    booted,
    check_bridge,
    check_calls,
    check_entries,
    check_noise,
    expecting,
)
from diffusion_jax.samplers.linear import SRC, D, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times

_GAP = 1e-4  # of the paper's clock, without a boot
_FLOW_GAP = 1e-2  # of the range, for the boot before the flow
_CALLS = 100
BOOTINGS = ("none", "draw", "given")


def _amount(name: str, value: float | Callable, t) -> float:
    """A number, or a function of t at t."""
    value = float(value(float(t)) if callable(value) else value)
    if not 0.0 <= value < np.inf:
        raise ValueError(
            f"{name} must not be negative and must be finite, got {value} at t = {t:g}"
        )
    return value


def _even_grid(process) -> str | None:
    """The grid uniform in lam, where the process can invert lam."""
    if hasattr(process, "intervals"):
        return None
    try:
        process.t_of_lam(0.0)
    except ValueError:
        return None
    return "log_snr"


def _drift(process, t, half):
    """The bracket of (1) at t; `half` is kappa g^2 / 2."""
    if not isinstance(process, SDEBridge):
        return process.velocity(Y, D, SRC, t) - half * process.score(Y, D, SRC, t)
    f, own, alpha = process.drift(t), 0.5 * process.diffusion_squared(t), process.alpha(t)
    drift = f * Y - (own + half) / (alpha**2 * process.rho2(t)) * (alpha * D - Y)
    if half == own:
        return drift
    return drift + (own - half) * process.kernel_score(Y, SRC, t)


def _euler(
    name,
    process,
    num_steps=None,
    kappa=None,
    epsilon=None,
    booting=None,
    denoise=True,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    check_bridge(process)
    if kappa is not None and epsilon is not None:
        raise ValueError("kappa and epsilon say the same: give one of them")
    kappa = 1.0 if kappa is None else kappa

    amount = kappa if epsilon is None else epsilon

    def half_noise(t):
        """kappa g^2 / 2 at t."""
        if epsilon is None:
            return _amount("kappa", kappa, t) * (0.5 * float(process.diffusion_squared(t)))
        return _amount("epsilon", epsilon, t)

    deterministic = not callable(amount) and amount == 0.0
    regular = isinstance(process, SDEBridge) and epsilon is None and kappa == 1.0
    below = process.t_max if regular else min(process.t_max, 1.0 - _GAP / process.clock_scale)
    below = below if t_start is None else t_start
    if booting is None:
        own = 0.5 * float(process.diffusion_squared(below))
        booting = "none" if half_noise(below) >= own else "draw"
    check_choice("booting", booting, BOOTINGS)
    check_calls(name, num_steps, 1 if booting == "none" else 2)
    if booting == "none":
        times = build_times(process, num_steps, grid, below, t_end, default_steps=_CALLS)
        points = [process.point(t) for t in times]
        rows = Rows(source=True, centre=True)
    else:
        part = 1.0 / (_CALLS if num_steps is None else num_steps)
        if grid is None and deterministic:
            grid = _even_grid(process)
            part = part if grid is None else _FLOW_GAP
        last = process.sampling_range[1] if t_end is None else t_end
        start = process.t_max - (process.t_max - last) * part if t_start is None else t_start
        steps = None if num_steps is None else num_steps - 1
        times = build_times(process, steps, grid, start, t_end, default_steps=_CALLS - 1)
        points = [process.point(t) for t in times]
        rows = booted(process, points[0], booting, centre=True)
    check_entries(process, times)
    if not regular or getattr(process, "ot_ode", False):
        check_noise(process, points[:-1])
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        half = half_noise(t)
        kick = 0.0 if denoise and i == len(times) - 2 else np.sqrt(2.0 * half * (t - t_next))
        rows.add(points[i], Y + (t_next - t) * _drift(process, t, half) + kick * Z)
    sampler = rows.sampler(points[-1], order=1 if deterministic else None, name=name)
    return sampler if booting == "none" else expecting(sampler, booting)


@register("sampler", "bridge_euler", family="bridge", paper="2303.08797")
def bridge_euler(
    process,
    num_steps: int | None = None,
    *,
    kappa: float | Callable | None = None,
    epsilon: float | Callable | None = None,
    booting: str | None = None,
    denoise: bool = True,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """Euler (-Maruyama) steps of (1); `x_init` is the source.

    Args:
      process: a bridge process.
      num_steps: network calls, default 100: n steps, or the boot and n - 1 steps.
      kappa: how much of the process's own diffusion, 0 or more, a number or a function of t; default 1.
      epsilon: the noise by itself, kappa g^2 / 2, in place of kappa: a number or a function of t.
      booting: "none" starts at `x_init` (a `Pinned(source, x)` starts at x), "draw" by a boot, "given"
        by one whose noise is handed in, x_init = `Pinned(source, noise)`; None chooses "none" where
        kappa >= 1 at the first time, else "draw".
      denoise: leave out the noise of the last step.
      grid, t_start, t_end: see `time_grids.build_times`; the first time is the booted one. Their
        defaults are described above; t_end is t_min.
    Raises:
      ValueError: kappa or epsilon negative or both given, an unknown booting, not a bridge, a step
        that starts where c = 0 (a path without noise; for I2SB's `ot_ode` take `i2sb`), two times on one
        entry of a table, or another bad grid; when sampling, an x_init that does not fit `booting`.
    """
    return _euler("bridge_euler", **locals())


@register("sampler", "bridge_ode", family="bridge", paper="2303.08797", order=1, min_steps=2)
def bridge_ode(process, num_steps: int | None = None, **options) -> Sampler:
    """`bridge_euler` with kappa = 0: Euler's method for the probability-flow ODE, after a boot."""
    check_bridge(process)
    return _euler("bridge_ode", process, num_steps, **{"kappa": 0.0, **options})
