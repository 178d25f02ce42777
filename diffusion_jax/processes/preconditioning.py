"""Preconditioning: `x0_hat = c_skip x + c_out F(c_in x, c_noise)` with unit-variance input and target of F.

EDM (arXiv 2206.00364, table 1), written for any alpha; DDBM (arXiv 2309.16948, section 4.2) for bridges.
"""

from typing import Any, NamedTuple

from diffusion_jax.numerics import namespace


class Preconditioning(NamedTuple):
    """Coefficients at one time: scalars, or one value an example."""

    c_skip: Any
    c_out: Any
    c_in: Any
    c_noise: Any


def edm(point, sigma_data=0.5):
    """EDM's coefficients at `process.point(t)` of a Gaussian process.

    With alpha = 1 these are the paper's; for other schedules the same network is used on x / alpha.
    c_noise = log(sigma / alpha) / 4.
    """
    alpha, sigma = point["alpha"], point["sigma"]
    xp = namespace(alpha, sigma)
    total = sigma**2 + alpha**2 * sigma_data**2
    return Preconditioning(
        c_skip=alpha * sigma_data**2 / total,
        c_out=sigma * sigma_data / xp.sqrt(total),
        c_in=1.0 / xp.sqrt(total),
        c_noise=0.25 * xp.log(sigma / alpha),
    )


def ddbm(point, sigma_data=0.5, sigma_source=0.5, covariance=0.0, clock_scale=1.0):
    """DDBM's coefficients at `process.point(t)` of a bridge.

    Args:
      sigma_data, sigma_source: standard deviations of x0 and x1.
      covariance: Cov(x0, x1) per dimension.
      clock_scale: `process.clock_scale`; c_noise = 250 log(clock_scale t).
    """
    a, b, c = point["a"], point["b"], point["c"]
    xp = namespace(a, b, c)
    v0, v1 = sigma_data**2, sigma_source**2
    c_in = 1.0 / xp.sqrt(a**2 * v1 + b**2 * v0 + 2.0 * a * b * covariance + c**2)
    return Preconditioning(
        c_skip=(b * v0 + a * covariance) * c_in**2,
        c_out=xp.sqrt(a**2 * (v0 * v1 - covariance**2) + v0 * c**2) * c_in,
        c_in=c_in,
        c_noise=250.0 * xp.log(clock_scale * point["t"]),
    )
