"""The variational bound of VDM (arXiv 2107.00630): nats an example, for a fixed or a learned log-SNR.

For data x on a grid of levels and z_t = alpha x + sigma eps, with gamma = -log_snr increasing in t,

    -log p(x) <= reconstruction + prior + diffusion                                      [eq. 11]
  (1) reconstruction  E -log p(x | z_0), p(x_i | z_0,i) = softmax over the levels v of
                      -1/2 ((z_0,i / alpha_0 - v) e^{-gamma_0 / 2})^2
  (2) prior           KL(q(z_1 | x) || N(0, 1)) = 1/2 sum (alpha_1^2 x^2 + sigma_1^2 - log sigma_1^2 - 1)
  (3) diffusion       T steps:  T/2 E expm1(gamma_t - gamma_s) |eps - eps_hat|^2, s = t - 1/T  [eq. 13]
                      T = inf:  1/2 E gamma'(t) |eps - eps_hat|^2                              [eq. 17]

The terms depend on gamma(0) and gamma(1); (3) with T = inf on nothing else of gamma but its variance.
|eps - eps_hat|^2 is snr |x - x0_hat|^2, so that any denoiser of the library can be bounded.

Deviations: t = 0 counts to the first of T steps (in the official code its step would end before 0);
times are stratified over the global batch, in the official code over each device's part.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import (
    example_keys,
    expand,
    fold_all,
    normal_per_example,
    sum_per_example,
)
from diffusion_jax.objectives.per_example import global_index, squared_error
from diffusion_jax.objectives.times import stratified
from diffusion_jax.processes.log_snr import point_of


class VariationalTerms(NamedTuple):
    """The three terms of the bound, nats `[B]` each, and their `total`."""

    reconstruction: Any
    prior: Any
    diffusion: Any

    @property
    def total(self):
        return self.reconstruction + self.prior + self.diffusion


def level_values(levels) -> np.ndarray:
    """The values that data take, increasing `[L]`: L even steps on [-1, 1], or the values themselves.

    uint8 images have 256 levels, scikit-learn's digits 17. (The official code puts 256 levels at
    (2k + 1) / 256 - 1: pass that array to compare.)

    Raises:
      ValueError: fewer than two levels, or values that do not increase.
    """
    if np.ndim(levels) == 0:
        if not isinstance(levels, int | np.integer) or levels < 2:
            raise ValueError(f"levels must be an int of at least 2, or values; got {levels!r}")
        return np.linspace(-1.0, 1.0, levels)
    values = np.asarray(levels, np.float64)
    if values.ndim != 1 or len(values) < 2 or not (np.diff(values) > 0).all():
        raise ValueError(f"levels must increase and be two or more; got shape {values.shape}")
    return values


def nearest_level(x, levels):
    """The level next to each value, float of any shape: the most likely x of the decoder."""
    values = level_values(levels)
    between = jnp.asarray(0.5 * (values[1:] + values[:-1]), x.dtype)
    return jnp.asarray(values, x.dtype)[jnp.searchsorted(between, x)]


def reconstruction_nats(gamma_0, x0, eps_0, levels):
    """Term (1) at given noise, `[B]`; data between two levels counts as the nearer one.

    Args:
      gamma_0: scalar.
      x0, eps_0: `[B, ...]`; levels: as in `level_values`.
    """
    x = nearest_level(x0, levels)
    y = x + jnp.exp(0.5 * gamma_0) * eps_0
    v = jnp.asarray(level_values(levels), x.dtype)
    # logits less that of the truth, as one product: nothing large cancels where sigma is small
    gap = (v - x[..., None]) * (2.0 * y[..., None] - v - x[..., None])
    return sum_per_example(jax.nn.logsumexp(0.5 * jnp.exp(-gamma_0) * gap, axis=-1))


def prior_nats(gamma_1, x0):
    """Term (2), `[B]`: gamma_1 scalar, x0 `[B, ...]`."""
    alpha2, log_sigma2 = jax.nn.sigmoid(-gamma_1), -jax.nn.softplus(-gamma_1)
    return 0.5 * sum_per_example(alpha2 * jnp.square(x0) - alpha2 - log_sigma2)


def _elementwise(gamma, t):
    """gamma(t) and gamma'(t) for a function that acts on each time by itself."""
    return jax.jvp(gamma, (t,), (jnp.ones_like(t),))


