"""BFN-Solver (Xue et al., arXiv 2404.15766): Bayesian flows as linear SDEs, and their fast solvers.

With ' the later point of a step, h = t' - t < 0:
Continuous data, on the Gaussian process of the flow (lam = log alpha / sigma, l = lam' - lam > 0):
  (1) ODE-1 is DDIM, ODE-2 is DPM-Solver++(2M), SDE-2 is SDE-DPM-Solver++(2M), with x0_hat clipped
      (`guidance.clip`); eta = 0 or 1 in
      x' = sigma'/sigma e^(-eta l) x + alpha' (1 - e^(-(1+eta) l)) (D + (D - D_prev) / 2 r) + noise
Discrete data, on logits z, D the class probabilities, beta = beta1 (1 - t)^2:
  (2) SDE    dz = (K D - 1) d beta + sqrt(K d beta) dw
  (3) ODE    dz/dt = -z / (1 - t) - K beta1 (1 - t) (D - 1/K)
The solvers of (2) and (3) freeze D over a step (order 1), or extrapolate it linearly (order 2, by the
previous call, "2M", or by a call in mid-step, "2S").

Deviations: Euler-Maruyama on (2) is left out: SDE-1 freezes D too and is exact in beta. (The authors'
text code has it, but returns the logits of the network in place of the state.)
"""

import dataclasses

import numpy as np

from diffusion_jax.processes import ContinuousBFN
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.bayesian_flow import LogitsPrepare, check_discrete, known_nothing
from diffusion_jax.samplers.gaussian_path import gaussian_path
from diffusion_jax.samplers.linear import ONE, A, D, H, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times

CONTINUOUS_RULES = ("ode1", "ode2", "sde2", "sde_euler")
DISCRETE_RULES = ("ode1", "ode2m", "ode2s", "ode_euler", "sde1", "sde2m")


def _exponential(p, i, second, eta):
    """(1): the state at grid point i + 1 as a form."""
    a1, s1 = p.alpha[i + 1], p.sigma[i + 1]
    if s1 == 0:
        return a1 * D
    step = p.lam[i + 1] - p.lam[i]
    kept = np.exp(-eta * step) if eta else 1.0
    mean = D
    if second and i > 0:
        mean = D + 0.5 * step / (p.lam[i] - p.lam[i - 1]) * (D - H(1)) if _finite(p, i) else D
    noise = s1 * np.sqrt(-np.expm1(-2.0 * eta * step)) if eta else 0.0
    return s1 / p.sigma[i] * kept * Y - a1 * np.expm1(-(1.0 + eta) * step) * mean + noise * Z


def _finite(p, i):
    """Whether the two steps that meet at grid point i have a length in lam."""
    return np.isfinite(p.lam[i - 1]) and np.isfinite(p.lam[i + 1])


def _euler_maruyama(p, i):
    """One step of `dx = (f x - g^2 score) dt + g dw` backwards."""
    if p.alpha[i] == 0:  # the drift is infinite and x says nothing of x0: the exact transition
        return p.alpha[i + 1] * D + p.sigma[i + 1] * Z
    dt, t = p.t[i] - p.t[i + 1], p.t[i]
    f, g2 = p.process.drift(t), p.process.diffusion_squared(t)
    eps = (Y - p.alpha[i] * D) / p.sigma[i]
    return Y - dt * (f * Y + g2 / p.sigma[i] * eps) + np.sqrt(g2 * dt) * Z


def bfn_solver(
    process,
    num_steps: int | None = None,
    *,
    rule: str = "ode2",
    last_drop: bool | None = None,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """BFN-Solver for continuous data (arXiv 2404.15766), on times uniform from 1 - eta to 0.

    Equivalences: without `last_drop`, "ode1" is `ddim`, "ode2" is `dpm_solver_pp` of order 2 with
    `lower_order_final=False`, "sde2" is `sde_dpm_solver_pp` of order 2.

    Args:
      process: a Gaussian process; the paper's is `ContinuousBFN`.
      num_steps: network calls, default 20.
      rule: "ode1", "ode2", "sde2", or "sde_euler", Euler-Maruyama on the reverse SDE (also in the
        last step, where `euler_maruyama` draws nothing).
      last_drop: the last call returns x0_hat instead of stepping; None: on a `ContinuousBFN`, as in
        the authors' code.
      grid, t_start, t_end: see `time_grids.build_times`.
    Raises:
      ValueError: unknown rule, not a Gaussian process, a bad grid, or one that begins at t = 1 of a
        `ContinuousBFN`.
    """
    check_choice("rule", rule, CONTINUOUS_RULES)
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=20)
    if known_nothing(p.point(0)):
        raise ValueError(
            f"BFN-Solver starts below t = 1, where the state is 0; got {p.t[0]}, pass t_start = 1 - eta"
        )
    drop = isinstance(process, ContinuousBFN) if last_drop is None else last_drop
    rows = Rows()
    for i in range(p.steps):
        if drop and i == p.steps - 1:
            y = D
        elif rule == "sde_euler":
            y = _euler_maruyama(p, i)
        else:
            y = _exponential(p, i, rule != "ode1", float(rule == "sde2"))
        rows.add(p.point(i), y, push=D)
    end = p.clean_point() if drop else p.point(p.steps)
    order = None if drop else {"ode1": 1, "ode2": 2}.get(rule)
    return rows.sampler(end, order=order, name=f"bfn_solver_{rule}")


