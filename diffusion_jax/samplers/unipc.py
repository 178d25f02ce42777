"""UniPC: a multistep predictor, and a corrector that costs no call (Zhao et al., arXiv 2302.04867).

Step i -> i + 1, h = lam' - lam, m the prediction (x0 or eps), m_j that at grid point i - j, g = -1 (x0) or
+1 (eps), z = g h, L and K as in DPM-Solver, r_j = (lam_{i-j} - lam_i) / h, D_j = (m_j - m_0) / r_j,
B = z ("bh1") or expm1(z) ("bh2"), b_k = z k! phi_{k+1}(z) / B, k! phi_{k+1}(z) = int_0^1 e^{(1-s) z} s^k ds:
  (1) predictor, order p   x^ = L x - K expm1(z) m_0 - K B sum_{j<p} rho_j D_j
  (2) corrector, order p   x' = the same with one more term, at r_p = 1, D_p = m(x^) - m_0
  (3) weights              sum_j r_j^{k-1} rho_j = b_k, k = 1, 2, ...; a single weight is 1/2
m(x^) enters the history as it is; x' itself is never evaluated. The last step is a predictor alone.

Deviations: none in what is here. The authors' third variant, "vary_coeff", is left out: its released
corrector adds the term of the new point once instead of in every component, and its order is 1.
"""

import functools
from collections.abc import Sequence

import numpy as np

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.dpm_solver import predicted, step_factors, step_orders
from diffusion_jax.samplers.first_order import blended, ddim_step
from diffusion_jax.samplers.gaussian_path import check_order, gaussian_path
from diffusion_jax.samplers.linear import A, D, H, Rows, Y, register_form
from diffusion_jax.samplers.scan import Sampler


@functools.cache
def _nodes(count=64):
    x, w = np.polynomial.legendre.leggauss(count)
    return 0.5 * (x + 1.0), 0.5 * w


def _moments(z, count):
    """`k! phi_{k+1}(z)`, k = 1..count, by quadrature: the recursion of phi loses its digits at small z."""
    s, w = _nodes()
    return np.array([np.sum(w * np.exp((1.0 - s) * z) * s**k) for k in range(1, count + 1)])


def _weights(r, z, scale):
    """The rho of (3) for the ratios r."""
    if len(r) == 1:
        return np.array([0.5])
    return np.linalg.solve(np.vander(r, increasing=True).T, z * _moments(z, len(r)) / scale)


def _advance(p, i, order, x, m, variant, prediction, new=None):
    """Grid point i -> i + 1 from the form x; m = predictions at i, i - 1, ...; new = that at i + 1, or None."""
    g, L, K = step_factors(prediction, p.point(i), p.point(i + 1))
    h = p.lam[i + 1] - p.lam[i]
    z = g * h
    scale = z if variant == "bh1" else np.expm1(z)
    r = [(p.lam[i - j] - p.lam[i]) / h for j in range(1, order)]
    d = [(m[j] - m[0]) / r[j - 1] for j in range(1, order)]
    if new is not None:
        r, d = [*r, 1.0], [*d, new - m[0]]
    y = L * x - K * np.expm1(z) * m[0]
    if not r:
        return y
    return y - K * scale * sum(rho * q for rho, q in zip(_weights(r, z, scale), d))


