"""Time grids: `(process, num_steps, t_start, t_end) -> times [num_steps + 1]`, decreasing, float64.

`num_steps` is the number of intervals; the first time is `t_start` and the last `t_end`, both in the
library's clock (0 = data, 1 = noise). Grids that live in the log-SNR or in the noise level treat an end
where that is infinite (alpha = 0 or sigma = 0) so: the end itself is kept, and the other points are laid
out from the finite limit of the process, t_max or t_min. EDM's "n Karras points and then 0"
(arXiv 2206.00364) is `karras` with t_end = 0 and num_steps = n.

Naming traps:
- The Karras grid of NVlabs' EDM has n points and then 0; the ports in DEIS and DPM-Solver-v3 have n + 1
  points that stop at sigma_min, which is `karras` with t_end = t_min.
- Where a model was trained on N integer labels 0..N-1, label n stands at t = (n + 1) / N
  (`processes.discrete_vp`). "Leading" spacing starts at label (n - 1) N // n and never sees the last
  noise level; "trailing" starts at N - 1 (arXiv 2305.08891). Both end on clean data, t = 0.
- A step into t = 0 (sigma = 0) takes the network's x0_hat as it is and has order 1. A grid that stops at
  t_min leaves noise of sigma(t_min) in the result unless the sampler is told `denoise_to_zero`, which
  costs one more call. `t_eps` of other libraries is `t_end`.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_jax.registry import check_choice, closest, entry, get, register

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


@register("time_grid", "cosine", paper="2406.04329")
def cosine(process, num_steps, t_start, t_end):
    """`t = cos(pi/2 (1 - s))`, s uniform, stretched to the ends: small steps at the noise (MD4, MaskGIT)."""
    fractions = np.sin(0.5 * np.pi * np.linspace(1.0, 0.0, num_steps + 1))
    return np.concatenate([[t_start], t_end + (t_start - t_end) * fractions[1:-1], [t_end]])


@register("time_grid", "both_ends")
def both_ends(process, num_steps, t_start, t_end):
    """Equal steps of the angle in `t = sin(angle)^2`, stretched to the ends: small steps at both.

    On a Brownian bridge or interpolant c = sin(angle) cos(angle): its slope is finite in the angle.
    """
    fractions = np.sin(0.5 * np.pi * np.linspace(0.0, 1.0, num_steps + 1)) ** 2
    return np.concatenate([[t_start], t_start + (t_end - t_start) * fractions[1:-1], [t_end]])


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


def _finite_level(process):
    def finite(t):
        with np.errstate(divide="ignore", invalid="ignore"):
            level = process.noise_level(t)
        return bool(np.isfinite(level) and level > 0)

    return finite


@register("time_grid", "karras")
def karras(process, num_steps, t_start, t_end, rho=7.0):
    """Equal steps of u^(1/rho), u = sigma / alpha (bridges: the paper's own time) (arXiv 2206.00364)."""

    def grid(first, last, n):
        ends = process.noise_level(first), process.noise_level(last)
        u = np.linspace(ends[0] ** (1.0 / rho), ends[1] ** (1.0 / rho), n + 1) ** rho
        return np.asarray(process.t_of_noise_level(u), np.float64)

    return _with_infinite_ends(process, num_steps, t_start, t_end, _finite_level(process), grid)


@register("time_grid", "arctan")
def arctan(process, num_steps, t_start, t_end):
    """Equal steps of arctan(u), u = sigma / alpha: the KL-optimal family for Gaussian data (2404.14507)."""

    def grid(first, last, n):
        angles = np.linspace(
            np.arctan(process.noise_level(first)), np.arctan(process.noise_level(last)), n + 1
        )
        return np.asarray(process.t_of_noise_level(np.tan(angles)), np.float64)

    return _with_infinite_ends(process, num_steps, t_start, t_end, _finite_level(process), grid)


@register("time_grid", "shifted")
def shifted(process, num_steps, t_start, t_end, shift=3.0):
    """Uniform s mapped by t = shift s / (1 + (shift - 1) s): more steps near the noise (2403.03206)."""
    if shift <= 0:
        raise ValueError(f"shift must be positive, got {shift}")
    ends = (t / (shift - (shift - 1.0) * t) for t in (t_start, t_end))
    s = np.linspace(*ends, num_steps + 1)
    return np.concatenate([[t_start], (shift * s / (1.0 + (shift - 1.0) * s))[1:-1], [t_end]])


def _train_steps(process, num_steps, train_steps):
    train_steps = train_steps or getattr(process, "num_train_steps", 1000)
    if num_steps > train_steps:
        raise ValueError(f"{num_steps} steps do not fit into {train_steps} training labels")
    return train_steps


@register("time_grid", "leading", own_ends=True)
def leading(process, num_steps, t_start, t_end, train_steps=None):
    """Labels 0, N // n, 2 (N // n), ... from the highest down, then t = 0 (DDIM's uniform sequence).

    Label N - 1 stands at t_start; the ends are the grid's own, t_end is not used. N is `train_steps`,
    default that of the process, or 1000. Unlike the authors' `range(0, N, N // n)` it always has n labels.
    """
    total = _train_steps(process, num_steps, train_steps)
    labels = np.arange(num_steps - 1, -1, -1) * (total // num_steps)
    return np.append(t_start * (labels + 1) / total, 0.0)


@register("time_grid", "trailing", own_ends=True)
def trailing(process, num_steps, t_start, t_end, train_steps=None):
    """Labels N - 1, N - 1 - N/n, ... (rounded), then t = 0; ends of its own, see `leading`."""
    total = _train_steps(process, num_steps, train_steps)
    labels = np.round(total - np.arange(num_steps) * (total / num_steps)) - 1.0
    return np.append(t_start * (labels + 1) / total, 0.0)


@register("time_grid", "respaced", own_ends=True, paper="2102.09672")
def respaced(process, num_steps, t_start, t_end, train_steps=None):
    """Labels 0 to N - 1 in equal steps, both ends among them, rounded, then t = 0 (iDDPM, ADM, DiT).

    The authors' sampling with "250" of 1000 steps; their "ddim50" is `leading`. Ends of its own.
    """
    total = _train_steps(process, num_steps, train_steps)
    stride = (total - 1) / max(num_steps - 1, 1)
    labels = np.round(np.cumsum(np.append(0.0, np.full(num_steps - 1, stride))))[::-1]
    return np.append(t_start * (labels + 1) / total, 0.0)


@register("time_grid", "entries", paper="2302.05872", any_process=False)
def entries(process, num_steps, t_start, t_end):
    """Equally spaced entries of a process that is a table (I2SB), rounded, from the entry of t_start down.

    Raises:
      ValueError: a process without `intervals`, or more steps than it has entries between the ends.
    """
    count = getattr(process, "intervals", None)
    if count is None:
        raise ValueError(
            f"grid 'entries' needs a process that is a table; {type(process).__name__} is none"
        )
    first, last = np.round((count - 1) * t_start), np.round((count - 1) * t_end)
    if num_steps > first - last:
        raise ValueError(
            f"{num_steps} steps do not fit between the entries {first:g} and {last:g} of the table"
        )
    # summed up from the data side, as the authors do: halves between two entries then round alike
    steps = np.cumsum(np.append(last, np.full(num_steps, (first - last) / num_steps)))
    return np.round(steps)[::-1] / (count - 1)


# Noise levels u for 10 steps (arXiv 2404.14507, table 3).
_AYS = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "deepfloyd_if": (160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    "svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


@register("time_grid", "align_your_steps", paper="2404.14507", own_ends=True, any_process=False)
def align_your_steps(process, num_steps, t_start, t_end, model="sd15"):
    """Align Your Steps: the published noise levels of one model; other lengths by linear log u.

    Its ends are its own: t_start and t_end are not used. `model` is "sd15", "sdxl", "deepfloyd_if" or
    "svd".

    Raises:
      ValueError: unknown model, or a process that does not reach these noise levels.
    """
    check_choice("model", model, _AYS)
    log_u = np.log(_AYS[model])
    u = np.exp(np.interp(np.linspace(0.0, len(log_u) - 1.0, num_steps + 1), np.arange(11), log_u))
    low, high = process.noise_level(process.t_min), process.noise_level(process.t_max)
    if u[-1] < low or u[0] > high:
        raise ValueError(
            f"the {model!r} table spans noise levels {u[0]:.4g} to {u[-1]:.4g}; this process spans "
            f"{high:.4g} to {low:.4g}"
        )
    return np.asarray(process.t_of_noise_level(u), np.float64)


def resolve_grid(process: Any, grid: Any) -> TimeGrid | np.ndarray:
    """A rule or an array of times from what `build_times` takes as `grid`.

    Raises:
      ValueError: an unknown name, or options that the named grid does not have.
    """
    grid = process.default_grid if grid is None else grid
    if isinstance(grid, str):
        return get("time_grid", grid)
    if isinstance(grid, Mapping):
        options = {k: v for k, v in grid.items() if k != "name"}
        if "name" not in grid:
            raise ValueError(f"a grid given as a mapping needs a 'name', got {dict(grid)}")
        lay = get("time_grid", grid["name"])
        valid = list(inspect.signature(lay).parameters)[4:]
        for option in options:
            if option not in valid:
                raise ValueError(
                    f"time grid {grid['name']!r} has no option {option!r}{closest(option, valid)}"
                )
        return functools.partial(lay, **options)
    return grid if callable(grid) else np.asarray(grid, np.float64)


def inner_rule(process: Any, grid: Any) -> TimeGrid:
    """The rule that divides one step of a grid: the grid's own, or `log_snr` where its ends are its own."""
    name = grid.get("name") if isinstance(grid, Mapping) else grid
    if isinstance(name, str) and entry("time_grid", name).meta.get("own_ends"):
        return log_snr
    return resolve_grid(process, grid)


def build_times(
    process: Any,
    num_steps: int | None,
    grid: str | Mapping | TimeGrid | np.ndarray | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    default_steps: int | None = None,
) -> np.ndarray:
    """The decreasing times `[num_steps + 1]` of a sampler.

    Args:
      process: gives `sampling_range` and `default_grid` where nothing is said.
      num_steps: number of intervals; None takes that of explicit times, or else `default_steps`.
      grid: a registered name, `{"name": ..., options}`, a callable
        `(process, num_steps, t_start, t_end)`, or the times themselves `[num_steps + 1]`.
      t_start, t_end: ends, defaults `process.sampling_range`.
    Raises:
      ValueError: unknown name or option, num_steps not a positive int, times that do not decrease
        strictly or leave the range of the process.
    """
    start, end = process.sampling_range
    start = start if t_start is None else t_start
    end = end if t_end is None else t_end
    rule = resolve_grid(process, grid)
    if callable(rule):
        num_steps = default_steps if num_steps is None else num_steps
        if not isinstance(num_steps, int | np.integer) or num_steps < 1:
            raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
        if not 0.0 <= float(end) < float(start) <= 1.0:
            raise ValueError(f"need 0 <= t_end < t_start <= 1, got t_start={start}, t_end={end}")
        times = np.asarray(rule(process, int(num_steps), float(start), float(end)), np.float64)
    else:
        times = rule
        num_steps = len(times) - 1 if num_steps is None and times.ndim == 1 else num_steps
    if times.ndim != 1 or len(times) != num_steps + 1 or len(times) < 2:
        raise ValueError(f"{num_steps} steps need {num_steps} + 1 times, got shape {times.shape}")
    if not (np.diff(times) < 0).all():
        at = int((np.diff(times) >= 0).argmax())
        raise ValueError(
            f"times must decrease strictly: times[{at}:{at + 2}] = {times[at : at + 2]}"
        )
    latest = max(process.t_max, process.sampling_range[0])
    if times[0] > latest or times[-1] < 0.0:
        raise ValueError(
            f"times must lie in [0, {latest}], the range of {type(process).__name__}; "
            f"got {times[0]} to {times[-1]}"
        )
    return times
