"""Consistency sampling of bridges (CDBM, arXiv 2410.22637): from the source to data in two calls or more.

  (1) boot, the only way to leave the source: D = D(x1, t = 1), x = a x1 + b D + c z at t_1
  (2) h = k x + (b_e - k b) D(x, t_i) + (a_e - k a) x1, k = c_e / c: the end of the path, at t_e
  (3) before the next call noise is added to h from t_e to t_{i+1} < t_i:
      x = m h + (a - m a_e) x1 + w z, m = b / b_e, w^2 = c^2 - m^2 c_e^2
The last call's h is the result. The denoiser is the ordinary one; (2) is a combination in the table.

Deviations: (3) carries q(x | x0, x1) at t_e into that at t_{i+1}, whatever x0 is; the paper draws
q(x | x0 = h, x1), which takes h for a point at t = 0. They differ by the noise of t_e.
"""

from diffusion_jax.processes.bridge_steps import ode_step, renoise
from diffusion_jax.registry import register
from diffusion_jax.samplers.bridge_steps import (
    BOOT_GAP,
    booted,
    check_bridge,
    check_calls,
    check_noise,
    expecting,
)
from diffusion_jax.samplers.linear import SRC, D, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times


@register("sampler", "consistency_bridge", family="bridge", paper="2410.22637", min_steps=2)
def consistency_bridge(
    process,
    num_steps: int | None = None,
    *,
    booting: str = "draw",
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """Consistency sampling; `x_init` is the source.

    Equivalences: with 2 calls it is DBIM with 2 calls, whatever the network.

    Args:
      process: a bridge process.
      num_steps: network calls, default 2, at least 2: one at the source, then one at each time of the
        grid but the last.
      booting: "draw" the noise of the boot, or take it as "given": `x_init` is `Pinned(source, noise)`,
        and 2 calls then draw nothing, so that a path between two noises is one between two images.
      grid, t_start, t_end: times `[num_steps]` from just below t = 1 (1e-3 of the paper's clock) to
        t_min; see `time_grids.build_times`, with `num_steps - 1` intervals. Those between the ends are the
        times that h is noised to.
    Raises:
      ValueError: fewer than 2 calls, not a bridge, a bridge without noise, a bad grid or an unknown
        booting; when sampling, an x_init that does not fit `booting`.
    """
    check_bridge(process)
    check_calls("consistency_bridge", num_steps, 2)
    start = process.t_max - BOOT_GAP / process.clock_scale if t_start is None else t_start
    intervals = None if num_steps is None else num_steps - 1
    times = build_times(process, intervals, grid, start, t_end, default_steps=1)
    *points, end = (process.point(t) for t in times)
    check_noise(process, points)
    rows = booted(process, points[0], booting)
    for i, here in enumerate(points):
        y = ode_step(Y, D, SRC, here, end)
        last = i == len(points) - 1
        rows.add(here, y if last else renoise(y, SRC, Z, end, points[i + 1]))
    return expecting(rows.sampler(end, name="consistency_bridge"), booting)
