"""Preconditioning: `x0_hat = c_skip x + c_out F(c_in x, c_noise)` with unit-variance input and target of F.

EDM (arXiv 2206.00364, table 1), written for any alpha; DDBM (arXiv 2309.16948, section 4.2) for bridges.
Networks without preconditioning are told the time in units of their own too: `time_input`.
"""

from typing import Any, NamedTuple

from diffusion_jax.numerics import as_time, namespace
from diffusion_jax.registry import check_choice

TIME_INPUTS = ("time", "index", "step")
_SNAP = 1e-3  # of an index: float32 times of a list of 1000 are off by 1e-4 at most


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


def time_input(kind, process, t):
    """What a network is told in place of t.

    "time": t. "index": the k in 0..N-1 of a list of noise levels, `N t - 1` (guided-diffusion's networks
    and DiT); "step": the n = k + 1 in 1..N, 0 being clean data (U-ViT). Both are whole at the levels of the
    list, whatever the rounding of t, and not below 0.

    Args:
      kind: one of `TIME_INPUTS`.
      process: the process that t belongs to.
      t: scalar or [B].
    Raises:
      ValueError: an unknown kind, or an index of a process that is no list of levels.
    """
    check_choice("time_input", kind, TIME_INPUTS)
    if kind == "time":
        return t
    xp, t = as_time(t)
    count = getattr(process, "num_train_steps", None)
    if count is None:
        raise ValueError(
            f"time_input {kind!r} needs a process that is a list of noise levels (discrete_vp), got"
            f" {type(process).__name__}"
        )
    k = count * t - (kind == "index")
    whole = xp.round(k)
    return xp.maximum(xp.where(abs(k - whole) < _SNAP, whole, k), 0.0)
