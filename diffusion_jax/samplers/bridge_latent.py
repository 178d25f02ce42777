"""Booting noise as a latent code: data encoded to it, and paths between codes (DBIM, arXiv 2405.15885).

Given the source, DBIM with eta = 0 is a map from its booting noise to the data. `dbim_encode` is the
inverse, a table that climbs the decoder's grid from t_min to where the boot landed. Between neighbours
t < s of that grid, with k = c_t / c_s, the decoder's step is
  (1) x_t = k x_s + (b_t - k b_s) D(x_s, s) + (a_t - k a_s) x1
and the encoder climbs it by
  (2) the same step upwards: x_s = x_t / k + (b_s - b_t / k) D(x_t, t) + (a_s - a_t / k) x1, one call, first
      order in the step; or
  (3) solving (1) for x_s, so that decoding gives back the data themselves.
The last call, at the source, undoes the boot:
  (4) z = (x - a x1 - b D(x1, t = 1)) / c.

How (3) is solved. For the posterior mean D the matrix b_s dD/dx_s is symmetric with eigenvalues between 0
and, for one Gaussian mode, 1. Then those of (1) lie between k and k e^h, h = lam_t - lam_s the step of the
log-SNR. Chebyshev's iteration for such an interval reduces the error by tanh(h / 4) a call, and its weights
are known beforehand: a table. (The plain fixed point of (1) changes the error by e^h - 1 a call: it needs
h < log 2, and the default grid's last step has h = 3.3 at 20 calls.)

The paper tells of encoding and interpolation; its released code has neither.
"""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import batch_size, expand
from diffusion_jax.processes.bridge_steps import ode_step
from diffusion_jax.registry import check_choice
from diffusion_jax.samplers.bridge_steps import (
    BOOT_GAP,
    check_bridge,
    check_calls,
    check_entries,
    check_noise,
    first_order,
)
from diffusion_jax.samplers.linear import (
    SRC,
    A,
    D,
    Form,
    H,
    Pinned,
    Rows,
    Y,
    check_x_init,
    register_form,
)
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times

_MOST_CALLS = 10_000  # of one implicit step: beyond it a tolerance is a slip of the pen
_INCREMENT = register_form("increment")
KINDS = ("slerp", "lerp")


def _chebyshev(low, high, tolerance):
    """Weights (of the last increment, of the residual) of each iteration for eigenvalues in [low, high]."""
    root = np.sqrt(high / low)
    rate = (root - 1.0) / (root + 1.0)
    count = max(1, int(np.ceil(np.log(0.5 * tolerance) / np.log(rate)))) if rate > 0 else 1
    if count > _MOST_CALLS:
        raise ValueError(
            f"dbim_encode: tolerance={tolerance} takes {count} calls for one step; give more steps"
        )
    middle, half = 0.5 * (high + low), 0.5 * (high - low)
    weights, rho = [(0.0, 1.0 / middle)], half / middle
    for _ in range(count - 1):
        following = 1.0 / (2.0 * middle / half - rho)
        weights.append((following * rho, 2.0 * following / half))
        rho = following
    return weights


