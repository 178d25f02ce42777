"""Diffusion bridges `x_t = a(t) x1 + b(t) x0 + c(t) eps` between data x0 (t = 0) and a source x1 (t = 1).

A bridge is the h-transform of a linear SDE with `x_t = alpha x0 + alpha rho eps` (arXiv 2309.16948;
notation of DBIM, arXiv 2405.15885). With rho_bar^2 = rho_T^2 - rho^2 and alpha_bar = alpha / alpha_T:
  (1) a = alpha_bar rho^2 / rho_T^2, b = alpha rho_bar^2 / rho_T^2, c = alpha rho rho_bar / rho_T
  (2) lam = log(b / c) rises from -inf at the source to +inf at the data
  (3) score of x_t given x1: -(x - a x1 - b x0_hat) / c^2
  (4) h = grad log q(x1 | x_t) = -(x - alpha_bar x1) / (alpha^2 rho_bar^2)
  (5) reverse SDE drift f x - g^2 (score - h); probability-flow ODE f x - g^2 (score / 2 - h)
A schedule gives alpha, rho^2, rho_bar^2 (never as a difference of the first two), f and g^2.
"""

import functools

import numpy as np

from diffusion_jax.numerics import (
    as_time,
    check_times,
    expand,
    is_concrete,
    namespace,
    pytree_dataclass,
    static,
)
from diffusion_jax.registry import register


class BridgeProcess:
    """What the schedules below share.

    Attributes:
      t_min, t_max: interval of training; c vanishes at both 0 and 1.
      clock_scale: the paper's own clock is `clock_scale * t` (DDBM's VE runs in sigma).
      default_grid: name of the time grid that suits the process.
    """

    t_min: float
    t_max: float
    clock_scale = 1.0
    default_grid = "uniform"

    @property
    def sampling_range(self):
        return self.t_max, self.t_min

    def alpha(self, t):
        """Signal coefficient of the base diffusion, the shape of `t`."""
        xp, t = as_time(t, self.t_min)
        return xp.ones_like(t)

    def alpha_T(self):
        """alpha at t = 1."""
        return self.alpha(1.0)

    def rho2_T(self, t):
        """`rho^2 + rho_bar^2`, constant in t for a bridge of an SDE."""
        return self.rho2(t) + self.rho_bar2(t)

    def drift(self, t):
        """f(t) of the base SDE, per unit of t."""
        xp, t = as_time(t, self.t_min)
        return xp.zeros_like(t)

    def a(self, t):
        """Coefficient of the source x1."""
        return self.alpha(t) / self.alpha_T() * self.rho2(t) / self.rho2_T(t)

    def b(self, t):
        """Coefficient of the data x0."""
        return self.alpha(t) * self.rho_bar2(t) / self.rho2_T(t)

    def c(self, t):
        """Standard deviation of the bridge."""
        product = self.rho2(t) * self.rho_bar2(t) / self.rho2_T(t)
        return self.alpha(t) * namespace(product).sqrt(product)

    def lam(self, t):
        """`log(b / c)`, the bridge's half log signal-to-noise ratio."""
        with np.errstate(divide="ignore"):
            ratio = self.rho_bar2(t) / (self.rho2(t) * self.rho2_T(t))
            return 0.5 * namespace(ratio).log(ratio)

    def noise_level(self, t):
        """The clock in which Karras grids are laid out: the paper's own time, up to a factor."""
        return as_time(t)[1]

    def t_of_noise_level(self, u):
        """Inverse of `noise_level`."""
        return as_time(u)[1]

    def point(self, t):
        """The schedule at `t` as a dictionary `t, a, b, c`."""
        _, t = as_time(t)
        return {"t": t, "a": self.a(t), "b": self.b(t), "c": self.c(t)}

    def corrupt(self, x0, x1, eps, t):
        """A draw of `q(x_t | x0, x1)`; `x0, x1, eps` `[B, ...]`, `t` scalar or `[B]`."""
        a, b, c = (expand(f(t), x0) for f in (self.a, self.b, self.c))
        return a * x1 + b * x0 + c * eps

    def t_of_lam(self, lam):
        """Inverse of `lam` through rho^2 = rho_T^2 / (1 + rho_T^2 exp(2 lam))."""
        total = self.rho2_T(0.0)
        xp, lam = as_time(lam, total)
        # exp(-logaddexp) is the ratio without overflow
        return self.t_of_rho2(total * xp.exp(-xp.logaddexp(0.0, 2.0 * lam + xp.log(total))))


