"""What losses share: places in the global batch, times and noise of each example, squared errors."""

import jax
import jax.numpy as jnp

from diffusion_jax.numerics import example_keys
from diffusion_jax.objectives import times as time_samplers


def global_index(x, index, total):
    """`(index [B], total)`: positions in, and size of, the global batch; default: this batch is all of it.

    Raises:
      ValueError: an index of another length than x `[B, ...]`.
    """
    index = jnp.arange(x.shape[0]) if index is None else index
    if index.shape != x.shape[:1]:
        raise ValueError(f"index has shape {index.shape} for a batch of {x.shape[0]}")
    return index, x.shape[0] if total is None else total


def times_and_keys(process, key, index, total, times):
    """`(t [B], 1 / density of t [B], noise keys [B])`: times from one stream of `key`, noise from another."""
    t_key, noise_key = jax.random.split(key)
    t, inverse_density = time_samplers.build_times(times)(process, t_key, index, total)
    return t, inverse_density, example_keys(noise_key, index)


def squared_error(x0_hat, x0, reduce, mask=None):
    """Squared error of each example `[B]`, at least in float32; where `mask` is 0 it counts as 0.

    Args:
      x0_hat, x0: `[B, ...]`, of one shape.
      reduce: over all data dimensions: "mean" or "sum".
      mask: broadcasts against x0, or None.
    Raises:
      ValueError: shapes that do not fit, another `reduce`.
    """
    if x0_hat.shape != x0.shape:
        raise ValueError(f"denoise returned shape {x0_hat.shape} for data of shape {x0.shape}")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be 'mean' or 'sum', got {reduce!r}")
    wide = x0_hat.astype(jnp.promote_types(x0_hat.dtype, jnp.float32))
    error = jnp.square(wide - x0)
    if mask is not None:
        error = error * mask
    error = error.reshape(x0.shape[0], -1)
    return error.mean(axis=1) if reduce == "mean" else error.sum(axis=1)
