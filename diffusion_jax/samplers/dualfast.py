"""DualFast: against the network's own error, mix in a cached earlier prediction (arXiv 2506.13058).

  (1) eps~ = (1 + c_t) eps(x_t, t) - c_t eps(x_tau, tau),  tau > t, from an earlier call
replaces eps (or the x0_hat that belongs to it) in the first-order term of a solver; differences of higher
order keep the raw predictions; no call is added. In every solver that adds
`c_t (sigma' - (alpha'/alpha) sigma) (eps - eps_tau)` to x'. UniPC's corrector repeats it.

Unverified: there is no official code, and the paper's own rules for c_t and tau were not at hand; here
c_t = c (1 - t) and tau is the first call unless told otherwise, and raw differences are our reading.
A step into sigma = 0 is not mixed: it returns the network's prediction.
Caution: what is corrected is ambiguous. With an exact model mixing still cuts the error at few steps,
since it extrapolates, and biases the limit of many steps by an amount linear in c: no order is declared.
The default c = 1 / steps, 0.3 at most, lets that bias vanish.
"""

import dataclasses
from collections.abc import Callable

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.dpm_solver import dpm_solver, dpm_solver_pp
from diffusion_jax.samplers.first_order import ddim
from diffusion_jax.samplers.linear import D, Form, Y, register_form
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.unipc import unipc

SOLVERS = {
    "ddim": ddim,
    "dpm_solver": lambda process, n, **kw: dpm_solver(process, n, prediction="eps", **kw),
    "dpm_solver_pp": dpm_solver_pp,
    "unipc": unipc,
}
REFERENCES = ("first", "previous")


@dataclasses.dataclass(frozen=True)
class Blend:
    """The hook of the builders: `(path, i) -> (what is added to eps in step i, registers written)`.

    Attributes:
      c: c_t = c (1 - t), or a function t -> c_t; None is 1 / steps, 0.3 at most.
      tau: the cached call, "first" or "previous".
    """

    c: float | Callable[[float], float] | None = None
    tau: str = "first"

    def weight(self, p, i) -> float:
        """c_t of step i."""
        if callable(self.c):
            return float(self.c(p.t[i]))
        return (min(0.3, 1.0 / p.steps) if self.c is None else self.c) * (1.0 - p.t[i])

    def __call__(self, p, i):
        eps, memo = (Y - p.alpha[i] * D) / p.sigma[i], register_form("memo")
        written = {"memo": memo if i > 0 and self.tau == "first" else eps}
        if i == 0 or p.sigma[i + 1] == 0:
            return Form(), written
        return self.weight(p, i) * (eps - memo), written


def dualfast(
    process,
    num_steps: int | None = None,
    *,
    solver: str = "ddim",
    c: float | Callable[[float], float] | None = None,
    tau: str = "first",
    **options,
) -> Sampler:
    """DualFast (arXiv 2506.13058) on a solver; the calls are those of the solver.

    Args:
      process: a Gaussian process.
      num_steps: as the solver.
      solver: "ddim", "dpm_solver" (noise prediction), "dpm_solver_pp" or "unipc".
      c: strength, c_t = c (1 - t), 0.1 to 0.3 at few steps; or a function t -> c_t. None is
        1 / steps, 0.3 at most: 0.1 at 10 steps.
      tau: the call whose eps is mixed in, "first" or "previous".
      options: of the solver (order, grid, ...).
    Equivalences: c = 0 is the solver itself, the same table. Order 1 of every solver (UniPC without
      corrector) is the "ddim" variant.
    Raises:
      ValueError: unknown solver or tau, a negative c, or what the solver raises.
    """
    check_choice("solver", solver, SOLVERS)
    check_choice("tau", tau, REFERENCES)
    if c is not None and not callable(c) and not 0.0 <= c < float("inf"):
        raise ValueError(f"c must be finite and not negative, got {c}")
    blend = None if c is not None and not callable(c) and c == 0 else Blend(c, tau)
    sampler = SOLVERS[solver](process, num_steps, blend=blend, **options)
    return dataclasses.replace(sampler, name=f"dualfast_{sampler.name}") if blend else sampler


def _named(name, **fixed):
    """Registers DualFast on one solver."""

    def make(process, num_steps=None, **options):
        return dualfast(process, num_steps, **{**fixed, **options})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"`dualfast` with {', '.join(f'{k}={v!r}' for k, v in fixed.items())}."
    meta = {"paper": "2506.13058", "min_steps": fixed.get("order", 1)}
    register("sampler", name, family="gaussian", **meta)(make)


_named("dualfast_ddim", solver="ddim")
_named("dualfast_dpmpp_2m", solver="dpm_solver_pp", order=2)
_named("dualfast_unipc_2", solver="unipc", order=2)
