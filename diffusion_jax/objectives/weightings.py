"""Weights of the squared x0 error, `(process, t) -> [B]`, for uniform t unless marked as integrals.

Any loss in another prediction is one of these: |eps - eps_hat|^2 = snr |x0 - x0_hat|^2,
|v - v_hat|^2 = ((alpha^2 + sigma^2) / sigma)^2 |x0 - x0_hat|^2 (snr + 1 for a variance-preserving
schedule), |velocity error|^2 = (alpha' - sigma' alpha / sigma)^2 |x0 - x0_hat|^2.
"Integrals" are defined as an expectation over uniform t and are multiplied by 1 / p(t) for other times.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.registry import entry, register


def snr(process, t):
    """`alpha^2 / sigma^2`."""
    return jnp.exp(process.log_snr(t))


@register("weighting", "x0", integral=False)
def x0(process, t):
    """1: the plain x0 error."""
    return jnp.ones_like(t)


@register("weighting", "eps", integral=False, paper="2006.11239")
def eps(process, t):
    """snr: the plain eps error (DDPM's simple loss, arXiv 2006.11239)."""
    return snr(process, t)


@register("weighting", "v", integral=False, paper="2202.00512")
def v(process, t):
    """The plain v error (arXiv 2202.00512)."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return ((alpha**2 + sigma**2) / sigma) ** 2


@register("weighting", "velocity", integral=False, paper="2210.02747")
def velocity(process, t):
    """The plain velocity error (flow matching, arXiv 2210.02747)."""
    p = process.point(t)
    return (p["dalpha"] - p["dsigma"] * p["alpha"] / p["sigma"]) ** 2


@register("weighting", "edm", integral=False, paper="2206.00364")
def edm(process, t, sigma_data=0.5):
    """`(u^2 + sd^2) / (u sd)^2`, u = sigma / alpha (EDM, arXiv 2206.00364)."""
    u2 = 1.0 / snr(process, t)
    return (u2 + sigma_data**2) / (u2 * sigma_data**2)


@register("weighting", "min_snr", integral=False, paper="2303.09556")
def min_snr(process, t, gamma=5.0):
    """`min(snr, gamma)` (arXiv 2303.09556)."""
    return jnp.minimum(snr(process, t), gamma)


def _log_snr_rate(process, t):
    """`-d log_snr / dt`, positive; f and g give it: g^2 / sigma^2."""
    return process.diffusion_squared(t) / process.sigma(t) ** 2


@register("weighting", "sigmoid", integral=True, paper="2303.00848")
def sigmoid(process, t, bias=2.0):
    """`1/2 (-d log_snr/dt) sigmoid(bias - log_snr) snr` (Kingma and Gao, arXiv 2303.00848)."""
    gate = jax.nn.sigmoid(bias - process.log_snr(t))
    return 0.5 * _log_snr_rate(process, t) * gate * snr(process, t)


@register("weighting", "elbo", integral=True, paper="2107.00630")
def elbo(process, t):
    """`-1/2 d snr / dt`: the continuous-time diffusion loss in nats (VDM, arXiv 2107.00630, eq. 17)."""
    return 0.5 * _log_snr_rate(process, t) * snr(process, t)


class Weighting(NamedTuple):
    """A weight `(process, t) -> [B]`, and whether it is an integral over t."""

    weight: Callable
    integral: bool = False


def build_weighting(weighting, **options) -> Weighting:
    """A `Weighting` from a name, a `Weighting`, or a callable `(process, t) -> [B]` (not an integral).

    Raises:
      UnknownName: no such name.
    """
    if isinstance(weighting, str):
        found = entry("weighting", weighting)
        weighting = Weighting(found.build, found.meta["integral"])
    elif not isinstance(weighting, Weighting):
        weighting = Weighting(weighting)
    return weighting._replace(weight=functools.partial(weighting.weight, **options))
