"""DPM-Solver and DPM-Solver++: exponential integrators in lam = log(alpha / sigma).

arXiv 2206.00927 (noise prediction), 2211.01095 (data prediction, "++", and the SDE forms). With
h = lam' - lam, m the prediction (x0 or eps), g = -1 (x0) or +1 (eps), L = sigma'/sigma or alpha'/alpha,
K = alpha' or sigma', e1 = expm1(g h), p2 = e1/h - g, p3 = p2/h - 1/2:
  (1) order 1   x' = L x - K e1 m
  (2) order 2   ... - K e1/2 D1 ("midpoint") or - g K p2 D1 ("taylor"), D1 = (m - m_prev) / r0
  (3) order 3   ... - g K p2 D1 - K p3 D2
Deviations: none in the released forms. The released third-order multistep D2 is half the second
derivative it stands for, and its order is 2; `exact_d2=True` doubles it, and the order is 3.
"""

import numpy as np

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.first_order import blended, ddim_step
from diffusion_jax.samplers.gaussian_path import GaussianPath, check_order, gaussian_path
from diffusion_jax.samplers.linear import A, D, H, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import inner_rule, log_snr, resolve_grid


def step_orders(p: GaussianPath, order: int, lower_order_final: bool) -> list[int]:
    """Order of each multistep step: warm-up, optional cool-down, 1 into an infinite log-SNR."""
    n = p.steps
    orders = [min(order, i + 1, n - i if lower_order_final else order) for i in range(n)]
    if not np.isfinite(p.lam[-1]):
        orders[-1] = 1
    return orders


def predicted(kind, here):
    """The prediction "x0" or "eps" of a call at the point `here`, as a linear form."""
    return D if kind == "x0" else (Y - here["alpha"] * D) / here["sigma"]


def step_factors(kind, here, there):
    """g, L and K of (1) for a step from point to point."""
    if kind == "x0":
        return -1.0, there["sigma"] / here["sigma"], there["alpha"]
    return 1.0, there["alpha"] / here["alpha"], there["sigma"]


def _multistep(p, order, prediction, kind, lower_order_final, exact_d2, denoise_to_zero, blend):
    rows, lam, registers = Rows(), p.lam, {}
    for i, k in enumerate(step_orders(p, order, lower_order_final)):
        here, there = p.point(i), p.point(i + 1)
        m = [predicted(prediction, here), H(1), H(2)]
        shift, registers = blended(p, i, blend)
        if k == 1:
            rows.add(here, ddim_step(Y, here, there) + shift, push=m[0], **registers)
            continue
        g, L, K = step_factors(prediction, here, there)
        h = lam[i + 1] - lam[i]
        e1 = np.expm1(g * h)
        y = L * Y - K * e1 * m[0]
        if k == 2:
            d1 = (m[0] - m[1]) / ((lam[i] - lam[i - 1]) / h)
            y = y - (0.5 * K * e1 if kind == "midpoint" else g * K * (e1 / h - g)) * d1
        elif k == 3:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            da, db = (m[0] - m[1]) / r0, (m[1] - m[2]) / r1
            d1 = da + r0 / (r0 + r1) * (da - db)
            d2 = (2.0 if exact_d2 else 1.0) * (da - db) / (r0 + r1)
            p2 = e1 / h - g
            y = y - g * K * p2 * d1 - K * (p2 / h - 0.5) * d2
        rows.add(here, y + shift, push=m[0], **registers)
    if denoise_to_zero:
        rows.add(p.point(p.steps), D, **registers)
    return rows


def singlestep_plan(num_calls: int, order: int) -> list[int]:
    """Orders of the single steps that spend `num_calls` network calls ("DPM-Solver-fast")."""
    full, rest = divmod(num_calls, order)
    if order < 3:
        return [order] * full + [1] * rest
    return {0: [3] * (full - 1) + [2, 1], 1: [3] * full + [1], 2: [3] * full + [2]}[rest]


def _split_infinite_ends(plan, finite_start, finite_end):
    """Inner stages of a step are laid out in lam, so a step at an infinite end must have order 1."""
    plan = list(plan)
    if not finite_end and plan[-1] > 1:
        plan[-1:] = [plan[-1] - 1, 1]
    if not finite_start and plan[0] > 1:
        plan[:1] = [1, plan[0] - 1]
    return plan


def _singlestep_path(process, num_calls, order, grid, t_start, t_end):
    """Outer times, the plan, and the rule that lays out the inner points of a step."""
    lay = inner_rule(process, grid)
    every = gaussian_path(process, num_calls, grid, t_start, t_end)
    finite = np.isfinite(every.lam)
    plan = _split_infinite_ends(singlestep_plan(num_calls, order), finite[0], finite[-1])
    if resolve_grid(process, grid) is log_snr:
        outer = gaussian_path(process, len(plan), lay, t_start, t_end).t
    else:
        outer = every.t[np.cumsum([0, *plan])]
    return gaussian_path(process, None, outer), plan, lay


