"""Gaussian diffusion processes `x_t = alpha(t) x0 + sigma(t) eps`, t in [0, 1], 0 = data, 1 = noise.

Identities used throughout, with f the drift and g the diffusion of `dx = f x dt + g dw`:
  (1) lam = log(alpha / sigma), log_snr = 2 lam
  (2) f = alpha' / alpha, g^2 = 2 sigma sigma' - 2 f sigma^2
  (3) probability-flow velocity  dx/dt = alpha' x0 + sigma' eps
A process is a pytree of numbers and a set of pure functions of t: NumPy in, float64 NumPy out (for
tables on the host); JAX in, JAX out (inside a loss). Whatever cancels is written with expm1/log1p.

Papers with other clocks are mapped here, at the edge: EDM's own time sigma is `sigma_max * t`.
"""

import jax
import numpy as np

from diffusion_jax.numerics import (
    as_time,
    check_times,
    example_keys,
    expand,
    is_concrete,
    namespace,
    normal_per_example,
    pytree_dataclass,
)
from diffusion_jax.registry import register


class GaussianProcess:
    """What the schedules below share; a subclass gives `log_alpha, sigma, dalpha, dsigma, t_of_lam`.

    Attributes:
      t_min, t_max: the interval of finite log-SNR on which a network is trained.
      sampling_range: `(t_start, t_end)` where samplers begin and end unless told otherwise.
      prior_std: standard deviation of the sampler's starting noise.
      default_grid: name of the time grid that suits the process.
    """

    t_min: float
    t_max: float
    default_grid = "log_snr"
    prior_std = 1.0

    @property
    def sampling_range(self):
        return self.t_max, self.t_min

    def alpha(self, t):
        """Signal coefficient, the shape of `t`."""
        log_alpha = self.log_alpha(t)
        return namespace(log_alpha).exp(log_alpha)

    def lam(self, t):
        """Half log signal-to-noise ratio `log(alpha / sigma)`; infinite where sigma or alpha is 0."""
        log_alpha, sigma = self.log_alpha(t), self.sigma(t)
        with np.errstate(divide="ignore"):
            return log_alpha - namespace(sigma).log(sigma)

    def log_snr(self, t):
        """`log(alpha^2 / sigma^2)`."""
        return 2.0 * self.lam(t)

    def drift(self, t):
        """f(t) of the forward SDE `dx = f x dt + g dw`."""
        return self.dalpha(t) / self.alpha(t)

    def diffusion_squared(self, t):
        """g(t)^2 of the forward SDE."""
        sigma = self.sigma(t)
        return 2.0 * sigma * self.dsigma(t) - 2.0 * self.drift(t) * sigma**2

    def noise_level(self, t):
        """`sigma / alpha`, the clock of EDM and of Karras grids."""
        return self.sigma(t) / self.alpha(t)

    def t_of_noise_level(self, u):
        """Inverse of `noise_level`."""
        xp, u = as_time(u)
        return self.t_of_lam(-xp.log(u))

    def point(self, t):
        """The schedule at `t` as a dictionary `t, alpha, sigma, dalpha, dsigma`."""
        _, t = as_time(t)
        return {
            "t": t,
            "alpha": self.alpha(t),
            "sigma": self.sigma(t),
            "dalpha": self.dalpha(t),
            "dsigma": self.dsigma(t),
        }

    def corrupt(self, x0, eps, t):
        """A draw of `q(x_t | x0)`: `alpha x0 + sigma eps`; `x0, eps` `[B, ...]`, `t` scalar or `[B]`."""
        return expand(self.alpha(t), x0) * x0 + expand(self.sigma(t), x0) * eps

    def prior(self, key, shape, dtype=np.float32, index=None):
        """Starting noise `[B, ...]`; example i depends on `key` and `index[i]` (default i) alone."""
        index = np.arange(shape[0]) if index is None else index
        like = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
        return self.prior_std * normal_per_example(example_keys(key, index), like)


def check_range(process, **bounds):
    """Raises ValueError unless `low < value < high` for each `name=(value, low, high)` of plain numbers."""
    for name, (value, low, high) in bounds.items():
        if is_concrete(value, low, high) and not low < value < high:
            raise ValueError(
                f"{type(process).__name__}: {name} = {value} must lie between {low} and {high}"
            )


class _LinearBeta(GaussianProcess):
    """log alpha of the linear beta schedule, shared by VP and sub-VP."""

    def log_alpha(self, t):
        _xp, t = as_time(t, self.beta_max)
        return -0.25 * (self.beta_max - self.beta_min) * t * t - 0.5 * self.beta_min * t

    def beta(self, t):
        """`beta_min + (beta_max - beta_min) t`, the rate of the SDE."""
        _, t = as_time(t, self.beta_max)
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def dalpha(self, t):
        return -0.5 * self.beta(t) * self.alpha(t)

    def _t_of_log_alpha(self, log_alpha):
        xp = namespace(log_alpha, self.beta_min, self.beta_max)
        b0, slope = self.beta_min, self.beta_max - self.beta_min
        return -4.0 * log_alpha / (b0 + xp.sqrt(b0**2 - 4.0 * slope * log_alpha))

    def __post_init__(self):
        check_range(
            self,
            beta_min=(self.beta_min, 0.0, float("inf")),
            beta_max=(self.beta_max, self.beta_min, float("inf")),
            t_min=(self.t_min, 0.0, self.t_max),
        )
        check_times(self)


