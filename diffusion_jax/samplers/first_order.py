"""First-order solvers: DDIM with eta, DDPM's ancestral sampler, Euler on the probability-flow ODE."""

import numpy as np

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.gaussian_path import gaussian_path
from diffusion_jax.samplers.learned_variance import learned_ancestral
from diffusion_jax.samplers.linear import D, Form, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler


def _ancestral_std(p, i):
    """Posterior standard deviation of step i: `q(x_{i+1} | x_i, x0)` of the forward chain."""
    shrink = (p.alpha[i] / p.alpha[i + 1] * p.sigma[i + 1]) ** 2
    return p.sigma[i + 1] / p.sigma[i] * np.sqrt(max(p.sigma[i] ** 2 - shrink, 0.0))


def ddim_step(x, here, there, x0=D):
    """The exact step for a constant x0_hat from point to point, as a linear form of x and x0.

    It is the first order of every exponential integrator, whatever that extrapolates, and written so
    that an infinite log-SNR at either end does no harm.
    """
    k = there["sigma"] / here["sigma"]
    return k * x + (there["alpha"] - k * here["alpha"]) * x0


def noise_weight(p, i):
    """What eps weighs in the exact step of order 1 from grid point i: `sigma' - (alpha'/alpha) sigma`."""
    return p.sigma[i + 1] - p.alpha[i + 1] / p.alpha[i] * p.sigma[i]


def blended(p, i, blend):
    """What a blend (see `dualfast`) adds to x' of step i, and the registers it writes: `(Form, dict)`.

    `blend(p, i)` returns what is added to the eps of the first-order term; in x0 or in eps, of any
    order, that term turns it into `noise_weight` times as much of x'.
    """
    shift, registers = blend(p, i) if blend else (Form(), {})
    return (noise_weight(p, i) * shift if shift else shift), registers


@register("sampler", "ddim", family="gaussian", paper="2010.02502", order=1)
def ddim(
    process,
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    grid=None,
    t_start=None,
    t_end=None,
    denoise_to_zero: bool = False,
    blend=None,
) -> Sampler:
    """DDIM (Song et al., arXiv 2010.02502, eq. 12), for any Gaussian process.

    `x' = alpha' D + sqrt(sigma'^2 - w^2) eps + w z`, w = eta times the ancestral deviation.

    Equivalences: eta = 0 is DPM-Solver-1 and DPM-Solver++-1; eta = 1 is DDPM's posterior sampler, and
    with alpha = 1 the Euler ancestral sampler of k-diffusion.

    Args:
      process: a Gaussian process.
      num_steps: network calls, default 50.
      eta: 0 (deterministic) to 1 (ancestral).
      grid, t_start, t_end: see `time_grids.build_times`.
      denoise_to_zero: one more call at the last time, whose x0_hat is returned.
      blend: changes the prediction, see `dualfast`; for eta = 0.
    Raises:
      ValueError: eta outside [0, 1], a blend with eta > 0, or a bad grid.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if blend and eta:
        raise ValueError(f"a blend needs the deterministic DDIM, eta = 0; got eta={eta}")
    p, rows = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=50), Rows()
    registers = {}
    for i in range(p.steps):
        w = eta * _ancestral_std(p, i) if eta else 0.0
        k = np.sqrt(max(p.sigma[i + 1] ** 2 - w**2, 0.0)) / p.sigma[i]
        shift, registers = blended(p, i, blend)
        y = k * Y + (p.alpha[i + 1] - k * p.alpha[i]) * D + w * Z + shift
        rows.add(p.point(i), y, **registers)
    if denoise_to_zero:
        rows.add(p.point(p.steps), D, **registers)
    end = p.clean_point() if denoise_to_zero else p.point(p.steps)
    return rows.sampler(end, order=1 if eta == 0 and not blend else None, name="ddim")


@register("sampler", "ddpm", family="gaussian", paper="2006.11239")
def ddpm(
    process,
    num_steps: int | None = None,
    *,
    variance: str = "small",
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """DDPM's ancestral sampler (Ho et al., arXiv 2006.11239, alg. 2).

    Args:
      num_steps: network calls, default 50.
      variance: "small", the posterior variance (equals DDIM with eta = 1), "large", the variance
        of the forward step (beta), or "learned", between the two as the model says (arXiv 2102.09672,
        for `method.learned_variance`); the last step into sigma = 0 draws nothing.
    Raises:
      ValueError: unknown variance, or a bad grid.
    """
    check_choice("variance", variance, ("small", "large", "learned"))
    p, rows = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=50), Rows()
    if variance == "learned":
        return learned_ancestral(p)
    for i in range(p.steps):
        w = _ancestral_std(p, i)
        k = np.sqrt(max(p.sigma[i + 1] ** 2 - w**2, 0.0)) / p.sigma[i]
        if variance == "large" and p.sigma[i + 1] > 0:
            w = w * p.sigma[i] / p.sigma[i + 1]
        rows.add(p.point(i), k * Y + (p.alpha[i + 1] - k * p.alpha[i]) * D + w * Z)
    return rows.sampler(p.point(p.steps), name="ddpm")


@register("sampler", "euler", family="gaussian", paper="2011.13456", order=1)
def euler(
    process,
    num_steps: int | None = None,
    *,
    offset: float = 0.0,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """Explicit Euler in t on `dx/dt = alpha' x0 + sigma' eps` (arXiv 2011.13456, eq. 13).

    50 steps by default.
    Equivalences: equals DDIM for EDM and rectified flow, where t itself is the natural clock.

    Args:
      offset: where in a step's time the slope is taken, of the x at its beginning: 0.5 is Grad-TTS's
        solver (arXiv 2105.06337).
      others: as for `ddim`.
    Raises:
      ValueError: offset outside [0, 1), or a bad grid.
    """
    if not 0.0 <= offset < 1.0:
        raise ValueError(f"offset must lie in [0, 1), got {offset}")
    p, rows = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=50), Rows()
    for i in range(p.steps):
        step = p.t[i + 1] - p.t[i]
        here = process.point(p.t[i] + offset * step)
        rows.add(here, Y + step * velocity(here, Y, D))
    return rows.sampler(p.point(p.steps), order=1, name="euler")


def velocity(point, x, x0):
    """Probability-flow velocity at a point as a linear form of x and x0."""
    eps = (x - point["alpha"] * x0) / point["sigma"]
    return point["dalpha"] * x0 + point["dsigma"] * eps
