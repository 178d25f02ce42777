"""Schedules of bridges: which linear SDE is pinned at both ends.

VP, VE (DDBM), Brownian (Bridge-TTS's constant g), gmax (Bridge-TTS), I2SB's symmetric table, and
`HTransform` of any Gaussian process. See `bridge` for what they share.
"""

import functools
from typing import Any

import jax
import numpy as np

from diffusion_jax.numerics import (
    as_time,
    check_times,
    is_concrete,
    namespace,
    pytree_dataclass,
    static,
)
from diffusion_jax.processes.bridge import BridgeProcess, SDEBridge
from diffusion_jax.processes.gaussian import GaussianProcess
from diffusion_jax.registry import register


class _LinearRate(SDEBridge):
    """B(t), the integral of a rate that is linear in t, shared by VP and gmax.

    A subclass gives `_rates()`: the rate at t = 0, and what it grows by until t = 1.
    """

    def _integral(self, t):
        low, growth = self._rates()
        xp, t = as_time(t, low, growth)
        return xp, low * t + 0.5 * growth * t * t

    def _remaining(self, t):
        """B(1) - B(t), without cancellation near t = 1."""
        low, growth = self._rates()
        _xp, t = as_time(t, low, growth)
        return (1.0 - t) * (low + 0.5 * growth * (1.0 + t))

    def _t_of_integral(self, integral):
        low, growth = self._rates()
        xp, integral = as_time(integral, low, growth)
        return 2.0 * integral / (low + xp.sqrt(low**2 + 2.0 * growth * integral))

    def rho2_T(self, t):
        return self.rho2(1.0)

    def diffusion_squared(self, t):
        """g(t)^2, the rate."""
        low, growth = self._rates()
        _, t = as_time(t, low, growth)
        return low + growth * t


@register("process", "vp_bridge", family="bridge", paper="2309.16948")
@pytree_dataclass
class VPBridge(_LinearRate):
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

    def _rates(self):
        return self.beta_min, self.beta_d

    def alpha(self, t):
        xp, integral = self._integral(t)
        return xp.exp(-0.5 * integral)

    def rho2(self, t):
        xp, integral = self._integral(t)
        return xp.expm1(integral)

    def rho_bar2(self, t):
        xp, integral = self._integral(t)
        return xp.exp(integral) * xp.expm1(self._remaining(t))

    def drift(self, t):
        return -0.5 * self.diffusion_squared(t)

    def t_of_rho2(self, rho2):
        """Inverse of `rho2`."""
        xp, rho2 = as_time(rho2, self.beta_d, self.beta_min)
        return self._t_of_integral(xp.log1p(rho2))


@register("process", "gmax_bridge", family="bridge", paper="2312.03491")
@pytree_dataclass
class GmaxBridge(_LinearRate):
    """Bridge-TTS's gmax schedule: alpha = 1, g^2 = beta_0 + (beta_1 - beta_0) t (arXiv 2312.03491).

    rho^2 = beta_0 t + (beta_1 - beta_0) t^2 / 2: most noise near the source. The paper's constant g is
    `BrownianBridge(scale=g)`, its VP `VPBridge(beta_d=beta_1 - beta_0, beta_min=beta_0)` with 0.01 and 20.
    """

    beta_0: float = 0.01
    beta_1: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0 - 1e-5

    def __post_init__(self):
        rates = self.beta_0, self.beta_1
        if is_concrete(*rates) and not (min(rates) >= 0 and max(rates) > 0):
            raise ValueError(
                f"GmaxBridge: beta_0 = {self.beta_0} and beta_1 = {self.beta_1} must not be negative, "
                "nor both zero"
            )
        check_times(self)

    def _rates(self):
        return self.beta_0, self.beta_1 - self.beta_0

    def rho2(self, t):
        return self._integral(t)[1]

    def rho_bar2(self, t):
        return self._remaining(t)

    def t_of_rho2(self, rho2):
        """Inverse of `rho2`."""
        return self._t_of_integral(rho2)