def _ode(t, t1, size, beta1, y, mean):
    """(3) with D frozen to `mean`, exactly."""
    return (1.0 - t1) / (1.0 - t) * y + size * beta1 * (1.0 - t1) * (t1 - t) * (ONE / size - mean)


def _discrete_rows(rule, t, size, beta1, last_drop):
    rows, steps = Rows(), len(t) - 1
    beta = beta1 * (1.0 - t) ** 2
    for i in range(steps):
        h, point = t[i + 1] - t[i], {"t": t[i], "beta": beta[i]}
        slope = size * beta1 * (1.0 - t[i + 1])
        dropped = last_drop and i == steps - 1
        if rule == "ode2s":
            middle = 0.5 * (t[i] + t[i + 1])
            rows.add(point, _ode(t[i], middle, size, beta1, Y, D), anchor=Y)
            # the line through the values at t and in the middle has the latter as its mean
            y = _ode(t[i], t[i + 1], size, beta1, A, D)
            inner = {"t": middle, "beta": beta1 * (1.0 - middle) ** 2}
            rows.add(inner, D if dropped else y, anchor=Y)
            continue
        if dropped:
            rows.add(point, D, push=D)
            continue
        if rule == "ode_euler":
            y = Y - h * (Y / (1.0 - t[i]) + size * beta1 * (1.0 - t[i]) * (D - ONE / size))
        elif rule.startswith("ode"):
            y = _ode(t[i], t[i + 1], size, beta1, Y, D)
            if rule == "ode2m" and i > 0:
                y = y - 0.5 * slope * h**2 / (t[i] - t[i - 1]) * (D - H(1))
        else:
            added = beta[i + 1] - beta[i]
            y = Y + added * (size * D - ONE) + np.sqrt(size * added) * Z
            if rule == "sde2m" and i > 0:
                weight = size * beta1 / 3.0 * h**2 * (t[i] + 2.0 * t[i + 1] - 3.0)
                y = y + weight / (t[i - 1] - t[i]) * (H(1) - D)
        rows.add(point, y, push=D)
    return rows


def bfn_solver_discrete(
    process,
    num_steps: int | None = None,
    *,
    rule: str = "sde2m",
    last_drop: bool = True,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """BFN-Solver for tokens (arXiv 2404.15766), on times uniform from 1 - eta to 0.

    Args:
      process: a `DiscreteBFN`; the denoiser gives class probabilities.
      num_steps: steps, default 20; a network call each, two with "ode2s".
      rule: "ode1", "ode2m", "ode2s", "ode_euler" on the ODE (3); "sde1", "sde2m" on the SDE (2).
      last_drop: the last call ("ode2s": that in mid-step) returns the probabilities `[B, L, K]`;
        else the result is the logits at `t_end`. Tokens are the argmax of either.
      grid, t_start, t_end: see `time_grids.build_times`.
    Raises:
      ValueError: unknown rule, another process, a bad grid, or t_start = 1 with an ODE rule.
    """
    check_choice("rule", rule, DISCRETE_RULES)
    check_discrete(process)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=20)
    if times[0] == 1.0 and rule.startswith("ode"):
        raise ValueError(f"rule {rule!r}: the ODE is singular at t = 1, pass t_start = 1 - eta")
    rows = _discrete_rows(rule, times, process.vocab_size, process.beta1, last_drop)
    order = {"ode1": 1, "ode_euler": 1, "ode2m": 2, "ode2s": 2}.get(rule)
    made = rows.sampler(
        process.point(times[-1]), order=None if last_drop else order, name=f"bfn_{rule}"
    )
    return dataclasses.replace(made, prepare=LogitsPrepare(process.vocab_size))


def _named(name, build, rule, **meta):
    def make(process, num_steps=None, **options):
        return build(process, num_steps, **{"rule": rule, **options})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"`{build.__name__}` with rule={rule!r}."
    register("sampler", name, paper="2404.15766", **meta)(make)


for _rule, _order in (("ode1", 1), ("ode2", 2), ("sde2", None)):
    _named(f"bfn_solver_{_rule}", bfn_solver, _rule, family="gaussian", order=_order)
for _rule in DISCRETE_RULES:
    _calls = "2n" if _rule == "ode2s" else "n"
    _named(f"bfn_{_rule}", bfn_solver_discrete, _rule, family="bayesian_flow", calls=_calls)
