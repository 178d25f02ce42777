"""Masking schedules: the probability alpha(t) that a token is still clean.

Schedules are written by their mask rate 1 - alpha, which is what must be accurate near t = 0.
"""

import jax
import numpy as np

from diffusion_jax.numerics import as_time, is_concrete, namespace, pytree_dataclass
from diffusion_jax.registry import register


class MaskSchedule:
    """What the schedules share; a subclass gives `_rate(xp, t)`, `_rate_slope` and `_t_of_rate`.

    The base mask rate m(t) runs from 0 to 1; `eps_start` and `eps_end` pull it away from the ends:
    `mask_rate = eps_start + (1 - eps_start - eps_end) m(t)`.
    """

    eps_start: float
    eps_end: float

    def __post_init__(self):
        for name in ("eps_start", "eps_end"):
            value = getattr(self, name)
            if is_concrete(value) and not 0.0 <= value < 0.5:
                raise ValueError(f"{type(self).__name__}: {name} = {value} must be in [0, 0.5)")

    def _span(self):
        return 1.0 - self.eps_start - self.eps_end

    def mask_rate(self, t):
        """`1 - alpha(t)`, the shape of `t`."""
        xp, t = as_time(t, *jax.tree.leaves(self))
        return self.eps_start + self._span() * self._rate(xp, t)

    def mask_rate_slope(self, t):
        """`-d alpha / dt`."""
        xp, t = as_time(t, *jax.tree.leaves(self))
        return self._span() * self._rate_slope(xp, t)

    def t_of_mask_rate(self, rate):
        """Inverse of `mask_rate`, clipped to [0, 1]."""
        xp, rate = as_time(rate, *jax.tree.leaves(self))
        base = xp.clip((rate - self.eps_start) / self._span(), 0.0, 1.0)
        return xp.clip(self._t_of_rate(xp, base), 0.0, 1.0)

    def alpha(self, t):
        """Probability that a token is still clean."""
        return 1.0 - self.mask_rate(t)

    def sigma_bar(self, t):
        """Total noise `-log alpha` of SEDD, RADD and MDLM."""
        rate = self.mask_rate(t)
        with np.errstate(divide="ignore"):
            return -namespace(rate).log1p(-rate)

    def weight(self, t):
        """`-alpha' / (1 - alpha)`, the weight of the continuous-time bound."""
        with np.errstate(divide="ignore"):
            return self.mask_rate_slope(t) / self.mask_rate(t)


@register("schedule", "linear", family="discrete", paper="2406.07524")
@pytree_dataclass
class LinearSchedule(MaskSchedule):
    """alpha = 1 - t: RADD's lambda, MDLM's log-linear noise (eps_end = 1e-3), MD4's linear (both 1e-4)."""

    eps_start: float = 0.0
    eps_end: float = 0.0

    def _rate(self, xp, t):
        return t

    def _rate_slope(self, xp, t):
        return xp.ones_like(t)

    def _t_of_rate(self, xp, rate):
        return rate


@register("schedule", "cosine", family="discrete", paper="2406.04329")
@pytree_dataclass
class CosineSchedule(MaskSchedule):
    """alpha = 1 - cos(pi/2 (1 - t)) (MaskGIT, MD4)."""

    eps_start: float = 0.0
    eps_end: float = 0.0

    def _rate(self, xp, t):
        return xp.sin(0.5 * np.pi * t)

    def _rate_slope(self, xp, t):
        return 0.5 * np.pi * xp.cos(0.5 * np.pi * t)

    def _t_of_rate(self, xp, rate):
        return 2.0 / np.pi * xp.arcsin(rate)


@register("schedule", "cosine_alpha", family="discrete", paper="2406.07524")
@pytree_dataclass
class CosineAlphaSchedule(MaskSchedule):
    """alpha = cos(pi/2 t): MDLM's cosine noise (eps_end = 1e-3)."""

    eps_start: float = 0.0
    eps_end: float = 0.0

    def _rate(self, xp, t):
        return 2.0 * xp.sin(0.25 * np.pi * t) ** 2

    def _rate_slope(self, xp, t):
        return 0.5 * np.pi * xp.sin(0.5 * np.pi * t)

    def _t_of_rate(self, xp, rate):
        return 4.0 / np.pi * xp.arcsin(xp.sqrt(0.5 * rate))


@register("schedule", "polynomial", family="discrete", paper="2406.04329")
@pytree_dataclass
class PolynomialSchedule(MaskSchedule):
    """alpha = 1 - t^power (MD4)."""

    power: float = 3.0
    eps_start: float = 0.0
    eps_end: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if is_concrete(self.power) and self.power <= 0:
            raise ValueError(f"PolynomialSchedule: power = {self.power} must be positive")

    def _rate(self, xp, t):
        return t**self.power

    def _rate_slope(self, xp, t):
        return self.power * t ** (self.power - 1.0)

    def _t_of_rate(self, xp, rate):
        return rate ** (1.0 / self.power)


@register("schedule", "geometric", family="discrete", paper="2310.16834")
@pytree_dataclass
class GeometricSchedule(MaskSchedule):
    """alpha = exp(-sigma_min^(1-t) sigma_max^t) (SEDD). The ends are as far out as sigma says."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    eps_start = 0.0
    eps_end = 0.0

    def __post_init__(self):
        if is_concrete(self.sigma_min, self.sigma_max) and not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"GeometricSchedule: sigma_min = {self.sigma_min} must lie between 0 and "
                f"sigma_max = {self.sigma_max}"
            )

    def _total(self, xp, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sigma_bar(self, t):
        """`-log alpha`, without the detour over a mask rate that rounds to 1."""
        return self._total(*as_time(t, *jax.tree.leaves(self)))

    def _rate(self, xp, t):
        return -xp.expm1(-self._total(xp, t))

    def _rate_slope(self, xp, t):
        total = self._total(xp, t)
        return total * xp.log(self.sigma_max / self.sigma_min) * xp.exp(-total)

    def _t_of_rate(self, xp, rate):
        with np.errstate(divide="ignore"):
            total = -xp.log1p(-rate)
            return xp.log(total / self.sigma_min) / xp.log(self.sigma_max / self.sigma_min)