@register("process", "vp", family="gaussian", paper="2011.13456")
@pytree_dataclass
class VP(_LinearBeta):
    """Variance-preserving SDE with linear beta (Song et al., arXiv 2011.13456).

    Args:
      beta_min, beta_max: the rate at t = 0 and t = 1.
      t_min, t_max: interval of training and sampling.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def sigma(self, t):
        log_alpha = self.log_alpha(t)
        xp = namespace(log_alpha)
        return xp.sqrt(-xp.expm1(2.0 * log_alpha))

    def dsigma(self, t):
        with np.errstate(divide="ignore"):
            return 0.5 * self.beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def diffusion_squared(self, t):
        """g(t)^2 = beta(t), finite at t = 0 too."""
        return self.beta(t)

    def t_of_lam(self, lam):
        """Inverse of `lam`."""
        xp, lam = as_time(lam)
        return self._t_of_log_alpha(-0.5 * xp.logaddexp(0.0, -2.0 * lam))


@register("process", "sub_vp", family="gaussian", paper="2011.13456")
@pytree_dataclass
class SubVP(_LinearBeta):
    """Sub-variance-preserving SDE: alpha of VP, sigma = 1 - alpha^2 (Song et al., arXiv 2011.13456)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def sigma(self, t):
        log_alpha = self.log_alpha(t)
        return -namespace(log_alpha).expm1(2.0 * log_alpha)

    def dsigma(self, t):
        return self.beta(t) * self.alpha(t) ** 2

    def t_of_lam(self, lam):
        """Inverse of `lam`: `sinh(-log alpha) = exp(-lam) / 2`."""
        xp, lam = as_time(lam)
        return self._t_of_log_alpha(-xp.arcsinh(0.5 * xp.exp(-lam)))


@register("process", "cosine", family="gaussian", paper="2102.09672")
@pytree_dataclass
class Cosine(GaussianProcess):
    """Variance-preserving cosine schedule (Nichol and Dhariwal, arXiv 2102.09672).

    alpha(t) = cos(pi/2 (t+s)/(1+s)) / cos(pi/2 s/(1+s)); t_max = 0.9946 keeps the log-SNR finite.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __post_init__(self):
        check_range(self, s=(self.s, 0.0, 1.0), t_max=(self.t_max, self.t_min, 1.0))
        check_times(self)

    def _angles(self, t):
        xp, t = as_time(t, self.s)
        return xp, 0.5 * np.pi * self.s / (1.0 + self.s), 0.5 * np.pi * t / (1.0 + self.s)

    def log_alpha(self, t):
        # log cos(o + d) - log cos(o): a difference from 1 near the data, and near the noise the sine
        # of what is left to the zero of alpha, so that neither end cancels.
        xp, t = as_time(t, self.s)
        late = t > 0.5
        _, o, d = self._angles(xp.where(late, 0.5, t))
        early = xp.log1p(-2.0 * xp.sin(0.5 * d) ** 2 - namespace(o).tan(o) * xp.sin(d))
        rest = 0.5 * np.pi * (1.0 - xp.where(late, t, 0.5)) / (1.0 + self.s)
        with np.errstate(divide="ignore"):
            return xp.where(
                late, xp.log(xp.sin(rest)) - namespace(o).log(namespace(o).cos(o)), early
            )

    def sigma(self, t):
        log_alpha = self.log_alpha(t)
        xp = namespace(log_alpha)
        return xp.sqrt(-xp.expm1(2.0 * log_alpha))

    def dalpha(self, t):
        xp, o, d = self._angles(t)
        return -0.5 * np.pi / (1.0 + self.s) * xp.sin(o + d) / namespace(o).cos(o)

    def dsigma(self, t):
        with np.errstate(divide="ignore"):
            return -self.alpha(t) * self.dalpha(t) / self.sigma(t)

    def diffusion_squared(self, t):
        """g(t)^2 = -2 f, as alpha^2 + sigma^2 = 1; finite at t = 0 too."""
        return -2.0 * self.drift(t)

    def t_of_lam(self, lam):
        """Inverse of `lam`."""
        xp, lam = as_time(lam, self.s)
        o = 0.5 * np.pi * self.s / (1.0 + self.s)
        # alpha = cos(o + d) / cos(o); the arctangent keeps digits where alpha is near 1.
        alpha = xp.exp(-0.5 * xp.logaddexp(0.0, -2.0 * lam))
        c = alpha * namespace(o).cos(o)
        # 1 - c^2 = sigma^2 cos(o)^2 + sin(o)^2 has no cancellation.
        sigma2 = xp.exp(-xp.logaddexp(0.0, 2.0 * lam))
        s = xp.sqrt(sigma2 * namespace(o).cos(o) ** 2 + namespace(o).sin(o) ** 2)
        return 2.0 * (1.0 + self.s) / np.pi * (xp.arctan2(s, c) - o)


@register("process", "ve", family="gaussian", paper="2011.13456")
@pytree_dataclass
class VE(GaussianProcess):
    """Variance-exploding SDE, sigma geometric in t (Song et al., arXiv 2011.13456). sigma(0) = sigma_min."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0
    default_grid = "karras"

    def __post_init__(self):
        check_range(self, sigma_min=(self.sigma_min, 0.0, self.sigma_max))
        check_times(self)

    @property
    def prior_std(self):
        return self.sigma_max

    def _log_ratio(self):
        xp = namespace(self.sigma_min, self.sigma_max)
        return xp.log(self.sigma_max / self.sigma_min)

    def log_alpha(self, t):
        xp, t = as_time(t, self.sigma_min)
        return xp.zeros_like(t)

    def dalpha(self, t):
        return self.log_alpha(t)

    def sigma(self, t):
        xp, t = as_time(t, self.sigma_min, self.sigma_max)
        return self.sigma_min * xp.exp(t * self._log_ratio())

    def dsigma(self, t):
        return self.sigma(t) * self._log_ratio()

    def t_of_lam(self, lam):
        """Inverse of `lam`."""
        _xp, lam = as_time(lam, self.sigma_min)
        return (-lam - namespace(self.sigma_min).log(self.sigma_min)) / self._log_ratio()


