"""The samplers of the Bayesian flow networks paper (arXiv 2308.07037): n Bayesian updates, one more call.

Continuous data, with precision rho and accuracy a of the step:
  (1) y ~ N(x0_hat, 1 / a),  mu' = (rho mu + a y) / (rho + a),  rho' = rho + a
With rho = 1 + snr and a = rho' - rho this is the reverse transition q(x' | x, x0) of the process, the
ancestral sampler of DDPM, and it is written so for any Gaussian process.
Discrete data, on logits z:
  (2) k ~ Cat(D),  y ~ N(a (K e_k - 1), a K),  z' = z + y,  a = beta' - beta
which draws categories, hence is not a table. Both make a last call, whose output is the result.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import fold_all, normal_per_example
from diffusion_jax.processes import ContinuousBFN, DiscreteBFN
from diffusion_jax.registry import register
from diffusion_jax.samplers.categorical import inverse_cdf
from diffusion_jax.samplers.gaussian_path import gaussian_path
from diffusion_jax.samplers.linear import D, Rows, X, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times


def known_nothing(point) -> bool:
    """Whether a Gaussian state at this point is 0 for certain (a Bayesian flow at t = 1)."""
    return point["alpha"] == 0 and point["sigma"] == 0


@register("sampler", "bfn_continuous", family="gaussian", paper="2308.07037", calls="n+1")
def bfn_continuous(
    process,
    num_steps: int | None = None,
    *,
    last_call: bool | None = None,
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """The BFN's own sampler of continuous data (Graves et al., arXiv 2308.07037).

    Starts at t = 1 on a `ContinuousBFN`, where the state is 0: x_init then gives the shape alone.

    Equivalences: without its last call, DDPM's ancestral sampler (`ddim` with eta = 1).

    Args:
      process: a Gaussian process.
      num_steps: Bayesian updates n, default 50; n + 1 network calls with the last call.
      last_call: return x0_hat of one more call at the end; None: on a `ContinuousBFN`.
      grid, t_start, t_end: see `time_grids.build_times`; default uniform on a `ContinuousBFN`.
    Raises:
      ValueError: not a Gaussian process, or a bad grid.
    """
    own = isinstance(process, ContinuousBFN)
    if own:
        process = dataclasses.replace(process, eta=0.0)
    p = gaussian_path(process, num_steps, grid, t_start, t_end, default_steps=50)
    rows = Rows(init={"y": float(not known_nothing(p.point(0))) * X})
    for i in range(p.steps):
        a, s, a1, s1 = p.alpha[i], p.sigma[i], p.alpha[i + 1], p.sigma[i + 1]
        # where alpha = 0 the state says nothing of the data and the transition starts anew
        k = a * s1**2 / (a1 * s**2) if a > 0 else 0.0
        w = np.sqrt(max(s1**2 - (k * s) ** 2, 0.0))
        rows.add(p.point(i), k * Y + (a1 - k * a) * D + w * Z)
    if own if last_call is None else last_call:
        rows.add(p.point(p.steps), D)
        return rows.sampler(p.clean_point(), name="bfn_continuous")
    return rows.sampler(p.point(p.steps), name="bfn_continuous")


class FlowState(NamedTuple):
    """Scan state: logits `[B, L, K]`, after the last call class probabilities."""

    x: Any


def check_discrete(process) -> None:
    """Raises ValueError unless the process is a `DiscreteBFN`."""
    if not isinstance(process, DiscreteBFN):
        raise ValueError(f"this sampler needs a DiscreteBFN process, got {type(process).__name__}")


@dataclasses.dataclass(frozen=True)
class LogitsPrepare:
    """`Sampler.prepare`: logits `[B, L, K]`."""

    vocab_size: int

    def __call__(self, x_init):
        z = jnp.asarray(x_init)
        if (
            z.ndim != 3
            or z.shape[-1] != self.vocab_size
            or not jnp.issubdtype(z.dtype, np.floating)
        ):
            raise ValueError(
                f"x_init must be floating-point logits [B, L, {self.vocab_size}] "
                f"(process.prior(key, (B, L))); got shape {z.shape}, dtype {z.dtype}"
            )
        return z


def _start(rng, start, z):
    return FlowState(start["keep"] * z)


def _finish(state: FlowState):
    return state.x


@dataclasses.dataclass(frozen=True)
class BayesianUpdate:
    """`Sampler.step` of (2)."""

    vocab_size: int

    def __call__(self, call, rng, state, inputs):
        z = state.x
        probs = call(z, inputs["point"])
        if probs.shape != z.shape:
            raise ValueError(f"denoise returned {probs.shape} for z of {z.shape}")
        wide = probs.astype(jnp.promote_types(probs.dtype, jnp.float32))
        if "uniform" in inputs:
            uniform, noise = inputs["uniform"], inputs["z"]
        else:
            keys = rng()
            draw = lambda key: jax.random.uniform(key, z.shape[1:-1], wide.dtype)
            uniform = jax.vmap(draw)(fold_all(keys, 0))
            noise = normal_per_example(fold_all(keys, 1), z)
        one_hot = jax.nn.one_hot(inverse_cdf(wide, uniform), self.vocab_size, dtype=wide.dtype)
        a, size = inputs["accuracy"].astype(wide.dtype), self.vocab_size
        updated = z + a * (size * one_hot - 1.0) + jnp.sqrt(size * a) * noise
        return FlowState(jnp.where(inputs["last"], wide, updated).astype(z.dtype)), probs


@register("sampler", "bfn", family="bayesian_flow", paper="2308.07037", calls="n+1", table=False)
def bfn(
    process, num_steps: int | None = None, *, grid=None, t_start: float | None = None, t_end=None
) -> Sampler:
    """The BFN's own sampler of tokens (Graves et al., arXiv 2308.07037).

    Starts at t = 1 from logits 0, whatever x_init holds; with another `t_start`, from x_init. The
    result is the network's probabilities `[B, L, K]` at the last time; the paper takes their mode.

    Equivalences: SDE-1 of BFN-Solver with categories drawn instead of averaged.

    Args:
      process: a `DiscreteBFN`.
      num_steps: Bayesian updates n, default 50; n + 1 network calls.
      grid, t_start, t_end: see `time_grids.build_times`.
    Raises:
      ValueError: another process, or a bad grid.
    """
    check_discrete(process)
    process = dataclasses.replace(process, eta=0.0)
    times = build_times(process, num_steps, grid, t_start, t_end, default_steps=50)
    beta = process.beta(times)
    point, end = process.point(times), process.point(times[-1:])
    xs = {
        "point": point,
        "next": {k: np.concatenate([v[1:], end[k]]) for k, v in point.items()},
        "accuracy": np.append(np.diff(beta), 0.0),
        "last": np.arange(len(times)) == len(times) - 1,
    }
    return Sampler(
        init=_start,
        step=BayesianUpdate(process.vocab_size),
        finish=_finish,
        xs=xs,
        start={"keep": float(times[0] < 1.0)},
        nfe=len(times),
        prepare=LogitsPrepare(process.vocab_size),
        stochastic=True,
        name="bfn",
    )


def with_draws(sampler: Sampler, uniform: Any, noise: Any) -> Sampler:
    """The same sampler with its random draws replaced by given ones (common random numbers, tests).

    Args:
      sampler: from `bfn`, with n updates.
      uniform: `[n, B, L]` in [0, 1), for the categories, see `inverse_cdf`.
      noise: `[n, B, L, K]`, standard normal.
    Raises:
      ValueError: another sampler, or another number of draws.
    """
    if not isinstance(sampler.step, BayesianUpdate):
        raise ValueError(f"sampler {sampler.name!r} does not draw categories: see with_noise")
    steps = sampler.nfe - 1
    if len(uniform) != steps or len(noise) != steps:
        raise ValueError(f"{steps} updates need as many draws; got {len(uniform)}, {len(noise)}")
    pad = lambda v: np.concatenate([np.asarray(v), np.zeros_like(np.asarray(v)[:1])])
    xs = {**sampler.xs, "uniform": pad(uniform), "z": pad(noise)}
    return dataclasses.replace(sampler, xs=xs, stochastic=False)