def unipc(
    process,
    num_steps: int | None = None,
    *,
    order: int = 3,
    variant: str = "bh2",
    prediction: str = "x0",
    corrector: bool = True,
    corrector_off: Sequence[int] = (),
    lower_order_final: bool = True,
    grid=None,
    t_start=None,
    t_end=None,
    denoise_to_zero: bool = False,
    blend=None,
) -> Sampler:
    """UniPC of order 1 to 4 (Zhao et al., arXiv 2302.04867), one network call a step.

    With the corrector the order of convergence is `order + 1`, without it `order`. At 5 or 6 calls
    order 3 overshoots on small data; order 2 is the safer one there. Steps from alpha = 0 or into
    sigma = 0 have order 1 and are not corrected.

    Args:
      process: a Gaussian process.
      num_steps: network calls, default 10 (a call more with `denoise_to_zero`).
      order: of the predictor and of the corrector's formula, lowered while there is less history.
      variant: "bh2" (B = expm1(z)) or "bh1" (B = z); they differ at few steps.
      prediction: what is extrapolated, "x0" or "eps", whatever the network itself predicts. "eps" is
        the more sensitive: at 5 calls of order 3 it raises float32 rounding to 5e-5.
      corrector: whether results are corrected; False is UniP.
      corrector_off: indices of steps whose result is not corrected (correctors harm the first steps
        at large guidance); 0 is the step that leaves t_start.
      lower_order_final: lower the order over the last steps, as the authors' code always does.
      grid, t_start, t_end: see `time_grids.build_times`.
      denoise_to_zero: one more call at the last time, whose x0_hat is returned.
      blend: changes the first-order prediction, see `dualfast`.
    Equivalences: without corrector, order 1 is DDIM and order 2 with "bh2" is DPM-Solver++(2M).
    Raises:
      ValueError: an option outside the values above, an index that is no step, fewer steps than the
        order, or a bad grid.
    """
    check_choice("order", order, (1, 2, 3, 4))
    check_choice("variant", variant, ("bh1", "bh2"))
    check_choice("prediction", prediction, ("x0", "eps"))
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=10)
    check_order(order, p.steps)
    off = list(corrector_off)
    for step in off:
        if not isinstance(step, int | np.integer) or not 0 <= step < p.steps:
            raise ValueError(f"corrector_off holds step indices 0 to {p.steps - 1}; got {step!r}")
    finite = np.isfinite(p.lam)
    orders = step_orders(p, order, lower_order_final)
    if not finite[0]:  # the first point has no place in lam: history begins at the second
        orders = [max(1, min(k, i)) for i, k in enumerate(orders)]
    rows, registers = Rows(), {}
    for i in range(p.steps):
        m = [predicted(prediction, p.point(i)), *(H(j) for j in range(1, order + 1))]
        x, before = Y, i - 1
        if corrector and i > 0 and finite[before] and before not in off:
            x = _advance(p, before, orders[before], A, m[1:], variant, prediction, new=m[0])
            if blend:
                x = x + register_form("shift")
        if finite[i] and finite[i + 1]:
            y = _advance(p, i, orders[i], x, m, variant, prediction)
        else:
            y = ddim_step(x, p.point(i), p.point(i + 1))
        shift, registers = blended(p, i, blend)
        if blend:
            registers = {**registers, "shift": shift}
        rows.add(p.point(i), y + shift, anchor=x, push=m[0], **registers)
    if denoise_to_zero:
        rows.add(p.point(p.steps), D, **registers)
    end = p.clean_point() if denoise_to_zero else p.point(p.steps)
    name = f"{'unipc' if corrector else 'unip'}_{order}"
    name += ("_bh1" if variant == "bh1" else "") + ("_eps" if prediction == "eps" else "")
    reached = order + 1 if corrector and not off else order
    return rows.sampler(end, order=None if blend else reached, name=name)


def _named(name, reached, **fixed):
    """Registers a member of the family; `reached` is its order of convergence."""

    def make(process, num_steps=None, **options):
        return unipc(process, num_steps, **{**fixed, **options})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"`unipc` with {', '.join(f'{k}={v!r}' for k, v in fixed.items())}."
    meta = {"paper": "2302.04867", "order": reached, "min_steps": fixed["order"]}
    register("sampler", name, family="gaussian", **meta)(make)


_named("unipc_1", 2, order=1)
_named("unipc_2", 3, order=2)
_named("unipc_3", 4, order=3)
_named("unipc_3_bh1", 4, order=3, variant="bh1")