@register("process", "vp_bridge", family="bridge", paper="2309.16948")
@pytree_dataclass
class VPBridge(BridgeProcess):
    """VP bridge of DDBM and DBIM: B(t) = beta_min t + beta_d t^2 / 2 (arXiv 2309.16948, 2405.15885).

    beta_d is beta_max - beta_min. alpha = exp(-B/2), rho^2 = exp(B) - 1.
    """

    beta_d: float = 2.0
    beta_min: float = 0.1
    t_min: float = 1e-4
    t_max: float = 1.0

    def __post_init__(self):
        rates = self.beta_d, self.beta_min
        if is_concrete(*rates) and (min(rates) < 0 or max(rates) == 0):
            raise ValueError(
                f"VPBridge: beta_d = {self.beta_d} and beta_min = {self.beta_min} must not be negative, "
                "nor both zero"
            )
        check_times(self)

    def _integral(self, t):
        xp, t = as_time(t, self.beta_d, self.beta_min)
        return xp, self.beta_min * t + 0.5 * self.beta_d * t * t

    def _remaining(self, t):
        """B(1) - B(t), without cancellation near t = 1."""
        _xp, t = as_time(t, self.beta_d, self.beta_min)
        return (1.0 - t) * (self.beta_min + 0.5 * self.beta_d * (1.0 + t))

    def alpha(self, t):
        xp, integral = self._integral(t)
        return xp.exp(-0.5 * integral)

    def rho2(self, t):
        xp, integral = self._integral(t)
        return xp.expm1(integral)

    def rho_bar2(self, t):
        xp, integral = self._integral(t)
        return xp.exp(integral) * xp.expm1(self._remaining(t))

    def rho2_T(self, t):
        return self.rho2(1.0)

    def drift(self, t):
        return -0.5 * self.diffusion_squared(t)

    def diffusion_squared(self, t):
        """g(t)^2 = beta_min + beta_d t."""
        _, t = as_time(t, self.beta_d, self.beta_min)
        return self.beta_min + self.beta_d * t

    def t_of_rho2(self, rho2):
        """Inverse of `rho2`."""
        xp, rho2 = as_time(rho2, self.beta_d, self.beta_min)
        integral = xp.log1p(rho2)
        root = xp.sqrt(self.beta_min**2 + 2.0 * self.beta_d * integral)
        return 2.0 * integral / (self.beta_min + root)


@register("process", "ve_bridge", family="bridge", paper="2309.16948")
@pytree_dataclass
class VEBridge(BridgeProcess):
    """VE bridge of DDBM: alpha = 1, rho = sigma_max t (arXiv 2309.16948).

    The paper's clock is sigma = sigma_max t, in [0.002, 80].
    """

    sigma_max: float = 80.0
    sigma_min: float = 0.002
    t_max: float = 1.0
    default_grid = "karras"

    def __post_init__(self):
        if not is_concrete(self.sigma_min, self.sigma_max):
            return
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"VEBridge: sigma_min = {self.sigma_min} must lie between 0 and sigma_max = {self.sigma_max}"
            )
        check_times(self)

    @property
    def t_min(self):
        return self.sigma_min / self.sigma_max

    @property
    def clock_scale(self):
        return self.sigma_max

    def rho2(self, t):
        _, t = as_time(t, self.sigma_max)
        return (self.sigma_max * t) ** 2

    def rho_bar2(self, t):
        _, t = as_time(t, self.sigma_max)
        return self.sigma_max**2 * (1.0 - t) * (1.0 + t)

    def rho2_T(self, t):
        return self.rho2(1.0)

    def diffusion_squared(self, t):
        """d rho^2 / dt = 2 sigma_max^2 t."""
        _, t = as_time(t, self.sigma_max)
        return 2.0 * self.sigma_max**2 * t

    def t_of_rho2(self, rho2):
        """Inverse of `rho2`."""
        xp, rho2 = as_time(rho2, self.sigma_max)
        return xp.sqrt(rho2) / self.sigma_max