@register("process", "ve_bridge", family="bridge", paper="2309.16948")
@pytree_dataclass
class VEBridge(SDEBridge):
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
class BrownianBridge(SDEBridge):
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
class I2SB(SDEBridge):
    """Image-to-image Schrodinger bridge: alpha = 1, symmetric discrete schedule (arXiv 2302.05872).

    The schedule is a table of `intervals` entries looked up at `round((intervals - 1) t)`. By default it is normalised by rho^2 + rho_bar^2 at each entry as in the
    authors' code. `rho_T_excludes_overlap=True` divides by the last rho^2 instead, as DBIM's code
    does: then a + b = 1 + beta_i / rho_T^2 (an off-by-one of up to 1.3e-3, kept for parity).

    Args:
      beta_min, beta_max: the square roots of `beta / intervals` are linear in the index.
      intervals: table length, even.
      ot_ode: no noise, c = 0: the optimal-transport ODE between the ends, in training and sampling.
    """

    beta_min: float = static(0.1)
    beta_max: float = static(1.0)
    intervals: int = static(1000)
    rho_T_excludes_overlap: bool = static(False)
    ot_ode: bool = static(False)
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

    def c(self, t):
        """Standard deviation of the bridge; 0 with `ot_ode`."""
        c = super().c(t)
        return 0.0 * c if self.ot_ode else c

    def slopes(self, t):
        slopes = super().slopes(t)
        return {**slopes, "cc": 0.0 * slopes["cc"]} if self.ot_ode else slopes

    def diffusion_squared(self, t):
        """g(t)^2 per unit of t: beta of the entry times the entries in a unit."""
        return (self.intervals - 1) * self._look_up(0, t)

    def t_of_rho2(self, rho2):
        """The time of the entry nearest to `rho2` (host only)."""
        table = _i2sb_tables(self.beta_min, self.beta_max, self.intervals)[1]
        index = np.abs(np.asarray(rho2)[..., None] - table).argmin(axis=-1)
        return index / (self.intervals - 1)


# Gauss-Legendre on [0, 1]; 16 points integrate the rates of all schedules here to rounding
_NODES, _WEIGHTS = (
    0.5 * (v + shift) for v, shift in zip(np.polynomial.legendre.leggauss(16), (1, 0))
)


@register("process", "h_transform", family="bridge", paper="2309.16948")
@pytree_dataclass
class HTransform(SDEBridge):
    """The h-transform of any linear SDE: `base` pinned at both ends (arXiv 2309.16948).

    Args:
      base: a Gaussian process with a finite log-SNR at t = 1 (VP, sub-VP, VE, EDM, ...).
    Raises:
      ValueError: not a Gaussian process, or one that has no signal left at t = 1.
    """

    base: Any

    def __post_init__(self):
        base = self.base
        if isinstance(base, BridgeProcess):
            raise ValueError(f"{type(base).__name__} is a bridge already")
        if isinstance(base, GaussianProcess) and is_concrete(*jax.tree.leaves(base)):
            with np.errstate(divide="ignore"):
                end = base.log_snr(1.0)
            if not np.isfinite(end):
                raise ValueError(
                    f"the h-transform needs a finite log-SNR at t = 1; {type(base).__name__} has {end}"
                )
        elif isinstance(base, str | int | float | dict | type(None)):
            raise ValueError(f"base must be a Gaussian process, got {base!r}")

    @property
    def t_min(self):
        return self.base.t_min

    @property
    def t_max(self):
        return 1.0

    @property
    def default_grid(self):
        return "karras" if self.base.default_grid == "karras" else "uniform"

    def alpha(self, t):
        return self.base.alpha(t)

    def drift(self, t):
        return self.base.drift(t)

    def diffusion_squared(self, t):
        """g(t)^2 of the base SDE."""
        return self.base.diffusion_squared(t)

    def _variance(self, t):
        """sigma^2 / alpha^2 of the base, which need not vanish at t = 0."""
        ratio = self.base.sigma(t) / self.base.alpha(t)
        return ratio * ratio

    def _grown(self, low, high):
        """The integral of g^2 / alpha^2 from `low` to `high`: quadrature of a positive rate cannot cancel."""
        xp = namespace(low, high)
        span = xp.asarray(high - low)
        nodes = xp.asarray(low)[..., None] + span[..., None] * xp.asarray(_NODES, span.dtype)
        rate = self.base.diffusion_squared(nodes) / self.base.alpha(nodes) ** 2
        return span * (rate * xp.asarray(_WEIGHTS, span.dtype)).sum(axis=-1)

    def rho2(self, t):
        xp, t = as_time(t, *jax.tree.leaves(self.base))
        start = xp.zeros_like(t)
        direct = self._variance(t) - self._variance(start)
        return xp.where(t < 0.5, self._grown(start, xp.minimum(t, 0.5)), direct)

    def rho_bar2(self, t):
        xp, t = as_time(t, *jax.tree.leaves(self.base))
        end = xp.ones_like(t)
        direct = self._variance(end) - self._variance(t)
        return xp.where(t > 0.5, self._grown(xp.maximum(t, 0.5), end), direct)

    def rho2_T(self, t):
        return self.rho2(1.0)

    def t_of_rho2(self, rho2):
        """Inverse of `rho2`."""
        xp, rho2 = as_time(rho2, *jax.tree.leaves(self.base))
        return self.base.t_of_lam(-0.5 * xp.log(rho2 + self._variance(0.0)))