def _singlestep(process, p, plan, lay, prediction, kind):
    rows = Rows()
    for i, k in enumerate(plan):
        if k == 1:
            here, there = p.point(i), p.point(i + 1)
            m = predicted(prediction, here)
            rows.add(here, ddim_step(Y, here, there), anchor=Y, push=m)
            continue
        l0, h = p.lam[i], p.lam[i + 1] - p.lam[i]
        inner = lay(process, k, p.t[i], p.t[i + 1])[1:k]
        r = [(float(process.lam(t)) - l0) / h for t in inner]
        times = [p.t[i], *(float(process.t_of_lam(l0 + q * h)) for q in r), p.t[i + 1]]
        points = [process.point(t) for t in times]
        for j in range(k):  # stage j calls at times[j] and writes the point at times[j + 1]
            here, there = points[j], points[j + 1]
            m = predicted(prediction, here)
            x, m0 = (A, H(j)) if j else (Y, m)
            g, L, K = step_factors(prediction, points[0], there)
            q = 1.0 if j == k - 1 else r[j]
            e1 = np.expm1(g * q * h)
            p2 = e1 / (q * h) - g
            y = L * x - K * e1 * m0
            if k == 2 and j == 1:
                y = y - (0.5 * e1 if kind == "midpoint" else g * p2) * K / r[0] * (m - m0)
            elif k == 3 and j == 1:
                y = y - g * r[1] / r[0] * p2 * K * (m - m0)
            elif k == 3 and j == 2:
                da, db = (H(1) - m0) / r[0], (m - m0) / r[1]
                if kind == "midpoint":
                    y = y - g * K * p2 * db
                else:
                    d1 = (r[1] * da - r[0] * db) / (r[1] - r[0])
                    d2 = 2.0 * (db - da) / (r[1] - r[0])
                    y = y - g * K * p2 * d1 - K * (p2 / h - 0.5) * d2
            rows.add(here, y, anchor=A if 0 < j < k - 1 else Y, push=m)
    return rows


def dpm_solver(
    process,
    num_steps: int | None = None,
    *,
    order: int = 2,
    prediction: str = "x0",
    variant: str = "multistep",
    kind: str = "midpoint",
    lower_order_final: bool = True,
    exact_d2: bool = False,
    grid=None,
    t_start=None,
    t_end=None,
    denoise_to_zero: bool = False,
    blend=None,
) -> Sampler:
    """DPM-Solver (prediction "eps") and DPM-Solver++ (prediction "x0"), orders 1 to 3.

    Args:
      process: a Gaussian process.
      num_steps: network calls, default 10 (a call more with `denoise_to_zero`). In the multistep
        variant each call is a step; the single-step variant spends them on steps of up to `order` calls.
      order: 1, 2 or 3.
      prediction: what is extrapolated, whatever the network itself predicts.
      variant: "multistep" or "singlestep".
      kind: "midpoint" (the authors' default) or "taylor".
      lower_order_final: multistep: lower the order over the last steps. The authors' code does so
        below 10 steps only.
      exact_d2: multistep order 3: the true third-order formula instead of the released one.
      grid, t_start, t_end: see `time_grids.build_times`; single steps take a name or a callable.
      denoise_to_zero: multistep: one more call at the last time, whose x0_hat is returned.
      blend: multistep: changes the first-order prediction, see `dualfast`.
    Equivalences: order 1 is DDIM.
    Raises:
      ValueError: an option outside the values above, fewer steps than the order, or a bad grid.
    """
    check_choice("order", order, (1, 2, 3))
    check_choice("prediction", prediction, ("x0", "eps"))
    check_choice("variant", variant, ("multistep", "singlestep"))
    check_choice("kind", kind, ("midpoint", "taylor"))
    name = (
        f"dpm{'pp' if prediction == 'x0' else ''}_{order}{'m' if variant == 'multistep' else 's'}"
    )
    if variant == "multistep":
        p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=10)
        check_order(order, p.steps)
        rows = _multistep(
            p, order, prediction, kind, lower_order_final, exact_d2, denoise_to_zero, blend
        )
        reached = None if blend else 2 if order == 3 and not exact_d2 else order
        name += "_exact" if exact_d2 and order == 3 else ""
    else:
        if denoise_to_zero or exact_d2 or blend:
            raise ValueError("denoise_to_zero, exact_d2 and blend belong to the multistep variant")
        if not callable(resolve_grid(process, grid)):
            raise ValueError("single steps lay out inner points: grid must be a name or a callable")
        calls = 10 if num_steps is None else num_steps
        if isinstance(calls, int | np.integer):
            check_order(order, calls)
        p, plan, lay = _singlestep_path(process, calls, order, grid, t_start, t_end)
        rows, reached = _singlestep(process, p, plan, lay, prediction, kind), order
    end = p.clean_point() if denoise_to_zero else p.point(p.steps)
    return rows.sampler(end, order=reached, name=name)