@register("process", "brownian_bridge", family="bridge")
@pytree_dataclass
class BrownianBridge(BridgeProcess):
    """Brownian bridge of variance `scale^2 t (1 - t)`: a = t, b = 1 - t."""

    scale: float = 1.0
    t_min: float = 1e-4
    t_max: float = 1.0

    def __post_init__(self):
        if is_concrete(self.scale) and self.scale <= 0:
            raise ValueError(f"BrownianBridge: scale = {self.scale} must be positive")
        check_times(self)

    def rho2(self, t):
        _, t = as_time(t, self.scale)
        return self.scale**2 * t

    def rho_bar2(self, t):
        _, t = as_time(t, self.scale)
        return self.scale**2 * (1.0 - t)

    def rho2_T(self, t):
        return self.rho2(1.0)

    def diffusion_squared(self, t):
        """g(t)^2 = scale^2."""
        xp, t = as_time(t, self.scale)
        return self.scale**2 * xp.ones_like(t)

    def t_of_rho2(self, rho2):
        """Inverse of `rho2`."""
        _, rho2 = as_time(rho2, self.scale)
        return rho2 / self.scale**2


@functools.lru_cache(maxsize=16)
def _i2sb_tables(beta_min, beta_max, intervals):
    betas = (
        np.linspace((beta_min / intervals) ** 0.5, (beta_max / intervals) ** 0.5, intervals) ** 2
    )
    betas = np.concatenate([betas[: intervals // 2], betas[: intervals // 2][::-1]])
    return betas, np.cumsum(betas), np.cumsum(betas[::-1])[::-1].copy()


@register("process", "i2sb", family="bridge", paper="2302.05872")
@pytree_dataclass
class I2SB(BridgeProcess):
    """Image-to-image Schrodinger bridge: alpha = 1, symmetric discrete schedule (arXiv 2302.05872).

    The schedule is a table of `intervals` entries looked up at `round((intervals - 1) t)`. By default it is normalised by rho^2 + rho_bar^2 at each entry as in the
    authors' code. `rho_T_excludes_overlap=True` divides by the last rho^2 instead, as DBIM's code
    does: then a + b = 1 + beta_i / rho_T^2 (an off-by-one of up to 1.3e-3, kept for parity).

    Args:
      beta_min, beta_max: the square roots of `beta / intervals` are linear in the index.
      intervals: table length, even.
    """

    beta_min: float = static(0.1)
    beta_max: float = static(1.0)
    intervals: int = static(1000)
    rho_T_excludes_overlap: bool = static(False)
    t_min: float = 1e-4
    t_max: float = 1.0

    def __post_init__(self):
        if self.intervals < 2 or self.intervals % 2:
            raise ValueError(f"I2SB: intervals = {self.intervals} must be even and at least 2")
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(
                f"I2SB: beta_min = {self.beta_min} must lie between 0 and beta_max = {self.beta_max}"
            )
        check_times(self)

    def _look_up(self, which, t):
        xp, t = as_time(t)
        table = _i2sb_tables(self.beta_min, self.beta_max, self.intervals)[which]
        index = xp.round((self.intervals - 1) * t).astype(np.int32)
        return xp.asarray(table, dtype=t.dtype)[index]

    def rho2(self, t):
        return self._look_up(1, t)

    def rho_bar2(self, t):
        return self._look_up(2, t)

    def rho2_T(self, t):
        if self.rho_T_excludes_overlap:
            return self.rho2(1.0)
        return self.rho2(t) + self.rho_bar2(t)

    def diffusion_squared(self, t):
        """g(t)^2 per unit of t: beta of the entry times the entries in a unit."""
        return (self.intervals - 1) * self._look_up(0, t)

    def t_of_rho2(self, rho2):
        """The time of the entry nearest to `rho2` (host only)."""
        table = _i2sb_tables(self.beta_min, self.beta_max, self.intervals)[1]
        index = np.abs(np.asarray(rho2)[..., None] - table).argmin(axis=-1)
        return index / (self.intervals - 1)
