"""From the source without a boot: I2SB's posterior sampler, and the solvers of Bridge-TTS.

I2SB (Liu et al., arXiv 2302.05872), Bridge-TTS (Chen et al., arXiv 2312.03491). With the base noise
F = (x - alpha x0_hat) / (alpha rho), u = x / alpha, r = rho^2, tau a temperature, s -> t a step and
primes for values at t:
  (1) SDE, x0 frozen    u' = (r'/r) u + (1 - r'/r) x0_hat + sqrt(r' (1 - r'/r) / tau) z
  (2) SDE, F frozen     u' = u - 2 (rho - rho') F + sqrt((r - r') / tau) z
  (3) ODE, x0 frozen    the exact first-order step of `bridge_steps`
  (4) ODE, F frozen     v' = rho_bar' (v / rho_bar - (phi - phi') F), v = u - x1 / alpha_T,
                        sin phi = rho / rho_T
All are exact integrals of the reverse SDE `du = 2 F d rho + sqrt(dr) dw` or of the flow
`dv/dr = F / (2 rho) - v / (2 rho_bar^2)` with the frozen part constant over the step. (1) is the
posterior q(x_t | x_s, x0_hat) of the base diffusion: x1 has dropped out. No noise in the last step.

Equivalences: (1) at tau = 1 is DBIM's step with eta = 1, (3) that with eta = 0.
Deviations: none known. Bridge-TTS released no code; tau divides the variance.
"""

import itertools

import numpy as np

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.bridge_steps import (
    check_calls,
    check_entries,
    check_noise,
    check_sde_bridge,
    first_order,
)
from diffusion_jax.samplers.linear import SRC, D, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times

_GAP = 1e-5  # where Bridge-TTS starts below the source


def _stochastic(process, prediction, s, t):
    """Mean and deviation of (1) or (2)."""
    alpha, alpha_t = process.alpha(s), process.alpha(t)
    r, r_t = process.rho2(s), process.rho2(t)
    if prediction == "x0":
        keep = r_t / r
        mean = alpha_t * (keep / alpha * Y + (1.0 - keep) * D)
        return mean, alpha_t * np.sqrt(r_t * (1.0 - keep))
    rho, rho_t = np.sqrt(r), np.sqrt(r_t)
    noise = (Y - alpha * D) / (alpha * rho)
    return alpha_t * (Y / alpha - 2.0 * (rho - rho_t) * noise), alpha_t * np.sqrt(r - r_t)


def _deterministic(process, prediction, s, t):
    """(3) or (4)."""
    if prediction == "x0":
        return first_order(process.point(s), process.point(t))
    alpha, rho = process.alpha(s), np.sqrt(process.rho2(s))
    bar, bar_t = np.sqrt(process.rho_bar2(s)), np.sqrt(process.rho_bar2(t))
    # arctan2 keeps the digits that arcsin loses where rho nears rho_T
    angle = np.arctan2(rho, bar) - np.arctan2(np.sqrt(process.rho2(t)), bar_t)
    noise = (Y - alpha * D) / (alpha * rho)
    pinned = SRC / process.alpha_T()
    return process.alpha(t) * (pinned + bar_t / bar * (Y / alpha - pinned) - bar_t * angle * noise)


def _from_the_source(process, times, name, kind, prediction, temperature) -> Sampler:
    points = [process.point(t) for t in times]
    check_entries(process, times)
    if kind == "ode":
        check_noise(process, points[:-1])
    rows, last = Rows(source=True, centre=kind == "ode"), len(times) - 2
    for i, (s, t) in enumerate(itertools.pairwise(times)):
        if kind == "ode":
            y = _deterministic(process, prediction, s, t)
        else:
            y, deviation = _stochastic(process, prediction, s, t)
            quiet = i == last or temperature == np.inf
            y = y + (0.0 if quiet else deviation / np.sqrt(temperature)) * Z
        rows.add(points[i], y)
    return rows.sampler(points[-1], order=1 if kind == "ode" else None, name=name)


@register("sampler", "i2sb", family="bridge", paper="2302.05872")
def i2sb(
    process,
    num_steps: int | None = None,
    *,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """I2SB's sampler, ancestral sampling of any SDE's bridge (1); `x_init` is the source.

    The network need not see the source. On a process with `ot_ode` nothing is drawn.

    Args:
      process: the bridge of an SDE, `I2SB` for the paper.
      num_steps: network calls, default 10; the released code's NFE.
      grid, t_start, t_end: see `time_grids.build_times`, from t_max to t_min; grid None is "entries",
        equally spaced entries, for a process that is a table, else its own default.
    Equivalences: `dbim` with eta = 1 after its boot.
    Raises:
      ValueError: not the bridge of an SDE, two times on one entry of the table, or another bad grid.
    """
    check_sde_bridge(process, "i2sb")
    check_calls("i2sb", num_steps, 1)
    if grid is None and hasattr(process, "intervals"):
        grid = "entries"
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=10)
    temperature = np.inf if getattr(process, "ot_ode", False) else 1.0
    return _from_the_source(process, times, "i2sb", "sde", "x0", temperature)


@register("sampler", "bridge_tts", family="bridge", paper="2312.03491")
def bridge_tts(
    process,
    num_steps: int | None = None,
    *,
    kind: str = "sde",
    prediction: str = "x0",
    temperature: float = 1.0,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """The first-order solvers of Bridge-TTS, (1) to (4); `x_init` is the source.

    Args:
      process: the bridge of an SDE: `GmaxBridge`, `VPBridge`, `BrownianBridge` in the paper.
      num_steps: network calls, default 50.
      kind: "sde", or "ode": one answer for a source.
      prediction: what is frozen over a step, "x0" or "noise" (the base noise F). The denoiser gives
        x0_hat for both.
      temperature: of the SDE: its noise has variance 1 / temperature; the paper takes 2.
      grid, t_start, t_end: see `time_grids.build_times`; by default from 1 - 1e-5 to t_min, equal
        steps where the process says nothing else.
    Equivalences: "sde" with "x0" and temperature 1 is `dbim` with eta = 1, "ode" with "x0" that with
      eta = 0, both without the boot.
    Raises:
      ValueError: an unknown kind or prediction, a temperature that is not positive, or other than 1
        with "ode", not the bridge of an SDE, a start of the ODE at the source itself, or a bad grid.
    """
    check_sde_bridge(process, "bridge_tts")
    check_choice("kind", kind, ("sde", "ode"))
    check_choice("prediction", prediction, ("x0", "noise"))
    if not 0.0 < temperature < np.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if kind == "ode" and temperature != 1.0:
        raise ValueError(f"the ODE draws no noise: temperature must be 1, got {temperature}")
    check_calls("bridge_tts", num_steps, 1)
    start = min(process.t_max, 1.0 - _GAP) if t_start is None else t_start
    times = build_times(process, num_steps, grid, start, t_end, default_steps=50)
    name = "bridge_tts" if kind == "sde" else "bridge_tts_ode"
    return _from_the_source(process, times, name, kind, prediction, temperature)


@register("sampler", "bridge_tts_ode", family="bridge", paper="2312.03491", order=1)
def bridge_tts_ode(process, num_steps: int | None = None, **options) -> Sampler:
    """`bridge_tts` with kind="ode"."""
    return bridge_tts(process, num_steps, **{"kind": "ode", **options})
