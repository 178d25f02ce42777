"""The probability-flow ODE by adaptive solvers: sampling, encoding, exact likelihood (arXiv 2011.13456).

`flow_integrator` holds the ODE and its integrator. With z, theta, r and the divergence as there:
  log p(x_s) = log p(x_t) + D log(r_t / r_s) + int_s^t div_z (dz / dtheta) dtheta

Step sizes (`control`): "example" gives each example its own, so that its result depends on itself alone.
All are advanced together, each network call at times `[B]`, until the slowest is done. "batch" takes one
step size for all (the largest error of an example decides) and calls with a scalar time: for denoisers
that take no others, and for reverse-mode derivatives, which diffrax does not take through the batching
rule of the other; results then depend on the batch, within the tolerance.

Deviations from the released code of arXiv 2011.13456: theta is the variable of integration instead of t;
its solver measures the error over the whole batch; its bits per dimension are in `evaluation.likelihood`.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import batch_size, example_keys, fold_all, sum_per_example
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.registry import check_choice, names
from diffusion_jax.samplers.flow_integrator import (
    CONTROLS,
    DIVERGENCES,
    SOLVERS,
    FlowInfo,
    FlowOptions,
    flow_path,
    integrate_flow,
    is_known,
)
from diffusion_jax.samplers.scan import check_key

NOISES = ("gaussian", "rademacher")


def _check(process, denoise, x, rtol, atol, solver, max_steps, control):
    if not isinstance(process, GaussianProcess):
        raise ValueError(
            "the probability-flow ODE and its likelihood need a Gaussian process, got "
            f"{type(process).__name__}; valid: {', '.join(names('process', family='gaussian'))}"
        )
    if not callable(denoise):
        raise TypeError(f"denoise must be callable, got {type(denoise)}")
    if solver not in SOLVERS and solver in names("sampler"):
        raise ValueError(
            f"solver {solver!r} is a sampler of fixed steps, possibly stochastic; the ODE is solved by an"
            f" adaptive method; valid: {', '.join(sorted(SOLVERS))}"
        )
    check_choice("solver", solver, SOLVERS)
    check_choice("control", control, CONTROLS)
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not isinstance(value, jax.core.Tracer) and not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive integer, got {max_steps!r}")
    x = jnp.asarray(x)
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be real with shape [B, ...], got dtype {x.dtype} and shape {x.shape}"
        )
    return x


def ode_solve(
    process,
    denoise,
    x,
    t_from,
    t_to,
    *,
    rtol=1e-5,
    atol=1e-5,
    solver: str = "dopri5",
    max_steps: int = 4096,
    control: str = "example",
) -> tuple[Any, FlowInfo]:
    """Carries x along the probability-flow ODE from one time to another, either way.

    Args:
      process: a Gaussian process.
      denoise: `(x, t) -> x0_hat`; with control "example" called with t `[B]`.
      x: real `[B, ...]` at `t_from`; computed in float32 or better.
      t_from, t_to: times in [0, 1].
      rtol, atol: tolerances on x / sqrt(alpha^2 + sigma^2) (root mean square over an example).
      solver: one of `SOLVERS`: "bosh3", "dopri5", "dopri8", "heun", "tsit5".
      max_steps: limit on the steps tried.
      control: "example" or "batch", see the module.
    Returns:
      x at `t_to`, and a `FlowInfo`.
    Raises:
      ValueError: another process, an unknown name, a number out of range, a solver that gave up (outside
        `jit`; inside, `FlowInfo.success` tells). ImportError: diffrax is missing.
    """
    x = _check(process, denoise, x, rtol, atol, solver, max_steps, control)
    options = FlowOptions(solver, max_steps, control, None)
    path = flow_path(process, t_from, t_to)
    end, _, info = integrate_flow(process, denoise, options, path, x, None, rtol, atol)
    return end, info


def encode(process, denoise, x0, *, t_from=None, t_to=None, **options) -> tuple[Any, FlowInfo]:
    """The latent of data: the ODE from `t_from` (default: where samplers end) to `t_to` (where they begin).

    Other arguments, result and errors as `ode_solve`. `decode` of the latent gives x0 back.
    """
    start, end = process.sampling_range if isinstance(process, GaussianProcess) else (1.0, 0.0)
    t_from, t_to = end if t_from is None else t_from, start if t_to is None else t_to
    return ode_solve(process, denoise, x0, t_from, t_to, **options)


def decode(
    process, denoise, x, *, t_from=None, t_to=None, denoise_to_zero: bool = False, **options
) -> tuple[Any, FlowInfo]:
    """The adaptive sampler: the ODE from noise at `t_from` to data at `t_to` (defaults: the samplers').

    Args:
      x: `process.prior(key, shape)`, or a latent made by `encode`.
      denoise_to_zero: return x0_hat at the end, one further call (score_sde's denoising step).
    Other arguments, result and errors as `ode_solve`.
    """
    start, end = process.sampling_range if isinstance(process, GaussianProcess) else (1.0, 0.0)
    t_from, t_to = start if t_from is None else t_from, end if t_to is None else t_to
    x, info = ode_solve(process, denoise, x, t_from, t_to, **options)
    if not denoise_to_zero:
        return x, info
    # a network is not called below t_min where the end is clean data
    last = jnp.where(jnp.asarray(process.sigma(t_to)) > 0.0, t_to, process.t_min)
    x0_hat = evaluate(denoise, x, process.point(jnp.full(x.shape[0], last)))[0]
    return x0_hat, info._replace(nfe=info.nfe + 1, nfe_each=info.nfe_each + 1)


def draw_probes(key, like, probes: int = 1, noise: str = "rademacher", index=None):
    """Probes of unit covariance `[probes, B, ...]` like x `[B, ...]`.

    Example i's depend on `key` and `index[i]` (default i) alone.

    Raises:
      ValueError: no key, an unknown noise, probes below 1.
    """
    check_choice("noise", noise, NOISES)
    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be a positive integer, got {probes!r}")
    if key is None:
        raise ValueError(
            "divergence='hutchinson' draws random probes: it needs a key (or probe=), got None"
        )
    check_key(key)
    size = batch_size(like)
    index = jnp.arange(size, dtype=jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
    if index.shape != (size,):
        raise ValueError(f"index has shape {index.shape}; x0 holds {size} examples")
    draw = jax.random.rademacher if noise == "rademacher" else jax.random.normal
    dtype = jnp.promote_types(like.dtype, jnp.float32)
    keys = example_keys(key, index)
    each = [
        jax.vmap(lambda k: draw(k, like.shape[1:], dtype))(fold_all(keys, n)) for n in range(probes)
    ]
    return jnp.stack(each)


def normal_log_prob(x, std):
    """log density of N(0, std^2 I) at x `[B, ...]`, nats `[B]`."""
    scaled, dimensions = x / std, math.prod(x.shape[1:])
    return -0.5 * sum_per_example(scaled**2) - dimensions * (
        0.5 * math.log(2.0 * math.pi) + jnp.log(std)
    )


def log_prob(
    process,
    denoise,
    x0,
    key=None,
    *,
    divergence: str = "hutchinson",
    probes: int = 1,
    noise: str = "rademacher",
    probe=None,
    index=None,
    prior_log_prob: Callable | None = None,
    t_from=None,
    t_to=None,
    rtol=1e-5,
    atol=1e-5,
    solver: str = "dopri5",
    max_steps: int = 4096,
    control: str = "example",
) -> tuple[Any, Any, FlowInfo]:
    """Exact log density of data under the probability-flow ODE, by the change of variables above.

    Use a denoiser that does not clip: clipping sets derivatives to zero.

    Args:
      process, denoise, rtol, atol, solver, max_steps, control: as `ode_solve`; the tolerances hold for the
        log density too.
      x0: real `[B, ...]`, taken as x at `t_from`.
      key: of the probes; not needed for the exact divergence or when `probe` is given.
      divergence: "hutchinson" (unbiased, one derivative a probe and call) or "exact" (one a dimension).
      probes: probes an example, drawn once and kept along the path.
      noise: their law, "rademacher" or "gaussian".
      probe: the probes themselves, `[B, ...]` or `[probes, B, ...]`, instead of a draw.
      index: int `[B]`, numbers of the examples for the draw (default 0..B-1).
      prior_log_prob: `(x `[B, ...]`) -> [B]`, log density at `t_to`; default N(0, prior_std^2 I).
      t_from, t_to: default `process.t_min` and the samplers' start.
    Returns:
      log p in nats `[B]`, latents (x at `t_to`) `[B, ...]`, `FlowInfo`.
    Raises:
      ValueError: as `ode_solve`; Hutchinson's estimate without a key; shapes that do not fit.
    """
    x = _check(process, denoise, x0, rtol, atol, solver, max_steps, control)
    check_choice("divergence", divergence, DIVERGENCES)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    if divergence == "exact":
        probe = None
    elif probe is None:
        probe = draw_probes(key, x, probes, noise, index)
    else:
        given = jnp.asarray(probe)
        probe = given[None] if given.ndim == x.ndim else given
        if probe.shape[1:] != x.shape or not probe.shape[0]:
            raise ValueError(
                f"probe has shape {given.shape}; expected {x.shape}, or that behind an axis of probes"
            )
    if probe is not None:
        probe = jnp.moveaxis(probe.astype(dtype), 0, 1)
    t_from = process.t_min if t_from is None else t_from
    t_to = process.sampling_range[0] if t_to is None else t_to
    if is_known(t_from, t_to) and not t_from < t_to:
        raise ValueError(f"need t_from < t_to, got t_from = {t_from}, t_to = {t_to}")
    options = FlowOptions(solver, max_steps, control, divergence)
    path = flow_path(process, t_from, t_to)
    latent, gain, info = integrate_flow(
        process, denoise, options, path, x.astype(dtype), probe, rtol, atol
    )
    prior = (
        normal_log_prob(latent, process.prior_std)
        if prior_log_prob is None
        else prior_log_prob(latent)
    )
    return prior + gain, latent, info
