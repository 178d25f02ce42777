"""Learned reverse variances, the hybrid loss of improved DDPM, ADM and DiT (arXiv 2102.09672, 2212.09748).

The network has twice the channels of x: the prediction, and v of `processes.reverse_step`. With T steps,
  (1) L = weighted error of x0_hat + L_vlb                              [eq. 16, lambda is T / 1000 or 1]
  (2) L_vlb = KL(q(x_s | x_t, x0) || p(x_s | x_t)) in bits a dimension, s = t - 1/T
  (3) in the first step, s = 0, -log p(x0 | x_t), discretised on `levels` values in [-1, 1]
The mean of p counts as a constant in (2) and (3): they teach the variance alone. In the first step the
smaller end of its range is that of the second one, as the authors have it.

Deviation: (3) has the normal distribution function itself, not its approximation by tanh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from diffusion_jax.denoisers import evaluate_moments
from diffusion_jax.numerics import expand, normal_per_example
from diffusion_jax.objectives.per_example import global_index, squared_error, times_and_keys
from diffusion_jax.objectives.weightings import Weighting, build_weighting
from diffusion_jax.processes.reverse_step import interpolated_log_variance, reverse_step

_LEAST = 1e-12  # probability of a level


def learned_variance_denoising(
    process,
    denoise: Callable,
    key,
    x0,
    *,
    weighting: str | Callable | Weighting = "eps",
    times: str | Callable = "labels",
    steps: int | None = None,
    levels: int = 256,
    index=None,
    total: int | None = None,
):
    """The hybrid loss (1) of a Gaussian process, one value an example.

    Args:
      process: a Gaussian process.
      denoise: has `moments(x, point) -> (x0_hat, v)`, see `denoisers.Denoiser` with `learned_variance`.
      key: split into times and noise; example i's noise is folded with `index[i]`.
      x0: data `[B, ...]`, float.
      weighting, times: of the first term, see `objectives.denoising`.
      steps: T; None for the length of the process's own list, or 1000.
      levels: of the data on [-1, 1], for (3).
      index, total: positions in, and size of, the global batch (default: this batch is all of it).
    Returns:
      `(losses [B], aux)`; aux holds `t`, the unweighted `x0_error` and `vlb`, each `[B]`.
    Raises:
      ValueError: shapes that do not fit, unknown names, a model without learned variance.
    """
    index, total = global_index(x0, index, total)
    steps = steps or getattr(process, "num_train_steps", 1000)
    weight, is_integral = build_weighting(weighting)
    t, inverse_density, keys = times_and_keys(process, key, index, total, times)
    xt = process.corrupt(x0, normal_per_example(keys, x0), t)
    x0_hat, v = evaluate_moments(denoise, xt, process.point(t))
    error = squared_error(x0_hat, x0, "mean")
    scale = weight(process, t) * (inverse_density if is_integral else 1.0)
    vlb = variance_bound(process, x0, xt, x0_hat, v, t, steps, levels)
    return scale * error + vlb, {"t": t, "x0_error": error, "vlb": vlb}


def variance_bound(process, x0, xt, x0_hat, v, t, steps: int, levels: int = 256):
    """L_vlb of (2) and (3), bits a dimension, `[B]`; no gradient reaches x0_hat.

    Args:
      process: a Gaussian process.
      x0, xt, x0_hat, v: `[B, ...]`.
      t: `[B]`.
      steps, levels: see `learned_variance_denoising`.
    """
    first = t < 1.5 / steps
    s = jnp.where(first, 0.0, t - 1.0 / steps)
    step = reverse_step(process, t, s)
    second = reverse_step(process, jnp.float32(2.0 / steps), jnp.float32(1.0 / steps))
    log_small = expand(jnp.where(first, second.log_small, step.log_small), x0)
    log_variance = interpolated_log_variance(log_small, expand(step.log_large, x0), v)
    x0_hat = jax.lax.stop_gradient(x0_hat)
    # the means differ by what the guesses of x0 do
    gap = expand(step.x0, x0) * (x0 - x0_hat)
    divergence = 0.5 * (
        log_variance
        - log_small
        + jnp.expm1(log_small - log_variance)
        + gap**2 * jnp.exp(-log_variance)
    )
    likelihood = _level_log_likelihood(x0, x0_hat, log_variance, levels)
    nats = jnp.where(expand(first, x0), -likelihood, divergence)
    return nats.reshape(nats.shape[0], -1).mean(axis=1) / jnp.log(2.0)


def _level_log_likelihood(x0, mean, log_variance, levels):
    """log of the mass that N(mean, variance) has at the level of x0; the outer levels reach to infinity."""
    half, rate = 1.0 / (levels - 1), jnp.exp(-0.5 * log_variance)
    above = jnp.where(x0 > 1.0 - half, 1.0, ndtr(rate * (x0 - mean + half)))
    below = jnp.where(x0 < half - 1.0, 0.0, ndtr(rate * (x0 - mean - half)))
    return jnp.log(jnp.maximum(above - below, _LEAST))
