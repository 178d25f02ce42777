"""DEIS: exponential integrators with polynomials of eps in t or u (Zhang and Chen, arXiv 2204.13902).

With u = sigma / alpha and v = x / alpha the flow is dv/du = eps. Step i -> i + 1:
  (1) t_ab, rho_ab   x' = (alpha'/alpha) x + sum_{j<=r} C_j eps_{i-j},  C_j = alpha' int_u^{u'} L_j du,
      L_j the Lagrange basis on the last r + 1 grid points, as polynomials in t (t_ab) or in u (rho_ab);
      sum_j C_j = sigma' - (alpha'/alpha) sigma
  (2) ipndm          the same step with that sum shared out by the weights of Adams and Bashforth
  (3) rho_rk         an explicit Runge-Kutta rule on v in u
Degree r uses r + 1 predictions, the first steps fewer. A step from alpha = 0 or into sigma = 0 is DDIM.

Deviations: the authors integrate (1) by a left Riemann sum of 10,000 points in t, which has not converged
(end points differ by up to 5e-3); here it is exact, by Gauss-Legendre quadrature in log u (t_ab) or of
the polynomial itself (rho_ab). "log" times of theirs are the grid "log_snr", "rho" times "karras".
"""

import functools
import operator
from typing import NamedTuple

import numpy as np

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.first_order import ddim_step, noise_weight
from diffusion_jax.samplers.gaussian_path import GaussianPath, check_order, gaussian_path
from diffusion_jax.samplers.linear import A, D, Form, H, Rows, Y
from diffusion_jax.samplers.scan import Sampler

METHODS = ("t_ab", "rho_ab", "ipndm", "rho_rk")
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class RungeKutta(NamedTuple):
    """An explicit rule.

    Attributes:
      stages: row j holds the weights of slopes 0..j in the argument of stage j + 1.
      weights: of all slopes in the result.
      nodes: where in the step each stage is called, within [0, 1].
      order: of convergence.
    """

    stages: tuple
    weights: tuple
    nodes: tuple
    order: int


