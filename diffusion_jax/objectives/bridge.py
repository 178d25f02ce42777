"""Bridge denoising: weighted squared error of x0_hat, given the source (DDBM, I2SB, Bridge-TTS)."""

from collections.abc import Callable

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import normal_per_example
from diffusion_jax.objectives.per_example import global_index, squared_error, times_and_keys


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
    mask=None,
    index=None,
    total: int | None = None,
):
    """Bridge denoising loss (DDBM, arXiv 2309.16948, eq. 10), one value an example.

    The default weight makes it the plain squared error of the network's own output: DDBM's
    1 / c_out^2, I2SB's (x_t - x0) / rho (arXiv 2302.05872, eq. 12), Bridge-TTS's data prediction
    (arXiv 2312.03491), according to the denoiser's parameterization.

    Args:
      process: a bridge process.
      denoise: `(x_t, t [B]) -> x0_hat`, the source closed over.
      x0, x1: data and source `[B, ...]`.
      weight: `(point) -> [B]` on the x0 error; default `1 / denoise.output_scale(point)^2`, 1 for
        denoisers without one.
      mask: 1 where the error counts, 0 elsewhere, broadcast against x0: the hole of an inpainting problem.
      key, times, reduce, index, total: as in `denoising`.
    Returns:
      `(losses [B], aux)`; aux holds `t` and the unweighted `x0_error`, both `[B]`.
    Raises:
      ValueError: x0 and x1 of different shape, and as in `denoising`.
    """
    if x0.shape != x1.shape:
        raise ValueError(f"data and source differ in shape: {x0.shape} and {x1.shape}")
    index, total = global_index(x0, index, total)
    t, _, keys = times_and_keys(process, key, index, total, times)
    point = process.point(t)
    xt = process.corrupt(x0, x1, normal_per_example(keys, x0), t)
    x0_hat, _ = evaluate(denoise, xt, point)
    error = squared_error(x0_hat, x0, reduce, mask)
    if weight is None:
        output_scale = getattr(denoise, "output_scale", lambda point: 1.0)
        scale = 1.0 / output_scale(point) ** 2
    else:
        scale = weight(point)
    return scale * error, {"t": t, "x0_error": error}
