"""Models trained on a finite list of noise levels (DDPM's 1000 betas), as a process in continuous time.

The state after noising step n (the n of a network trained on 0..N-1) stands at t = (n + 1) / N, and
log alpha is linear in between, as in DPM-Solver (arXiv 2206.00927, appendix D.4); t = 0 is clean data.
A network that wants the integer label gets `N t - 1`.

Deviation: between t = 0 and 1/N log alpha runs to 0, where the authors' code extrapolates the first
two entries beyond it (alpha > 1 at t = 0); from 1/N on both agree.
"""

from typing import Any

import numpy as np

from diffusion_jax.numerics import as_time, namespace, pytree_dataclass
from diffusion_jax.processes.gaussian import GaussianProcess
from diffusion_jax.registry import check_choice, register

SCHEDULES = ("linear", "scaled_linear", "cosine")
_LEAST_LAM = -5.1  # entries with less log-SNR are left out: the cosine list ends at alpha = 0


def _betas(schedule, steps, beta_min, beta_max):
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "linear":
        return np.linspace(beta_min, beta_max, steps)
    if schedule == "scaled_linear":
        return np.linspace(np.sqrt(beta_min), np.sqrt(beta_max), steps) ** 2
    edges = np.cos((np.linspace(0.0, 1.0, steps + 1) + 0.008) / 1.008 * np.pi / 2.0) ** 2
    return np.minimum(1.0 - edges[1:] / edges[:-1], 0.999)


@pytree_dataclass
class DiscreteVP(GaussianProcess):
    """A variance-preserving process through a list of log alphas; build it with `discrete_vp`.

    Args:
      log_alphas: `[N]` float64, negative and decreasing: log alpha after each noising step.
    """

    log_alphas: Any

    t_max = 1.0

    @property
    def num_train_steps(self) -> int:
        """N, the number of noise levels that are kept."""
        return len(self.log_alphas)

    @property
    def t_min(self):
        return 1.0 / self.num_train_steps

    def _knots(self, xp):
        steps = self.num_train_steps
        values = xp.concatenate([xp.zeros_like(self.log_alphas[:1]), self.log_alphas])
        return xp.arange(steps + 1) / steps, values

    def log_alpha(self, t):
        xp, t = as_time(t, self.log_alphas)
        knots, values = self._knots(xp)
        return xp.interp(t, knots.astype(t.dtype), values.astype(t.dtype))

    def _slope(self, t):
        """d log alpha / dt, constant within each step."""
        xp, t = as_time(t, self.log_alphas)
        own = namespace(self.log_alphas)  # the differences cancel: in float64 where the list is
        _, values = self._knots(own)
        steps = self.num_train_steps
        at = xp.clip(xp.ceil(t * steps).astype(int) - 1, 0, steps - 1)
        return xp.asarray((steps * own.diff(values)).astype(t.dtype))[at]

    def sigma(self, t):
        log_alpha = self.log_alpha(t)
        xp = namespace(log_alpha)
        return xp.sqrt(-xp.expm1(2.0 * log_alpha))

    def dalpha(self, t):
        return self.alpha(t) * self._slope(t)

    def dsigma(self, t):
        with np.errstate(divide="ignore"):
            return -self.alpha(t) * self.dalpha(t) / self.sigma(t)

    def diffusion_squared(self, t):
        """g(t)^2 = -2 f, as alpha^2 + sigma^2 = 1; finite at t = 0 too."""
        return -2.0 * self._slope(t)

    def t_of_lam(self, lam):
        """Inverse of `lam`."""
        xp, lam = as_time(lam, self.log_alphas)
        knots, values = self._knots(xp)
        log_alpha = -0.5 * xp.logaddexp(0.0, -2.0 * lam)
        # both lists reversed: interp wants increasing abscissas
        return xp.interp(log_alpha, values[::-1].astype(lam.dtype), knots[::-1].astype(lam.dtype))


@register("process", "discrete_vp", family="gaussian", paper="2006.11239")
def discrete_vp(
    schedule: str = "linear",
    num_train_steps: int = 1000,
    beta_min: float = 1e-4,
    beta_max: float = 0.02,
    betas: Any = None,
) -> DiscreteVP:
    """DDPM's list of betas (Ho et al., arXiv 2006.11239) as a process.

    Args:
      schedule: "linear", "scaled_linear" (latent diffusion: linear in sqrt(beta)) or "cosine"
        (arXiv 2102.09672; the list is cut where the half log-SNR falls below -5.1, 1000 -> 996 levels).
      num_train_steps: length of the list.
      beta_min, beta_max: its ends (not "cosine").
      betas: the list itself `[N]`, in place of all of the above.
    Raises:
      ValueError: unknown schedule, fewer than 2 steps, or betas outside (0, 1).
    """
    if betas is None:
        if not isinstance(num_train_steps, int | np.integer) or num_train_steps < 2:
            raise ValueError(f"num_train_steps must be an int of at least 2, got {num_train_steps}")
        betas = _betas(schedule, int(num_train_steps), beta_min, beta_max)
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or len(betas) < 2 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(
            f"betas must be a list of at least 2 numbers in (0, 1); got shape {betas.shape}, "
            f"{betas.min() if betas.size else None} to {betas.max() if betas.size else None}"
        )
    log_alphas = 0.5 * np.cumsum(np.log1p(-betas))
    lam = log_alphas - 0.5 * np.log(-np.expm1(2.0 * log_alphas))
    return DiscreteVP(log_alphas[lam >= _LEAST_LAM])
