"""DBIM: implicit samplers for trained bridges (Zheng et al., arXiv 2405.15885).

  (1) boot, the only way to leave the source: D = D(x1, t = 1), x = a x1 + b D + c z
  (2) step s -> t: x' = k x + (b' - k b) D + (a' - k a) x1 + w z, k = sqrt(c'^2 - w^2) / c,
      w = eta alpha' rho' sqrt(1 - rho'^2 / rho^2)
Deviations: none; on the last step the noise is dropped while k keeps w, as in the authors' code.
"""

import itertools

import numpy as np

from diffusion_jax.registry import register
from diffusion_jax.samplers.ddbm import check_bridge
from diffusion_jax.samplers.linear import SRC, D, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times

_BOOT_GAP = 1e-3  # of the paper's clock: where the boot lands


@register("sampler", "dbim", family="bridge", paper="2405.15885", order=1)
def dbim(
    process,
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """First-order DBIM; `x_init` is the source.

    Equivalences: eta = 1 is the posterior sampler of I2SB and the first-order SDE step of Bridge-TTS
    (the source drops out); eta = 0 is the first-order step of the bridge's probability-flow ODE.

    Args:
      process: a bridge process.
      num_steps: network calls, default 20, at least 2: one at the source, then one on each grid point
        but the last.
      eta: 0 (deterministic after the boot) to 1 (Markovian).
      grid, t_start, t_end: times `[num_steps]` from just below t = 1 (1e-3 of the paper's clock) to
        t_min; see `time_grids.build_times`, with `num_steps - 1` intervals.
    Raises:
      ValueError: eta outside [0, 1], fewer than 2 calls, not a bridge, or a bad grid.
    """
    check_bridge(process)
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if num_steps is not None and num_steps < 2:
        raise ValueError(f"dbim needs at least 2 network calls, got num_steps={num_steps}")
    start = process.t_max - _BOOT_GAP / process.clock_scale if t_start is None else t_start
    intervals = None if num_steps is None else num_steps - 1
    times = build_times(process, intervals, grid, start, t_end, default_steps=19)
    points = [process.point(t) for t in times]
    rows = Rows(source=True)
    boot = points[0]
    rows.add(process.point(process.t_max), boot["a"] * SRC + boot["b"] * D + boot["c"] * Z)
    for i, (here, there) in enumerate(itertools.pairwise(points)):
        w = 0.0
        if eta > 0:
            rho2, rho2_next = process.rho2(times[i]), process.rho2(times[i + 1])
            w = eta * process.alpha(times[i + 1]) * np.sqrt(rho2_next * (1.0 - rho2_next / rho2))
        k = np.sqrt(max(there["c"] ** 2 - w**2, 0.0)) / here["c"]
        y = k * Y + (there["b"] - k * here["b"]) * D + (there["a"] - k * here["a"]) * SRC
        last = i == len(points) - 2
        rows.add(here, y if last else y + w * Z)
    return rows.sampler(points[-1], order=1 if eta == 0 else None, name="dbim")