@register("process", "edm", family="gaussian", paper="2206.00364")
@pytree_dataclass
class EDM(GaussianProcess):
    """EDM's schedule: alpha = 1, sigma = sigma_max t (Karras et al., arXiv 2206.00364).

    EDM's clock is sigma itself; here t = sigma / sigma_max, so that t = 0 is clean data and
    t_min = sigma_min / sigma_max. Samplers end at t = 0 (one step from sigma_min to 0).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    default_grid = "karras"

    def __post_init__(self):
        check_range(self, sigma_min=(self.sigma_min, 0.0, self.sigma_max))

    @property
    def t_min(self):
        return self.sigma_min / self.sigma_max

    t_max = 1.0

    @property
    def sampling_range(self):
        return 1.0, 0.0

    @property
    def prior_std(self):
        return self.sigma_max

    def log_alpha(self, t):
        xp, t = as_time(t, self.sigma_max)
        return xp.zeros_like(t)

    def dalpha(self, t):
        return self.log_alpha(t)

    def sigma(self, t):
        _, t = as_time(t, self.sigma_max)
        return self.sigma_max * t

    def dsigma(self, t):
        xp, t = as_time(t, self.sigma_max)
        return self.sigma_max * xp.ones_like(t)

    def t_of_lam(self, lam):
        """Inverse of `lam`."""
        xp, lam = as_time(lam, self.sigma_max)
        return xp.exp(-lam) / self.sigma_max


@register("process", "rectified_flow", family="gaussian", paper="2209.03003")
@pytree_dataclass
class RectifiedFlow(GaussianProcess):
    """Straight path alpha = 1 - t, sigma = t (Liu et al., arXiv 2209.03003; flow matching, 2210.02747).

    Samplers walk from t = 1 to t = 0; networks are trained on [t_min, t_max], where the log-SNR is
    finite (and log-SNR grids take their inner points from there).
    """

    t_min: float = 1e-3
    t_max: float = 0.999
    default_grid = "uniform"

    def __post_init__(self):
        check_range(self, t_min=(self.t_min, 0.0, self.t_max), t_max=(self.t_max, self.t_min, 1.0))

    @property
    def sampling_range(self):
        return 1.0, 0.0

    def log_alpha(self, t):
        xp, t = as_time(t, self.t_min)
        with np.errstate(divide="ignore"):
            return xp.log1p(-t)

    def alpha(self, t):
        _, t = as_time(t, self.t_min)
        return 1.0 - t

    def sigma(self, t):
        _, t = as_time(t, self.t_min)
        return t

    def dalpha(self, t):
        xp, t = as_time(t, self.t_min)
        return -xp.ones_like(t)

    def dsigma(self, t):
        xp, t = as_time(t, self.t_min)
        return xp.ones_like(t)

    def t_of_lam(self, lam):
        """Inverse of `lam`: `1 / (1 + exp(lam))`."""
        xp, lam = as_time(lam)
        return xp.exp(-xp.logaddexp(0.0, lam))
