"""Time grids: `(process, num_steps, t_start, t_end) -> times [num_steps + 1]`, decreasing, float64.

`num_steps` is the number of intervals; the first time is `t_start` and the last `t_end`, both in the
library's clock (0 = data, 1 = noise). Grids that live in the log-SNR or in the noise level treat an end
where that is infinite (alpha = 0 or sigma = 0) so: the end itself is kept, and the other points are laid
out from the finite limit of the process, t_max or t_min. EDM's "n Karras points and then 0"
(arXiv 2206.00364) is `karras` with t_end = 0 and num_steps = n.

Naming trap: the Karras grid of NVlabs' EDM has n points and then 0; the ports in DEIS and DPM-Solver-v3
have n + 1 points that stop at sigma_min, which is `karras` with t_end = t_min.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_jax.registry import get, register

TimeGrid = Callable[..., np.ndarray]


@register("time_grid", "uniform")
def uniform(process, num_steps, t_start, t_end):
    """Equal steps of t."""
    return np.linspace(t_start, t_end, num_steps + 1)


@register("time_grid", "quadratic")
def quadratic(process, num_steps, t_start, t_end, power=2.0):
    """Equal steps of t^(1/power): steps shrink towards the data (DDIM, DEIS)."""
    roots = np.linspace(t_start ** (1.0 / power), t_end ** (1.0 / power), num_steps + 1)
    return np.concatenate([[t_start], roots[1:-1] ** power, [t_end]])  # the ends without rounding


def _with_infinite_ends(process, num_steps, t_start, t_end, finite, grid):
    """Lays `grid(first, last, intervals)` between the ends at which `finite(t)` holds."""
    head = [] if finite(t_start) else [t_start]
    tail = [] if finite(t_end) else [t_end]
    inner = num_steps - len(head) - len(tail)
    if inner < 0:
        return np.array([t_start, t_end][: num_steps + 1], np.float64)
    first = process.t_max if head else t_start
    last = process.t_min if tail else t_end
    points = np.array([first]) if inner == 0 else grid(first, last, inner)
    if not head:
        points[0] = t_start  # the ends exactly, not through the inverse
    if not tail:
        points[-1] = t_end if inner else points[-1]
    return np.concatenate([head, points, tail])


@register("time_grid", "log_snr")
def log_snr(process, num_steps, t_start, t_end):
    """Equal steps of the log signal-to-noise ratio (DPM-Solver, arXiv 2206.00927)."""

    def grid(first, last, n):
        lam = np.linspace(process.lam(first), process.lam(last), n + 1)
        return np.asarray(process.t_of_lam(lam), np.float64)

    return _with_infinite_ends(
        process, num_steps, t_start, t_end, lambda t: np.isfinite(process.lam(t)), grid
    )


@register("time_grid", "karras")
def karras(process, num_steps, t_start, t_end, rho=7.0):
    """Equal steps of u^(1/rho), u = sigma / alpha (bridges: the paper's own time) (arXiv 2206.00364)."""

    def grid(first, last, n):
        ends = process.noise_level(first), process.noise_level(last)
        u = np.linspace(ends[0] ** (1.0 / rho), ends[1] ** (1.0 / rho), n + 1) ** rho
        return np.asarray(process.t_of_noise_level(u), np.float64)

    def finite(t):
        with np.errstate(divide="ignore"):
            level = process.noise_level(t)
        return bool(np.isfinite(level) and level > 0)

    return _with_infinite_ends(process, num_steps, t_start, t_end, finite, grid)


def build_times(
    process: Any,
    num_steps: int | None,
    grid: str | TimeGrid | np.ndarray | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    default_steps: int | None = None,
) -> np.ndarray:
    """The decreasing times `[num_steps + 1]` of a sampler.

    Args:
      process: gives `sampling_range` and `default_grid` where nothing is said.
      num_steps: number of intervals; None takes that of explicit times, or else `default_steps`.
      grid: a registered name, a callable `(process, num_steps, t_start, t_end)`, or the times
        themselves `[num_steps + 1]`.
      t_start, t_end: ends, defaults `process.sampling_range`.
    Raises:
      ValueError: unknown name, num_steps not a positive int, times that do not decrease strictly or
        leave [0, 1].
    """
    start, end = process.sampling_range
    start = start if t_start is None else t_start
    end = end if t_end is None else t_end
    explicit = grid is not None and not isinstance(grid, str) and not callable(grid)
    if not explicit:
        num_steps = default_steps if num_steps is None else num_steps
        if not isinstance(num_steps, int | np.integer) or num_steps < 1:
            raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
        if not 0.0 <= float(end) < float(start) <= 1.0:
            raise ValueError(f"need 0 <= t_end < t_start <= 1, got t_start={start}, t_end={end}")
        lay = get("time_grid", grid or process.default_grid) if not callable(grid) else grid
        times = np.asarray(lay(process, int(num_steps), float(start), float(end)), np.float64)
    else:
        times = np.asarray(grid, np.float64)
        num_steps = len(times) - 1 if num_steps is None and times.ndim == 1 else num_steps
    if times.ndim != 1 or len(times) != num_steps + 1 or len(times) < 2:
        raise ValueError(f"{num_steps} steps need {num_steps} + 1 times, got shape {times.shape}")
    if not (np.diff(times) < 0).all():
        at = int((np.diff(times) >= 0).argmax())
        raise ValueError(
            f"times must decrease strictly: times[{at}:{at + 2}] = {times[at : at + 2]}"
        )
    if times[0] > 1.0 or times[-1] < 0.0:
        raise ValueError(f"times must lie in [0, 1], got {times[0]} to {times[-1]}")
    return times
