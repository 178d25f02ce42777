"""Second-order Runge-Kutta solvers: Heun and midpoint in t, and EDM's Heun with churn."""

import numpy as np

from diffusion_jax.registry import register
from diffusion_jax.samplers.first_order import velocity
from diffusion_jax.samplers.gaussian_path import check_gaussian, gaussian_path
from diffusion_jax.samplers.linear import A, D, H, Rows, X, Y, Z
from diffusion_jax.samplers.scan import Sampler


@register("sampler", "heun", family="gaussian", paper="2011.13456", order=2, calls="2n-1")
def heun(process, num_steps: int | None = None, *, grid=None, t_start=None, t_end=None) -> Sampler:
    """Heun's rule in t on the probability-flow ODE; Euler on a last step into sigma = 0.

    Two network calls a step, one on such a last step; 18 steps by default.
    """
    p, rows = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18), Rows()
    for i in range(p.steps):
        here, there, h = p.point(i), p.point(i + 1), p.t[i + 1] - p.t[i]
        slope = velocity(here, Y, D)
        rows.add(here, Y + h * slope, anchor=Y, push=slope)
        if p.sigma[i + 1] > 0:
            rows.add(there, A + 0.5 * h * (H(1) + velocity(there, Y, D)), anchor=Y, push=D)
    return rows.sampler(p.point(p.steps), order=2, name="heun")


@register("sampler", "midpoint", family="gaussian", paper="2011.13456", order=2, calls="2n")
def midpoint(
    process, num_steps: int | None = None, *, grid=None, t_start=None, t_end=None
) -> Sampler:
    """The midpoint rule in t on the probability-flow ODE.

    Two network calls a step; 18 steps by default.
    """
    p, rows = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18), Rows()
    for i in range(p.steps):
        h = p.t[i + 1] - p.t[i]
        half = process.point(p.t[i] + 0.5 * h)
        rows.add(p.point(i), Y + 0.5 * h * velocity(p.point(i), Y, D), anchor=Y)
        rows.add(half, A + h * velocity(half, Y, D), anchor=Y)
    return rows.sampler(p.point(p.steps), order=2, name="midpoint")


@register("sampler", "edm_heun", family="gaussian", paper="2206.00364", order=2, calls="2n-1")
def edm_heun(
    process,
    num_steps: int | None = None,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    grid="karras",
    t_start=None,
    t_end: float = 0.0,
) -> Sampler:
    """EDM's Heun sampler with churn (Karras et al., arXiv 2206.00364, alg. 2).

    Works in x / alpha and u = sigma / alpha, so any Gaussian process will do. With the Karras grid and
    t_end = 0: `num_steps` points from u_max to u_min and then 0, `2 num_steps - 1` network calls.

    Args:
      num_steps: steps, default 18.
      s_churn: total churn; each step inside [s_min, s_max] first raises u by the factor
        `1 + min(s_churn / num_steps, sqrt(2) - 1)` with fresh noise of deviation `s_noise`.
      s_min, s_max: range of u in which churn acts.
      s_noise: inflation of the churn noise.
    Equivalences: s_churn = 0 is deterministic.
    Raises:
      ValueError: negative churn, a bad grid, or a start where alpha = 0.
    """
    check_gaussian(process)
    if s_churn < 0:
        raise ValueError(f"s_churn must not be negative, got {s_churn}")
    if t_start is None and process.alpha(process.sampling_range[0]) == 0:
        t_start = process.t_max  # u must be finite
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18)
    if p.alpha[0] == 0:
        raise ValueError(f"edm_heun needs alpha > 0 at its start: t_start = {p.t[0]} gives 0")
    u = p.sigma / p.alpha
    factor = min(s_churn / p.steps, np.sqrt(2.0) - 1.0)
    raised = np.array([v * (1.0 + factor * (s_min <= v <= s_max)) for v in u[:-1]])

    def start_of(i):
        """Point at which step i begins, and the forms that bring `x` there."""
        if i == p.steps or raised[i] == u[i]:
            return p.point(i), 1.0, 0.0
        point = process.point(process.t_of_noise_level(raised[i]))
        kick = s_noise * np.sqrt(raised[i] ** 2 - u[i] ** 2)
        return point, point["alpha"] / p.alpha[i], point["alpha"] * kick

    def eps(point, x):
        return (x - point["alpha"] * D) / point["sigma"]

    here, scale, kick = start_of(0)
    rows = Rows({"y": scale * X + kick * Z} if kick else None)
    for i in range(p.steps):
        there, h = p.point(i + 1), u[i + 1] - raised[i]
        following, scale, kick = start_of(i + 1)
        slope = eps(here, Y)
        first = p.alpha[i + 1] * (Y / here["alpha"] + h * slope)
        if p.sigma[i + 1] == 0:
            rows.add(here, p.alpha[i + 1] * D)
            break
        rows.add(here, first, anchor=Y, push=slope)
        second = p.alpha[i + 1] * (A / here["alpha"] + 0.5 * h * (H(1) + eps(there, Y)))
        rows.add(there, scale * second + kick * Z, anchor=Y, push=slope)
        here = following
    return rows.sampler(p.point(p.steps), order=2 if s_churn == 0 else None, name="edm_heun")