def dpm_solver_pp(process, num_steps: int | None = None, **options) -> Sampler:
    """DPM-Solver++ (Lu et al., arXiv 2211.01095): `dpm_solver` with data prediction; options as there."""
    return dpm_solver(process, num_steps, prediction="x0", **options)


def sde_dpm_solver_pp(
    process,
    num_steps: int | None = None,
    *,
    order: int = 2,
    eta: float = 1.0,
    kind: str = "midpoint",
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """SDE-DPM-Solver++ (arXiv 2211.01095, section 5; multistep forms as in k-diffusion).

    With q = (1 + eta) h: `x' = sigma'/sigma e^(-eta h) x + alpha' (1 - e^-q) D + ... + sigma'
    sqrt(1 - e^(-2 eta h)) z`. A step into sigma = 0 returns D.

    Args:
      num_steps: network calls, default 10.
      order: 1, 2 or 3 (the released third-order form, see `dpm_solver`).
      eta: 0 is DPM-Solver++ (with kind "heun" its "taylor" form), 1 the reverse SDE.
      kind: order 2: "midpoint" or "heun".
    Raises:
      ValueError: an option outside the values above, or a bad grid.
    """
    check_choice("order", order, (1, 2, 3))
    check_choice("kind", kind, ("midpoint", "heun"))
    if eta < 0:
        raise ValueError(f"eta must not be negative, got {eta}")
    p, rows = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=10), Rows()
    check_order(order, p.steps)
    lam = p.lam
    for i in range(p.steps):
        a1, s1 = p.alpha[i + 1], p.sigma[i + 1]
        if s1 == 0:
            rows.add(p.point(i), a1 * D, push=D)
            continue
        h = lam[i + 1] - lam[i]
        q = (1.0 + eta) * h
        e1, p2 = -np.expm1(-q), np.expm1(-q) / q + 1.0
        decay = np.exp(-eta * h) if eta else 1.0
        noise = s1 * np.sqrt(-np.expm1(-2.0 * eta * h)) if eta else 0.0
        y = s1 / p.sigma[i] * decay * Y + a1 * e1 * D + noise * Z
        k = min(order, i + 1)
        if k >= 2:
            r0 = (lam[i] - lam[i - 1]) / h
            da = (D - H(1)) / r0
        if k == 2:
            y = y + a1 * (0.5 * e1 if kind == "midpoint" and order == 2 else p2) * da
        elif k == 3:
            r1 = (lam[i - 1] - lam[i - 2]) / h
            db = (H(1) - H(2)) / r1
            d1, d2 = da + r0 / (r0 + r1) * (da - db), (da - db) / (r0 + r1)
            y = y + a1 * (p2 * d1 - (p2 / q - 0.5) * d2)
        rows.add(p.point(i), y, push=D)
    deterministic_order = min(order, 2) if eta == 0 else None
    return rows.sampler(p.point(p.steps), order=deterministic_order, name=f"sde_dpmpp_{order}m")


def _named(name, build, reached, **fixed):
    """Registers a solver of the family under the name users know it by; `reached` is its order."""

    def make(process, num_steps=None, **options):
        return build(process, num_steps, **{**fixed, **options})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"`{build.__name__}` with {', '.join(f'{k}={v!r}' for k, v in fixed.items())}."
    meta = {"paper": "2211.01095", "order": reached, "min_steps": fixed["order"]}
    register("sampler", name, family="gaussian", **meta)(make)


for _p in (1, 2, 3):
    _named(f"dpmpp_{_p}m", dpm_solver_pp, min(_p, 2), order=_p)
    _named(f"dpm_{_p}m", dpm_solver, min(_p, 2), order=_p, prediction="eps")
    _named(f"sde_dpmpp_{_p}m", sde_dpm_solver_pp, None, order=_p)
for _p in (2, 3):
    _named(f"dpmpp_{_p}s", dpm_solver_pp, _p, order=_p, variant="singlestep")
    _named(f"dpm_{_p}s", dpm_solver, _p, order=_p, variant="singlestep", prediction="eps")
_named("dpmpp_3m_exact", dpm_solver_pp, 3, order=3, exact_d2=True)
_named("dpm_3m_exact", dpm_solver, 3, order=3, exact_d2=True, prediction="eps")
