"""Solvers that k-diffusion made known: two-stage rules with fresh noise, and linear multistep.

In y = x / alpha and u = sigma / alpha, where the probability-flow ODE is dy/du = eps, a step from u aims
at u_down and adds noise of deviation u_up (eta scales it, 0 is deterministic):
  (1) u_up = min(u', eta u'/u sqrt(u^2 - u'^2)),   u_down^2 = u'^2 - u_up^2
  (2) first stage, to w = u^(1-r) u_down^r with r = 1/2:   y_w = (w/u) y + (1 - w/u) x0_hat
  (3) dpm_2                y' = y + (u_down - u) eps(y_w, w)                      + u_up z
  (4) dpmpp_2s_ancestral   y' = (u_down/u) y + (1 - u_down/u) x0_hat(y_w, w)      + u_up z
  (5) dpmpp_sde            as (4), with w = u^(1-r) u'^r, noise by (1) in the first stage too, and the
                           prediction (1 - c) x0_hat(y, u) + c x0_hat(y_w, w), c = 1 / (2 r)
  (6) lms                  y' = y + sum_j c_j eps_{i-j}, c_j the integral of the Lagrange polynomial of
                           the last points over [u, u']

Equivalences: dpm_2 is DPM-Solver-2 (arXiv 2206.00927), single-step in eps; with eta = 0,
dpmpp_2s_ancestral and dpmpp_sde are DPM-Solver++(2S) (arXiv 2211.01095) and dpm_2_ancestral is dpm_2;
lms of order 1 is Euler in u, which is DDIM.
Deviations: released for alpha = 1, here on any Gaussian process. A step from alpha = 0 (u infinite) or
into sigma = 0 is one call of first order. dpmpp_sde draws its two noises of a step independently; the
released code takes both from one Brownian path, and then the second noise is not independent of the first.
"""

import itertools

import numpy as np

from diffusion_jax.registry import register
from diffusion_jax.samplers.gaussian_path import gaussian_path
from diffusion_jax.samplers.linear import A, D, H, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler


def _level(point) -> float:
    return float(point["sigma"] / point["alpha"]) if point["alpha"] > 0 else np.inf


def _eps(point):
    return (Y - point["alpha"] * D) / point["sigma"]


def _ancestral(u, v, eta) -> tuple[float, float]:
    """Equation (1): where the deterministic part of a step from u to v goes, and the noise on top."""
    spread = np.sqrt(1.0 - (v / u) ** 2)
    up = min(v, eta * v * spread)
    return np.sqrt(v**2 - up**2), up


def _two_stages(p, second, *, eta=0.0, s_noise=1.0, r=0.5, both=False) -> Rows:
    """Rows of (2) and of `second(here, middle, down)` -> y'; `both`: the first stage draws too."""
    if eta < 0.0:
        raise ValueError(f"eta must not be negative, got {eta}")
    rows = Rows()
    for i in range(p.steps):
        here, there = p.point(i), p.point(i + 1)
        u, v = _level(here), _level(there)
        down, up = _ancestral(u, v, eta)
        if v == 0.0 or not np.isfinite(u):
            rows.add(
                here, there["alpha"] * (D + down * _eps(here) + s_noise * up * Z), anchor=Y, push=D
            )
            continue
        goal = u ** (1.0 - r) * (v if both else down) ** r
        middle = p.process.point(p.process.t_of_noise_level(goal))
        low, kick = _ancestral(u, _level(middle), eta if both else 0.0)
        first = low / u * Y / here["alpha"] + (1.0 - low / u) * D
        rows.add(here, middle["alpha"] * (first + s_noise * kick * Z), anchor=Y, push=D)
        end = second(here, middle, down) + s_noise * up * Z
        rows.add(middle, there["alpha"] * end, anchor=Y, push=D)
    return rows


def _in_eps(here, middle, down):
    return A / here["alpha"] + (down - _level(here)) * _eps(middle)


def _in_x0(here, middle, down):
    ratio = down / _level(here)
    return ratio * A / here["alpha"] + (1.0 - ratio) * D


@register("sampler", "dpm_2", family="gaussian", paper="2206.00927", order=2, calls="2n-1")
def dpm_2(process, num_steps: int | None = None, *, grid="karras", t_start=None, t_end=None):
    """DPM-2 of k-diffusion, equation (3) without noise: a midpoint rule with a geometric midpoint.

    Two network calls a step, one on a step into sigma = 0; 18 steps by default.

    Args:
      process: a Gaussian process.
      num_steps: steps.
      grid, t_start, t_end: see `time_grids.build_times`.
    """
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18)
    return _two_stages(p, _in_eps).sampler(p.point(p.steps), order=2, name="dpm_2")


