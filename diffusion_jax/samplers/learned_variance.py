"""Ancestral steps with a learned variance (Nichol and Dhariwal, arXiv 2102.09672), as ADM and DiT sample.

    x' = mean of q(x' | x, x0_hat) + exp(log variance / 2) z                   `processes.reverse_step`

where the log variance of each element lies as far between the two ends of its range as the network says.
The step into sigma = 0 draws nothing. Its variance differs from element to element, so it is no table.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import normal_per_example
from diffusion_jax.processes.reverse_step import interpolated_log_variance, reverse_step
from diffusion_jax.samplers.linear import check_x_init
from diffusion_jax.samplers.scan import Sampler


class LearnedVarianceState(NamedTuple):
    """Scan state: the iterate x `[B, ...]`."""

    x: Any


def _init(rng, start, x):
    return LearnedVarianceState(x)


def _finish(state):
    return state.x


def _step(call, rng, state, inputs):
    x = state.x
    x0_hat, v = call.moments(x, inputs["point"])
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    c = {name: jnp.asarray(inputs[name], dtype) for name in ("x", "x0", "small", "large", "noise")}
    deviation = jnp.exp(0.5 * interpolated_log_variance(c["small"], c["large"], v.astype(dtype)))
    z = normal_per_example(rng(), jax.ShapeDtypeStruct(x.shape, dtype))
    moved = c["x"] * x.astype(dtype) + c["x0"] * x0_hat.astype(dtype)
    return LearnedVarianceState((moved + c["noise"] * deviation * z).astype(x.dtype)), x0_hat


def learned_ancestral(path) -> Sampler:
    """The sampler on a `GaussianPath`; its model needs `moments`, see `denoisers.evaluate_moments`."""
    steps = [reverse_step(path.process, t, s) for t, s in zip(path.t[:-1], path.t[1:])]
    draws = path.sigma[1:] > 0
    columns = {name: np.array([getattr(step, name) for step in steps]) for name in ("x", "x0")}
    large = np.array([step.log_large for step in steps])
    small = np.where(draws, [step.log_small for step in steps], large)  # finite where unused

    def stacked(indices):
        points = [path.point(i) for i in indices]
        return {name: np.array([float(point[name]) for point in points]) for name in points[0]}

    with np.errstate(divide="ignore", invalid="ignore"):
        here, there = stacked(range(path.steps)), stacked(range(1, path.steps + 1))
    xs = {"point": here, "next": there, "small": small, "large": large, **columns}
    xs["noise"] = draws.astype(np.float64)
    return Sampler(_init, _step, _finish, xs, (), path.steps, check_x_init, True, name="ddpm")