RUNGE_KUTTA = {
    "euler": RungeKutta((), (1.0,), (0.0,), 1),
    "midpoint": RungeKutta(((1 / 2,),), (0.0, 1.0), (0.0, 1 / 2), 2),
    "heun": RungeKutta(((1.0,),), (1 / 2, 1 / 2), (0.0, 1.0), 2),
    "ralston": RungeKutta(((2 / 3,),), (1 / 4, 3 / 4), (0.0, 2 / 3), 2),
    "kutta3": RungeKutta(((1 / 2,), (-1.0, 2.0)), (1 / 6, 4 / 6, 1 / 6), (0.0, 1 / 2, 1.0), 3),
    "heun3": RungeKutta(((1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), (0.0, 1 / 3, 2 / 3), 3),
    "ralston3": RungeKutta(((1 / 2,), (0.0, 3 / 4)), (2 / 9, 3 / 9, 4 / 9), (0.0, 1 / 2, 3 / 4), 3),
    "houwen3": RungeKutta(
        ((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0.0, 3 / 4), (0.0, 8 / 15, 2 / 3), 3
    ),
    "ssp3": RungeKutta(((1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 4 / 6), (0.0, 1.0, 1 / 2), 3),
    "rk4": RungeKutta(
        ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        (1 / 6, 2 / 6, 2 / 6, 1 / 6),
        (0.0, 1 / 2, 1 / 2, 1.0),
        4,
    ),
}


@functools.cache
def _gauss_legendre(points):
    return np.polynomial.legendre.leggauss(points)


def _panel_rule(start, end, panels, points):
    """Nodes and weights `[panels, points]` of composite Gauss-Legendre quadrature."""
    x, w = _gauss_legendre(points)
    edges = np.linspace(start, end, panels + 1)
    half = 0.5 * np.diff(edges)[:, None]
    return 0.5 * (edges[1:] + edges[:-1])[:, None] + half * x, half * w


def _lagrange(nodes, j, v):
    """The Lagrange polynomial that is 1 at nodes[j] and 0 at the others, at v."""
    others = [k for k in range(len(nodes)) if k != j]
    return np.prod([(v - nodes[k]) / (nodes[j] - nodes[k]) for k in others], axis=0)


def polynomial_coefficients(p: GaussianPath, degree: int, variable: str = "t") -> np.ndarray:
    """Coefficients `[n, 1 + degree + 1]` of x and of eps_i, eps_{i-1}, ... in (1); exact.

    Args:
      p: the path.
      degree: of the polynomial, lowered while there is less history.
      variable: "t" or "u", in which the polynomial is one.
    Returns:
      float64; rows of steps at an infinite log-SNR are zero.
    """
    table = np.zeros((p.steps, degree + 2))
    with np.errstate(divide="ignore"):
        u = p.sigma / p.alpha
    nodes = p.t if variable == "t" else u
    usable = np.isfinite(nodes)
    for i in range(p.steps):
        if not np.isfinite(p.lam[i : i + 2]).all():
            continue
        table[i, 0] = p.alpha[i + 1] / p.alpha[i]
        past = nodes[max(i - degree, 0) : i + 1][::-1]
        past = past[usable[max(i - degree, 0) : i + 1][::-1]]
        if len(past) == 1:
            table[i, 1] = noise_weight(p, i)
            continue
        if variable == "t":
            log_u, w = _panel_rule(-p.lam[i], -p.lam[i + 1], panels=8, points=40)
            v, w = np.asarray(p.process.t_of_lam(-log_u), np.float64), w * np.exp(log_u)
        else:
            v, w = _panel_rule(u[i], u[i + 1], panels=1, points=4)
        for j in range(len(past)):
            table[i, 1 + j] = p.alpha[i + 1] * np.sum(w * _lagrange(past, j, v))
    return table


def pseudo_coefficients(p: GaussianPath, degree: int) -> np.ndarray:
    """Coefficients of (2), as `polynomial_coefficients`."""
    table = np.zeros((p.steps, degree + 2))
    for i in range(p.steps):
        if np.isfinite(p.lam[i : i + 2]).all():
            table[i, 0] = p.alpha[i + 1] / p.alpha[i]
            weights = ADAMS_BASHFORTH[min(degree, i)]
            table[i, 1 : 1 + len(weights)] = noise_weight(p, i) * np.array(weights)
    return table


def _multistep(p: GaussianPath, table: np.ndarray) -> Rows:
    """Rows of (1) and (2) from coefficients `[n, 1 + degree + 1]`."""
    rows = Rows()
    for i in range(p.steps):
        eps = (Y - p.alpha[i] * D) / p.sigma[i]
        if np.isfinite(p.lam[i : i + 2]).all():
            past = [eps, *(H(j) for j in range(1, min(i + 1, table.shape[1] - 1)))]
            y = table[i, 0] * Y + sum(c * m for c, m in zip(table[i, 1:], past))
        else:
            y = ddim_step(Y, p.point(i), p.point(i + 1))
        rows.add(p.point(i), y, push=eps)
    return rows


def _runge_kutta(p: GaussianPath, rule: RungeKutta) -> Rows:
    """Rows of (3): a stage is a row, the anchor is the start of the step.

    Stage k stands at v_k = d_0 + u_k e + bend_k, where d_k is its x0_hat and e the eps of the first call,
    and its slope is e + (d_0 + bend_k - d_k) / u_k: so every row is DDIM from the start of the step, plus
    differences of predictions, and the terms in x, which the rule multiplies by u/u', cancel here.
    """
    rows, count = Rows(), len(rule.weights)
    for i in range(p.steps):
        if not np.isfinite(p.lam[i : i + 2]).all():
            rows.add(p.point(i), ddim_step(Y, p.point(i), p.point(i + 1)), anchor=Y, push=D)
            continue
        u, u1 = p.sigma[i : i + 2] / p.alpha[i : i + 2]
        du = u1 - u
        ends = {0.0: p.point(i), 1.0: p.point(i + 1)}
        points = [
            ends.get(c) or p.process.point(p.process.t_of_noise_level(u + c * du))
            for c in (*rule.nodes, 1.0)
        ]
        for j in range(count):
            here, there, x = points[j], points[j + 1], A if j else Y
            d = [*(H(j - k) for k in range(j)), D]
            excess = [Form()]  # of the slopes over e
            for k in range(1, j + 1):
                bend = du * sum(map(operator.mul, excess, rule.stages[k - 1]), Form())
                excess.append((d[0] - d[k] + bend) / (u + rule.nodes[k] * du))
            weights = rule.stages[j] if j < count - 1 else rule.weights
            bend = du * sum(map(operator.mul, excess, weights), Form())
            y = ddim_step(x, points[0], there, d[0]) + there["alpha"] * bend
            rows.add(here, y, anchor=A if 0 < j < count - 1 else Y, push=D)
    return rows


def deis(
    process,
    num_steps: int | None = None,
    *,
    method: str = "t_ab",
    order: int = 3,
    rk: str = "heun",
    grid=None,
    t_start=None,
    t_end=None,
    denoise_to_zero: bool = False,
) -> Sampler:
    """DEIS (Zhang and Chen, arXiv 2204.13902), for any Gaussian process.

    Args:
      process: a Gaussian process.
      num_steps: steps, default 10. A step costs one network call; with "rho_rk" as many as the rule
        has stages, and one where it starts at alpha = 0 or ends at sigma = 0.
      method: "t_ab", "rho_ab", "ipndm" or "rho_rk".
      order: degree 0 to 3 of the polynomial in "t_ab" and "rho_ab", number of past predictions in
        "ipndm". The order of convergence is `order + 1` until, at a thousand steps, the error of the
        first steps shows; that of "ipndm" is at most 2: its weights leave out how du varies within
        a step, and suppose equal steps in a smooth clock.
      rk: rule of "rho_rk", one of `RUNGE_KUTTA`.
      grid, t_start, t_end: see `time_grids.build_times`; grid None is "quadratic", for "ipndm"
        "uniform", as in the authors' code.
      denoise_to_zero: one more call at the last time, whose x0_hat is returned.
    Equivalences: "t_ab" and "rho_ab" with order 0, "ipndm" with order 0 and "rho_rk" with "euler" are
      DDIM. "t_ab" is exact where eps is a polynomial in t of degree `order`.
    Raises:
      ValueError: an option outside the values above, fewer steps than the order, or a bad grid.
    """
    check_choice("method", method, METHODS)
    check_choice("order", order, (0, 1, 2, 3))
    check_choice("rk", rk, RUNGE_KUTTA)
    if grid is None:
        grid = "uniform" if method == "ipndm" else "quadratic"
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=10)
    if method != "rho_rk":
        check_order(order, p.steps)
    if method == "rho_rk":
        rows, reached = _runge_kutta(p, RUNGE_KUTTA[rk]), RUNGE_KUTTA[rk].order
        name = f"deis_rhork_{rk}"
    elif method == "ipndm":
        rows, reached = _multistep(p, pseudo_coefficients(p, order)), min(order + 1, 2)
        name = "ipndm" if order == 3 else f"ipndm_{order}"
    else:
        table = polynomial_coefficients(p, order, "t" if method == "t_ab" else "u")
        rows, reached = _multistep(p, table), order + 1
        name = f"deis_{method.replace('_', '')}{order}"
    if denoise_to_zero:
        rows.add(p.point(p.steps), D)
    end = p.clean_point() if denoise_to_zero else p.point(p.steps)
    return rows.sampler(end, order=reached, name=name)


def _named(name, reached, calls="n", **fixed):
    """Registers a member of the family; `reached` is its order of convergence."""

    def make(process, num_steps=None, **options):
        return deis(process, num_steps, **{**fixed, **options})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"`deis` with {', '.join(f'{k}={v!r}' for k, v in fixed.items())}."
    meta = {"paper": "2204.13902", "order": reached, "calls": calls}
    if "order" in fixed:
        meta["min_steps"] = fixed["order"]
    register("sampler", name, family="gaussian", **meta)(make)


for _r in (1, 2, 3):
    _named(f"deis_tab{_r}", _r + 1, method="t_ab", order=_r)
_named("deis_rhoab3", 4, method="rho_ab", order=3)
_named("ipndm", 2, method="ipndm", order=3)
for _rk in ("midpoint", "heun", "kutta3", "rk4"):
    _rule = RUNGE_KUTTA[_rk]
    _calls = f"{len(_rule.weights)}n"
    _named(f"deis_rhork_{_rk}", _rule.order, _calls, method="rho_rk", rk=_rk)