@register("sampler", "dpm_2_ancestral", family="gaussian", paper="2206.00927", calls="2n-1")
def dpm_2_ancestral(
    process,
    num_steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    grid="karras",
    t_start=None,
    t_end=None,
) -> Sampler:
    """DPM-2 with ancestral noise, equation (3).

    Args:
      process: a Gaussian process.
      num_steps: steps, default 18; two network calls each, one on a step into sigma = 0.
      eta: amount of noise, 1 as ancestral sampling, 0 deterministic.
      s_noise: inflation of the noise.
      grid, t_start, t_end: see `time_grids.build_times`.
    Raises:
      ValueError: negative eta, or a bad grid.
    """
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18)
    rows = _two_stages(p, _in_eps, eta=eta, s_noise=s_noise)
    return rows.sampler(p.point(p.steps), name="dpm_2_ancestral")


@register("sampler", "dpmpp_2s_ancestral", family="gaussian", paper="2211.01095", calls="2n-1")
def dpmpp_2s_ancestral(
    process,
    num_steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    grid="karras",
    t_start=None,
    t_end=None,
) -> Sampler:
    """DPM-Solver++(2S) with ancestral noise, equation (4); arguments as `dpm_2_ancestral`."""
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18)
    rows = _two_stages(p, _in_x0, eta=eta, s_noise=s_noise)
    return rows.sampler(p.point(p.steps), name="dpmpp_2s_ancestral")


@register("sampler", "dpmpp_sde", family="gaussian", paper="2211.01095", calls="2n-1")
def dpmpp_sde(
    process,
    num_steps: int | None = None,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    r: float = 0.5,
    grid="karras",
    t_start=None,
    t_end=None,
) -> Sampler:
    """DPM-Solver++ in its stochastic single-step form, equation (5).

    Args:
      r: where the first stage goes, as a fraction of the step in log u, between 0 and 1.
    Other arguments as `dpm_2_ancestral`.
    Raises:
      ValueError: r outside (0, 1), negative eta, or a bad grid.
    """
    if not 0.0 < r < 1.0:
        raise ValueError(f"r must lie between 0 and 1, got {r}")
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18)

    def second(here, middle, down):
        ratio, c = down / _level(here), 0.5 / r
        return ratio * A / here["alpha"] + (1.0 - ratio) * ((1.0 - c) * H(1) + c * D)

    rows = _two_stages(p, second, eta=eta, s_noise=s_noise, r=r, both=True)
    return rows.sampler(p.point(p.steps), name="dpmpp_sde")


def _lagrange_integrals(nodes, start, end):
    """Integrals over [start, end] of the Lagrange polynomials of `nodes`, exact (Gauss-Legendre)."""
    x, w = np.polynomial.legendre.leggauss(len(nodes))
    tau = start + 0.5 * (end - start) * (x + 1.0)
    others = [np.delete(nodes, j) for j in range(len(nodes))]
    basis = [np.prod((tau[:, None] - o) / (v - o), axis=1) for v, o in zip(nodes, others)]
    return 0.5 * (end - start) * np.array([w @ values for values in basis])


@register("sampler", "lms", family="gaussian", paper="2206.00364")
def lms(
    process,
    num_steps: int | None = None,
    *,
    order: int = 4,
    grid="karras",
    t_start=None,
    t_end=None,
) -> Sampler:
    """Linear multistep in u (Adams-Bashforth on the grid's own spacing), equation (6).

    The first steps have the orders 1, 2, ... for want of a history, which bounds the order of the whole
    at 2; none is declared.

    Args:
      process: a Gaussian process.
      num_steps: steps and network calls, default 18.
      order: points used, 1 or more.
      grid, t_start, t_end: see `time_grids.build_times`.
    Raises:
      ValueError: order below 1, or a bad grid.
    """
    if not isinstance(order, int | np.integer) or order < 1:
        raise ValueError(f"order must be a positive int, got {order!r}")
    p, rows = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=18), Rows()
    points = [p.point(i) for i in range(p.steps + 1)]
    u = np.array([_level(point) for point in points])
    first = int(np.isfinite(u).argmax())
    for i, (here, there) in enumerate(itertools.pairwise(points)):
        if i < first:
            y = D + u[i + 1] * _eps(here)
        else:
            k = min(order, i + 1 - first)
            c = _lagrange_integrals(u[i - k + 1 : i + 1][::-1], u[i], u[i + 1])
            outputs = [_eps(here), *(H(j) for j in range(1, k))]
            y = Y / here["alpha"] + sum(cj * form for cj, form in zip(c, outputs))
        rows.add(here, there["alpha"] * y, push=_eps(here))
    return rows.sampler(points[-1], name="lms")