def variational_terms(
    gamma: Callable, denoise: Callable, x0, t, eps_0, eps, *, levels, steps: int = 0
) -> VariationalTerms:
    """The terms of the bound at given times and noise.

    Args:
      gamma: `t -> -log_snr`, elementwise, increasing, differentiable.
      denoise: denoiser of z_t; its `at` (where it has one) is told the point of gamma, otherwise it
        is called with t.
      x0: data `[B, ...]`, float.
      t: times `[B]` in [0, 1].
      eps_0, eps: standard normal, like x0: the noise of the reconstruction and of z_t.
      levels: their number on [-1, 1], or their values.
      steps: T; 0 for continuous time. t is rounded up to a multiple of 1 / T.
    Raises:
      ValueError: shapes that do not fit, bad levels, negative steps.
    """
    if not isinstance(steps, int | np.integer) or steps < 0:
        raise ValueError(f"steps must be 0 (continuous time) or a positive int, got {steps!r}")
    for name, value in (("eps_0", eps_0), ("eps", eps)):
        if value.shape != x0.shape:
            raise ValueError(f"{name} has shape {value.shape} for data of shape {x0.shape}")
    if t.shape != x0.shape[:1]:
        raise ValueError(f"t has shape {t.shape} for a batch of {x0.shape[0]}")
    gamma_0, gamma_1 = gamma(jnp.asarray([0.0, 1.0], t.dtype))
    if steps:
        t = jnp.maximum(jnp.ceil(t * steps), 1.0) / steps
    gamma_t, dgamma = _elementwise(gamma, t)
    rate = steps * jnp.expm1(gamma_t - gamma(t - 1.0 / steps)) if steps else dgamma
    point = point_of(gamma_t, t, dgamma)
    zt = expand(point["alpha"], x0) * x0 + expand(point["sigma"], x0) * eps
    x0_hat, _ = evaluate(denoise, zt, point)
    error = squared_error(x0_hat, x0, "sum")
    return VariationalTerms(
        reconstruction_nats(gamma_0, x0, eps_0, levels),
        prior_nats(gamma_1, x0),
        0.5 * rate * jnp.exp(-gamma_t) * error,
    )


def variational_draws(key, x0, index, total):
    """The random numbers of one estimate of the bound: `(t [B], eps_0, eps)`.

    Times are one uniform shift of the grid index / total on [0, 1); noise is folded per example.
    """
    t_key, noise_key = jax.random.split(key)
    keys = example_keys(noise_key, index)
    eps_0, eps = (normal_per_example(fold_all(keys, i), x0) for i in range(2))
    return stratified(t_key, index, total), eps_0, eps


def variational_bound(
    gamma: Callable,
    denoise: Callable,
    key,
    x0,
    *,
    levels,
    steps: int = 0,
    index=None,
    total: int | None = None,
) -> VariationalTerms:
    """An unbiased estimate of the bound on -log p(x0), one time and one noise an example.

    Args:
      gamma, denoise, x0, levels, steps: as in `variational_terms`.
      key: split into times and noise; example i's noise is folded with `index[i]`.
      index, total: positions in, and size of, the global batch (default: this batch is all of it).
    Raises:
      ValueError: shapes that do not fit, bad levels, negative steps.
    """
    index, total = global_index(x0, index, total)
    t, eps_0, eps = variational_draws(key, x0, index, total)
    return variational_terms(gamma, denoise, x0, t, eps_0, eps, levels=levels, steps=steps)


def bits_per_dim(nats, shape):
    """Nats an example over the number of its dimensions and log 2; `shape` without the batch axis."""
    return nats / (np.prod(shape) * np.log(2.0))
