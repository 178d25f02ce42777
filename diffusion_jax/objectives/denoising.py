"""Denoising losses: weighted squared error of x0_hat, for Gaussian processes.

Every parameterisation and weighting of the score-matching family is this one loss
`E w(t) |x0_hat(x_t, t) - x0|^2`; which network output is plain MSE follows from the weight
(see `objectives.weightings`). Losses come one per example.
"""

from collections.abc import Callable

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import normal_per_example
from diffusion_jax.objectives.per_example import global_index, squared_error, times_and_keys
from diffusion_jax.objectives.weightings import Weighting, build_weighting


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
    index, total = global_index(x0, index, total)
    weight, is_integral = build_weighting(weighting)
    t, inverse_density, keys = times_and_keys(process, key, index, total, times)
    eps = normal_per_example(keys, x0)
    x0_hat, _ = evaluate(denoise, process.corrupt(x0, eps, t), process.point(t))
    error = squared_error(x0_hat, x0, reduce)
    scale = weight(process, t) * (inverse_density if is_integral else 1.0)
    return scale * error, {"t": t, "x0_error": error}
