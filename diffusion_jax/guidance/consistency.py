"""Maps along the probability-flow ODE of a bridge, made of a denoiser (CDBM, arXiv 2410.22637).

The consistency function h(x, t) is the point at t_end of the ODE path through x at t:
  (1) h = k x + (b_e - k b) D(x, t) + (a_e - k a) x1, k = c_e / c, and h = D where c = 0 (the source)
One first-order step of the ODE, so h(x, t_end) = x holds exactly for every schedule and every
network, and a trained bridge is its own initial value: untrained, (1) is DBIM with one step after the
boot. At t_end = 0 it is D itself, whose preconditioning in DDBM meets the boundary condition there.

Deviations: the paper writes the boundary condition into c_skip and c_out of each parameterisation; those
expressions are in no public code and are not offered. Any of them is (1) with another network.
"""

from typing import Any

import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import expand, pytree_dataclass, static
from diffusion_jax.processes.bridge_steps import ode_step
from diffusion_jax.registry import check_choice


@pytree_dataclass
class bridge_consistency:
    """A denoiser of a bridge as the consistency function (1): `(x, t) -> x at t_end`.

    Args:
      denoise: the denoiser, `[B, ...] -> [B, ...]`.
      process: the bridge process.
      source: x1 `[B, ...]`.
      t_end: where paths end; None is the process's t_min.
    """

    denoise: Any
    process: Any
    source: Any
    t_end: Any = None

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def at(self, x, point):
        """h(x, t) `[B, ...]` at a point of the schedule."""
        x0_hat, _ = evaluate(self.denoise, x, point)
        end = self.process.point(self.process.t_min if self.t_end is None else self.t_end)
        noisy = jnp.asarray(point["c"]) > 0
        safe = {**point, "c": jnp.where(noisy, point["c"], 1.0)}
        stepped = ode_step(x, x0_hat, self.source, safe, end)
        return jnp.where(expand(noisy, x), stepped, x0_hat).astype(x.dtype)


@pytree_dataclass
class bridge_ode_map:
    """One step of the probability-flow ODE, `(x, t, r) -> x at r`: the teacher's part of distillation.

    Order 1 freezes x0_hat, as DBIM with eta = 0 does; order 2 makes a second call at the end of that step and
    integrates the line through both predictions in lam = log(b / c), exactly:
      x' = first order + b' (e^-h - 1 + h) (D' - D) / h, h = lam' - lam

    Args:
      denoise, process, source: as in `bridge_consistency`.
      order: 1 or 2, the network calls of a step.
    Raises:
      ValueError: another order.
    """

    denoise: Any
    process: Any
    source: Any
    order: int = static(1)

    def __post_init__(self):
        check_choice("order", self.order, (1, 2))

    def __call__(self, x, t, r):
        """x at r, `[B, ...]`; t, r scalar or `[B]`, 0 < r <= t < 1. r = t gives x."""
        here, there = self.process.point(t), self.process.point(r)
        first, _ = evaluate(self.denoise, x, here)
        step = ode_step(x, first, self.source, here, there)
        if self.order == 1:
            return step
        second, _ = evaluate(self.denoise, step, there)
        h = jnp.log(there["b"] * here["c"] / (here["b"] * there["c"]))
        # (e^-h - 1 + h) / h, its series where the difference would cancel
        exact = (jnp.expm1(-h) + h) / jnp.where(h > 0, h, 1.0)
        slope = jnp.where(h < 1e-2, h * (0.5 - h * (1.0 / 6.0 - h / 24.0)), exact)
        return step + expand(there["b"] * slope, x) * (second - first)
