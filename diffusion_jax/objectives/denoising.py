"""Denoising losses: weighted squared error of x0_hat, for Gaussian processes and for bridges.

Every parameterisation and weighting of the score-matching family is this one loss
`E w(t) |x0_hat(x_t, t) - x0|^2`; which network output is plain MSE follows from the weight
(see `objectives.weightings`). Losses come one per example.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import example_keys, normal_per_example
from diffusion_jax.objectives import times as time_samplers
from diffusion_jax.objectives.weightings import Weighting, build_weighting


def _times_and_keys(process, key, index, total, times):
    """Times from one stream, per-example noise keys from another."""
    t_key, noise_key = jax.random.split(key)
    t, inverse_density = time_samplers.build_times(times)(process, t_key, index, total)
    return t, inverse_density, example_keys(noise_key, index)


def _global_index(x, index, total):
    index = jnp.arange(x.shape[0]) if index is None else index
    if index.shape != x.shape[:1]:
        raise ValueError(f"index has shape {index.shape} for a batch of {x.shape[0]}")
    return index, x.shape[0] if total is None else total


def _squared_error(x0_hat, x0, reduce):
    if x0_hat.shape != x0.shape:
        raise ValueError(f"denoise returned shape {x0_hat.shape} for data of shape {x0.shape}")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
    wide = x0_hat.astype(jnp.promote_types(x0_hat.dtype, jnp.float32))
    error = jnp.square(wide - x0).reshape(x0.shape[0], -1)
    return error.mean(axis=1) if reduce == "mean" else error.sum(axis=1)


def denoising(
    process,
    denoise: Callable,
    key,
    x0,
    *,
    weighting: str | Callable | Weighting = "eps",
    times: str | Callable = "uniform",
    reduce: str = "mean",
    index=None,
    total: int | None = None,
):
    """Denoising loss of a Gaussian process, one value an example.

    Args:
      process: a Gaussian process.
      denoise: `(x_t, t [B]) -> x0_hat`.
      key: split into times and noise; example i's noise is folded with `index[i]`.
      x0: data `[B, ...]`, float.
      weighting: a registered name, `(process, t) -> [B]` on the x0 error, or a `Weighting`.
      times: a registered name or a time sampler (see `objectives.times`).
      reduce: over data dimensions: "mean", or "sum" (nats, with the "elbo" weighting).
      index, total: positions in, and size of, the global batch (default: this batch is all of it).
    Returns:
      `(losses [B], aux)`; aux holds `t` and the unweighted `x0_error`, both `[B]`.
    Raises:
      ValueError: shapes that do not fit, unknown names.
    """
    index, total = _global_index(x0, index, total)
    weight, is_integral = build_weighting(weighting)
    t, inverse_density, keys = _times_and_keys(process, key, index, total, times)
    eps = normal_per_example(keys, x0)
    x0_hat, _ = evaluate(denoise, process.corrupt(x0, eps, t), process.point(t))
    error = _squared_error(x0_hat, x0, reduce)
    scale = weight(process, t) * (inverse_density if is_integral else 1.0)
    return scale * error, {"t": t, "x0_error": error}


def bridge_denoising(
    process,
    denoise: Callable,
    key,
    x0,
    x1,
    *,
    weight: Callable | None = None,
    times: str | Callable = "uniform",
    reduce: str = "mean",
    index=None,
    total: int | None = None,
):
    """Bridge denoising loss (DDBM, arXiv 2309.16948, eq. 10), one value an example.

    Args:
      process: a bridge process.
      denoise: `(x_t, t [B]) -> x0_hat`, the source closed over.
      x0, x1: data and source `[B, ...]`.
      weight: `(point) -> [B]`; default `1 / c_out^2` of the denoiser's own preconditioning where it has
        one (then the raw network's error counts plainly), else 1.
      key, times, reduce, index, total: as in `denoising`.
    Returns:
      `(losses [B], aux)` as in `denoising`.
    Raises:
      ValueError: x0 and x1 of different shape, and as in `denoising`.
    """
    if x0.shape != x1.shape:
        raise ValueError(f"data and source differ in shape: {x0.shape} and {x1.shape}")
    index, total = _global_index(x0, index, total)
    t, _, keys = _times_and_keys(process, key, index, total, times)
    point = process.point(t)
    xt = process.corrupt(x0, x1, normal_per_example(keys, x0), t)
    x0_hat, _ = evaluate(denoise, xt, point)
    error = _squared_error(x0_hat, x0, reduce)
    if weight is None:
        preconditioned = getattr(denoise, "parameterization", None) == "ddbm"
        scale = 1.0 / denoise.preconditioning(point).c_out ** 2 if preconditioned else 1.0
    else:
        scale = weight(point)
    return scale * error, {"t": t, "x0_error": error}