def dbim_encode(
    process,
    num_steps: int | None = None,
    *,
    tolerance: float | None = None,
    slope: float = 2.0,
    order: int = 1,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """The encoder of first-order DBIM: `x_init` is `Pinned(source, x0)`, the result its booting noise.

    `dbim(process, num_steps, booting="given")`, started from `Pinned(source, result)`, decodes it again.
    Deterministic: no key is needed. Not in the registry of samplers, as it does not draw data.

        z = sample(dbim_encode(process, 20), denoise, None, Pinned(source, x0))
        x0 = sample(dbim(process, 20, booting="given"), denoise, None, Pinned(source, z))

    Args:
      process: a bridge process.
      num_steps: network calls of the decoder, default 20, at least 2.
      tolerance: None takes the explicit step (2), `num_steps` calls in all. A number solves (3) until the
        error of a step is that fraction of what the explicit step leaves: `log(tolerance / 2) / log(rate)`
        calls a step, where `(1 + rate)^2 / (1 - rate)^2 = 1 + slope (e^h - 1)`. What a clipped x0_hat has
        cut off is not lost: the decoder's step keeps k x_s.
      slope: the largest eigenvalue of `b dD/dx` that the iteration is to bear: 1 for one Gaussian mode, 1.1
        and 2.1 at most on trained models of digits and of Fashion-MNIST, more between the modes of data
        that fall apart. Beyond it the iteration diverges; a larger slope costs calls.
      order: 1, or 2 for step (2) with the difference of the last two predictions (the multistep formula of
        `dbim`, climbing); the code of the exact flow sooner, not that of a first-order decoder.
      grid, t_start, t_end: the decoder's own, from just below t = 1 down to t_min; see `dbim`.
    Raises:
      ValueError: fewer than 2 calls, a tolerance outside (0, 1) or with another order than 1, a slope that
        is not positive, an unknown order, not a bridge, a bridge or a t_end without noise (c = 0), or a bad grid; when
        sampling, another x_init.
    """
    check_bridge(process)
    check_calls("dbim_encode", num_steps, 2)
    if tolerance is not None and not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance must lie between 0 and 1, or be None; got {tolerance}")
    if not slope > 0.0:
        raise ValueError(f"slope must be positive, got {slope}")
    check_choice("order", order, (1, 2))
    if order != 1 and tolerance is not None:
        raise ValueError(f"a tolerance inverts a decoder of order 1; got order={order}")
    start = process.t_max - BOOT_GAP / process.clock_scale if t_start is None else t_start
    intervals = None if num_steps is None else num_steps - 1
    times = build_times(process, intervals, grid, start, t_end, default_steps=19)
    points = [process.point(t) for t in times[::-1]]
    check_noise(process, points, "give the t_end of a decoder that stops above it")
    check_entries(process, times)
    boot, end = points[-1], process.point(process.t_max)
    rows = Rows(source=True)
    last = len(points) - 2
    still = {} if tolerance is None else {"increment": Form()}
    if tolerance is None:
        for i, (here, there) in enumerate(itertools.pairwise(points)):
            x = first_order(here, there)
            if order == 2 and i > 0:
                lam = [np.log(p["b"] / p["c"]) for p in (points[i - 1], here, there)]
                h = lam[2] - lam[1]
                slant = there["b"] * (np.expm1(-h) + h) / (lam[1] - lam[0])
                x = x + slant * (D - H(1))
            rows.add(here, *((x, Form()) if i < last else (SRC, x)), push=D)
    else:
        rows.add(points[0], first_order(*points[:2]), Y, **still)
        for i, (here, there) in enumerate(itertools.pairwise(points)):
            k = here["c"] / there["c"]
            weights = _chebyshev(k, k + (here["b"] / there["b"] - k) * slope, tolerance)
            residual = A - first_order(there, here)
            for j, (keep, take) in enumerate(weights):
                change = keep * _INCREMENT + take * residual
                x = Y + change
                if j < len(weights) - 1:
                    rows.add(there, x, A, increment=change)
                elif i < last:
                    ahead = ode_step(x, D, SRC, there, points[i + 2])
                    rows.add(there, ahead, x, **still)
                else:
                    rows.add(there, SRC, x, **still)
    rows.add(end, (A - boot["a"] * SRC - boot["b"] * D) / boot["c"], A, **still)
    encoder = rows.sampler(boot, order=order, name="dbim_encode")
    return dataclasses.replace(encoder, prepare=_source_and_data)


def _source_and_data(x):
    if not isinstance(x, Pinned):
        raise ValueError("dbim_encode needs x_init = Pinned(source, x0)")
    return check_x_init(x)


def interpolate_latents(z0, z1, weights, kind: str = "slerp"):
    """Points on the way from one booting noise (or any Gaussian latent) to another, example by example.

    "slerp" goes along the arc (arXiv 2010.02502, eq. 67): with theta the angle between the two,
    `sin((1 - w) theta) / sin(theta) z0 + sin(w theta) / sin(theta) z1`. The way between two draws of a
    standard normal law then keeps their length, which "lerp", the straight line `(1 - w) z0 + w z1`, loses by
    up to a factor of sqrt(2): its middle is no typical noise, and decodes to something smoother. Opposite
    latents have no single arc: they, like parallel ones, are joined by the straight line.

    Args:
      z0, z1: float `[B, ...]`, of one shape.
      weights: float scalar or `[W]`; 0 is z0 and 1 is z1.
      kind: "slerp" or "lerp".
    Returns:
      `[B, ...]` for a scalar weight, else `[W, B, ...]`.
    Raises:
      ValueError: shapes or dtypes that do not fit, an unknown kind.
    """
    check_choice("kind", kind, KINDS)
    z0, z1, w = jnp.asarray(z0), jnp.asarray(z1), jnp.asarray(weights)
    if z0.shape != z1.shape or z0.ndim < 2:
        raise ValueError(f"latents must be [B, ...] of one shape, got {z0.shape} and {z1.shape}")
    if not (jnp.issubdtype(z0.dtype, jnp.floating) and z0.dtype == z1.dtype):
        raise ValueError(f"latents must be floats of one dtype, got {z0.dtype} and {z1.dtype}")
    if w.ndim > 1:
        raise ValueError(f"weights must be a scalar or [W], got shape {w.shape}")
    w = w.astype(z0.dtype).reshape(w.shape + (1,) * z0.ndim)
    share0, share1 = 1.0 - w, w
    if kind == "slerp":
        theta = expand(_angle(*(z.reshape(batch_size(z), -1) for z in (z0, z1))), z0)
        sine = jnp.sin(theta)
        curved = sine > 1e-6
        over = 1.0 / jnp.where(curved, sine, 1.0)
        share0 = jnp.where(curved, jnp.sin((1.0 - w) * theta) * over, share0)
        share1 = jnp.where(curved, jnp.sin(w * theta) * over, share1)
    return share0 * z0 + share1 * z1


def _angle(z0, z1):
    """Angle between rows `[B, D]`, 0 where one is zero; its gradient is finite everywhere.

    From the chord: the arccos of a cosine near 1 loses half of the digits.
    """
    length0, length1 = _length(z0), _length(z1)
    defined = (length0 > 0) & (length1 > 0)
    unit0, unit1 = (z / jnp.where(defined, n, 1.0) for z, n in ((z0, length0), (z1, length1)))
    angle = 2.0 * jnp.arctan2(
        _length(unit1 - unit0), jnp.where(defined, _length(unit1 + unit0), 1.0)
    )
    return jnp.where(defined, angle, 0.0)[:, 0]


def _length(z):
    square = jnp.square(z).sum(axis=1, keepdims=True)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
