"""DDBM's hybrid sampler for bridges: a stochastic Euler part, then Heun (Zhou et al., arXiv 2309.16948, alg. 1).

With s the bridge score and h the Doob term (see `processes.bridge`):
  (1) stochastic part   dx = (f x - g^2 (s - w h)) dt + g dw
  (2) Heun part         dx = (f x - g^2 (s/2 - w h)) dt, Euler on the last step
Deviations: the guidance weight w is one number for each part. In the authors' VE code the same flag w
leaves the stochastic part alone and enters the Heun part as (1 + w) / 2; in their VP code it is w in both.
"""

import itertools

import numpy as np

from diffusion_jax.registry import register
from diffusion_jax.samplers.bridge_steps import check_noise, check_sde_bridge
from diffusion_jax.samplers.linear import SRC, A, D, H, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times


@register("sampler", "ddbm_heun", family="bridge", paper="2309.16948", calls="3n-1")
def ddbm_heun(
    process,
    num_steps: int | None = None,
    *,
    churn: float = 0.33,
    guidance: float = 1.0,
    guidance_stochastic: float | None = None,
    grid="karras",
    t_start=None,
    t_end: float = 0.0,
) -> Sampler:
    """The hybrid stochastic Heun sampler of DDBM; `x_init` is the source.

    Args:
      process: the bridge of an SDE.
      num_steps: steps, default 40; `3 num_steps - 1` network calls, `2 num_steps - 1` without
        churn.
      churn: fraction of each step taken stochastically, in [0, 1). Without it the sampler is
        deterministic from the source: one biased answer, no diversity.
      guidance: weight w of the Doob term in the Heun part; 1 is the method.
      guidance_stochastic: w of the stochastic part, default `guidance`.
      grid, t_start, t_end: see `time_grids.build_times`; default: Karras points from just below t = 1
        (1e-4 of the paper's clock) to t_min, then 0.
    Raises:
      ValueError: churn outside [0, 1), not the bridge of an SDE or one without noise, or a bad grid.
    """
    check_sde_bridge(process, "ddbm_heun")
    if not 0.0 <= churn < 1.0:
        raise ValueError(f"churn must lie in [0, 1), got {churn}")
    start = 1.0 - 1e-4 / process.clock_scale if t_start is None else t_start
    times = build_times(process, num_steps, grid, start, t_end, default_steps=40)
    check_noise(process, [process.point(t) for t in times[:-1]])
    w = guidance
    w_stochastic = guidance if guidance_stochastic is None else guidance_stochastic
    rows = Rows(source=True, centre=True)

    def drift(x, x0, t, score_weight, w):
        f, g2 = process.drift(t), process.diffusion_squared(t)
        score, doob = process.score(x, x0, SRC, t), process.kernel_score(x, SRC, t)
        return f * x - g2 * (score_weight * score - w * doob)

    for t, t_next in itertools.pairwise(times):
        if churn > 0:
            between = t + churn * (t_next - t)
            noise = np.sqrt((t - between) * process.diffusion_squared(t))
            step = (between - t) * drift(Y, D, t, 1.0, w_stochastic)
            rows.add(process.point(t), Y + step + noise * Z, anchor=Y, push=D)
            t = between
        h = t_next - t
        rows.add(process.point(t), Y + h * drift(Y, D, t, 0.5, w), anchor=Y, push=D)
        if t_next > 0:
            slopes = drift(A, H(1), t, 0.5, w) + drift(Y, D, t_next, 0.5, w)
            rows.add(process.point(t_next), A + 0.5 * h * slopes, anchor=Y, push=D)
    return rows.sampler(process.point(times[-1]), name="ddbm_heun")
