"""Variance-preserving processes given by their log-SNR (VDM, arXiv 2107.00630).

With gamma(t) = -log_snr(t), increasing in t:
  (1) alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma)            [eq. 3-4]
  (2) alpha' = -1/2 gamma' sigma^2 alpha,  sigma' = 1/2 gamma' alpha^2 sigma
  (3) f = -1/2 gamma' sigma^2,  g^2 = gamma' sigma^2
Both ends have a finite log-SNR, so the clock is the whole of [0, 1]. At gamma = -13.3 sigma^2 is 1.7e-6:
nothing here subtracts from 1.

Equivalence: two of these processes with the same ends differ by a change of clock alone, so whatever
is a function of the noise level (a denoiser told the log-SNR, an exact sampler, the continuous-time
likelihood bound) is the same for both. A sampler on a `LinearLogSNR` therefore serves a model that
was trained with any other gamma between the same ends.
"""

from diffusion_jax.numerics import as_time, is_concrete, namespace, pytree_dataclass
from diffusion_jax.processes.gaussian import GaussianProcess
from diffusion_jax.registry import register


def log_alpha_of(gamma):
    """`log alpha` at a gamma, elementwise: `-1/2 softplus(gamma)`."""
    return -0.5 * namespace(gamma).logaddexp(0.0, gamma)


def sigma_of(gamma):
    """`sigma` at a gamma, elementwise: `exp(-1/2 softplus(-gamma))`."""
    xp = namespace(gamma)
    return xp.exp(-0.5 * xp.logaddexp(0.0, -gamma))


def point_of(gamma, t, dgamma):
    """The `Point` at a gamma: what `process.point(t)` gives where `gamma(t)` is a learned function.

    Args:
      gamma, t, dgamma: `-log_snr`, the time and d gamma / dt, of one shape, NumPy or JAX.
    Returns:
      `t, alpha, sigma, dalpha, dsigma`, each of that shape.
    """
    alpha, sigma = namespace(gamma).exp(log_alpha_of(gamma)), sigma_of(gamma)
    return {
        "t": t,
        "alpha": alpha,
        "sigma": sigma,
        "dalpha": -0.5 * dgamma * sigma**2 * alpha,
        "dsigma": 0.5 * dgamma * alpha**2 * sigma,
    }


class LogSNRProcess(GaussianProcess):
    """A variance-preserving process from `gamma(t)`; a subclass gives `gamma, dgamma, t_of_gamma`."""

    t_min = 0.0
    t_max = 1.0

    def log_alpha(self, t):
        return log_alpha_of(self.gamma(t))

    def sigma(self, t):
        return sigma_of(self.gamma(t))

    def lam(self, t):
        """Half log signal-to-noise ratio, `-gamma / 2` without rounding."""
        return -0.5 * self.gamma(t)

    def dalpha(self, t):
        return -0.5 * self.dgamma(t) * self.sigma(t) ** 2 * self.alpha(t)

    def dsigma(self, t):
        return 0.5 * self.dgamma(t) * self.alpha(t) ** 2 * self.sigma(t)

    def drift(self, t):
        return -0.5 * self.dgamma(t) * self.sigma(t) ** 2

    def diffusion_squared(self, t):
        return self.dgamma(t) * self.sigma(t) ** 2

    def noise_level(self, t):
        """`sigma / alpha = exp(gamma / 2)`."""
        gamma = self.gamma(t)
        return namespace(gamma).exp(0.5 * gamma)

    def t_of_lam(self, lam):
        """Inverse of `lam`."""
        _, lam = as_time(lam)
        return self.t_of_gamma(-2.0 * lam)


@register("process", "linear_log_snr", family="gaussian", paper="2107.00630")
@pytree_dataclass
class LinearLogSNR(LogSNRProcess):
    """log-SNR linear in t: `gamma(t) = gamma_min + (gamma_max - gamma_min) t` (arXiv 2107.00630).

    Args:
      gamma_min: -log_snr at the data, t = 0.
      gamma_max: -log_snr at the noise, t = 1.
    Raises:
      ValueError: gamma_min not below gamma_max.
    """

    gamma_min: float = -13.3
    gamma_max: float = 5.0

    def __post_init__(self):
        if is_concrete(self.gamma_min, self.gamma_max) and not self.gamma_min < self.gamma_max:
            raise ValueError(
                f"LinearLogSNR: need gamma_min < gamma_max, got {self.gamma_min} and {self.gamma_max}"
            )

    def gamma(self, t):
        """`-log_snr`, the shape of t."""
        _, t = as_time(t, self.gamma_min, self.gamma_max)
        # from the nearer end, so that both ends come out without rounding
        xp, span = namespace(t), self.gamma_max - self.gamma_min
        return xp.where(t < 0.5, self.gamma_min + span * t, self.gamma_max - span * (1.0 - t))

    def dgamma(self, t):
        """d gamma / dt, the shape of t."""
        xp, t = as_time(t, self.gamma_min, self.gamma_max)
        return (self.gamma_max - self.gamma_min) * xp.ones_like(t)

    def t_of_gamma(self, gamma):
        """Inverse of `gamma`."""
        _, gamma = as_time(gamma, self.gamma_min, self.gamma_max)
        return (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)
