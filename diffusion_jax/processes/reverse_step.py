"""The reverse step of a Gaussian process and its variances, fixed or interpolated by a network.

From t to s < t, with r = 1 - exp(2 (lam_t - lam_s)):
  (1) q(x_s | x_t, x0) = N(e^(lam_t - lam_s) sigma_s / sigma_t x_t + alpha_s r x0, sigma_s^2 r)
  (2) q(x_t | x_s) has variance sigma_t^2 r, the chain's beta: the other end of the range
  (3) a learned log variance is f log(sigma_t^2 r) + (1 - f) log(sigma_s^2 r), f = (v + 1) / 2
                                                       (Nichol and Dhariwal, arXiv 2102.09672, eq. 15)
"""

from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.numerics import namespace


class ReverseStep(NamedTuple):
    """Weights of x_t and x0 in the mean of (1), and the logs of the variances of (1) and (2).

    `log_small` is -inf where sigma_s is 0.
    """

    x: Any
    x0: Any
    log_small: Any
    log_large: Any


def reverse_step(process, t, s) -> ReverseStep:
    """The step of a Gaussian process from t to s < t, both scalars or `[B]`, NumPy or JAX."""
    here, there = process.lam(t), process.lam(s)
    xp = namespace(here, there)
    r = -xp.expm1(2.0 * (here - there))
    sigma, next_sigma = process.sigma(t), process.sigma(s)
    with np.errstate(divide="ignore"):
        log_small = 2.0 * xp.log(next_sigma) + xp.log(r)
    return ReverseStep(
        x=xp.exp(here - there) * next_sigma / sigma,
        x0=process.alpha(s) * r,
        log_small=log_small,
        log_large=2.0 * xp.log(sigma) + xp.log(r),
    )


def interpolated_log_variance(log_small, log_large, v):
    """Equation (3): the arguments broadcast."""
    fraction = 0.5 * (v + 1.0)
    return fraction * log_large + (1.0 - fraction) * log_small
