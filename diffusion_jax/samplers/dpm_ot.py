"""Sampling that begins late: optimal transport carries noise to noised data (DPM-OT, arXiv 2307.11308).

The targets P_j = alpha(t) x_j + sigma(t) eps_j of `samplers.transport` are states of the data at a late
time t, and a few steps of any sampler lead from there to t = 0:

    transport, sampler = transport_sampler(key, process, data, t=0.1, num_steps=4)
    x = sample(sampler, denoise, key, process.prior(key, (64, *data.shape[1:])))

or later, from `transport.save("ot.npz")`, `dpm_ot(process, 4, transport="ot.npz", sampler="dpmpp_2m")`.
It takes the process's noise as every sampler does, so `run.draw(..., sampler=...)` works with it. It is
no solver (its law is that of the targets, not of the data) and so stands apart from the registered ones.
A class-conditional model must be told the class of the target, or none: the state brings its class along.

What it is not: the map has n values, so there are never more than n different outputs, and for small t
they *are* the training images with the network's retouches. Always look at
`evaluation.nearest_distance` to the training set beside any other figure.

Deviations from the official code:
- the source is standard normal, as the processes' own prior is (theirs: uniform on [0, 1]^D, which
  `source="uniform"` is; noise handed to the sampler is then mapped by the normal distribution function);
- sampling begins at the time whose noise the targets hold (theirs: noise of level 222, steps from 230);
- running minimum and count of failures start anew after a doubling; moments are kept;
- any sampler finishes; theirs is `sampler="langevin"`.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import example_keys, is_concrete, normal_per_example
from diffusion_jax.registry import entry
from diffusion_jax.samplers.gaussian_path import gaussian_path
from diffusion_jax.samplers.linear import D, Rows, Y, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.transport import SOURCES, TransportMap, semi_discrete_transport


def late_states(key: jax.Array, process: Any, data: Any, t: float) -> jax.Array:
    """States of data at time t, `alpha x + sigma eps`: `[n, ...] -> float32 [n, ...]`."""
    data = jnp.asarray(data, jnp.float32)
    keys = example_keys(key, jnp.arange(data.shape[0]))
    eps = normal_per_example(keys, data)
    return process.corrupt(data, eps, jnp.float32(t))


def annealed_langevin(
    process: Any,
    num_steps: int | None = None,
    *,
    per_level: int = 5,
    rate: float = 0.062,
    grid: Any = None,
    t_start: float | None = None,
    t_end: float | None = None,
) -> Sampler:
    """Annealed Langevin dynamics with a last call that returns x0_hat (NCSNv2, arXiv 2006.09011).

    In y = x / alpha at noise u = sigma / alpha: `y' = y + rate (x0_hat - y) + u sqrt(2 rate) z`,
    `per_level` times at each level. NCSNv2's step 6.2e-6 (sigma / 0.01)^2 is rate = 0.062; its decoder
    in DPM-OT makes two levels, that is 11 calls.

    Args:
      num_steps: network calls, `per_level` times the levels and 1 more; default two levels.
      rate: between 0 and 1.
      grid, t_start, t_end: times of the first and the last level. It removes little noise: begin
        near t_end (theirs: from sigma = 0.0104 to 0.01).
    Raises:
      ValueError: a number of calls that is none of these, a rate outside (0, 1), a bad grid.
    """
    num_steps = 2 * per_level + 1 if num_steps is None else num_steps
    levels, rest = divmod(num_steps - 1, per_level)
    if rest or levels < 2:
        raise ValueError(
            f"langevin makes {per_level} calls a level and 1 more:"
            f" {2 * per_level + 1}, {3 * per_level + 1}, ...; got {num_steps}"
        )
    if not 0.0 < rate < 1.0:
        raise ValueError(f"rate must lie between 0 and 1, got {rate}")
    p, rows = gaussian_path(process, levels - 1, grid, t_start, t_end), Rows()
    if not (p.alpha[0] > 0 and p.sigma[-1] > 0):
        raise ValueError("langevin needs noise and signal at every level: choose t_start and t_end")
    for level in range(levels):
        for k in range(per_level):
            after = p.alpha[min(level + (k == per_level - 1), levels - 1)]
            y = (1.0 - rate) / p.alpha[level] * Y + rate * D
            u = p.sigma[level] / p.alpha[level]
            rows.add(p.point(level), after * (y + u * np.sqrt(2.0 * rate) * Z))
    rows.add(p.point(levels - 1), D)
    return rows.sampler(p.clean_point(), name="langevin")


@dataclasses.dataclass(frozen=True)
class _MappedInit:
    """`Sampler.init` of another sampler, begun where the transport map carries the noise."""

    inner: Callable

    def __call__(self, rng, start, x):
        transport = start["transport"]
        z = x / start["scale"]
        if transport.source == "uniform":
            z = jax.scipy.stats.norm.cdf(z)
        return self.inner(rng, start["inner"], transport(z))


def _gaussian_sampler(name: str) -> Callable[..., Sampler]:
    found = entry("sampler", name)
    if found.meta["family"] != "gaussian":
        raise ValueError(f"sampler {name!r} is not for a Gaussian process")
    return found.build


def dpm_ot(
    process: Any,
    num_steps: int | None = None,
    *,
    transport: TransportMap | str | os.PathLike,
    sampler: str | Callable = "ddim",
    t_start: float | None = None,
    **options: Any,
) -> Sampler:
    """DPM-OT (arXiv 2307.11308): transported noise, then a few steps of a sampler from the map's time.

    It takes the noise of `process.prior` like any other sampler.

    Args:
      num_steps: steps of the sampler, default 5.
      transport: a map to states at a time t (`late_states`), or the file of one.
      sampler: name of a Gaussian sampler, "langevin" (`annealed_langevin`), or its constructor.
      t_start: nothing else than the map's time.
      options: of the sampler (`grid`, `t_end`, ...).
    Raises:
      ValueError: a map without a time or of a custom source, another t_start, and what the sampler
        raises.
    """
    if not isinstance(transport, TransportMap):
        transport = TransportMap.load(transport)
    if transport.t is None:
        raise ValueError("the transport map does not say which time its targets are at: give t")
    if t_start is not None and is_concrete(t_start, transport.t) and t_start != transport.t:
        raise ValueError(f"the map's targets are at t = {transport.t}, t_start = {t_start}")
    if transport.source not in SOURCES:
        raise ValueError(
            "a map of a custom source cannot read the process's noise: map your own points and hand"
            " them to sample()"
        )
    if isinstance(sampler, str):
        sampler = annealed_langevin if sampler == "langevin" else _gaussian_sampler(sampler)
    default = (
        {} if sampler is annealed_langevin and num_steps is None else {"num_steps": num_steps or 5}
    )
    inner = sampler(process, **default, t_start=transport.t, **options)
    start = {"transport": transport, "scale": process.prior_std, "inner": inner.start}
    return dataclasses.replace(
        inner, init=_MappedInit(inner.init), start=start, order=None, name="dpm_ot"
    )


def transport_sampler(
    key: jax.Array,
    process: Any,
    data: Any,
    *,
    t: float,
    num_steps: int = 5,
    sampler: str | Callable = "ddim",
    sampler_options: dict | None = None,
    source: str = "normal",
    **options: Any,
) -> tuple[TransportMap, Sampler]:
    """All of DPM-OT but the network: noises data, fits the map, builds the sampler.

    Args:
      key: of noise and draws.
      process: a Gaussian process.
      data: `[n, ...]`, the images that outputs will be like.
      t: the late time; the earlier in the chain (the larger t), the more the network decides.
      num_steps, sampler, sampler_options: of `dpm_ot`.
      source: "normal" or "uniform".
      options: of `semi_discrete_transport`.
    Returns:
      `(map, sampler)`.
    Raises:
      ValueError: t outside the process's times, and as the parts.
    """
    low, high = process.t_min, process.t_max
    if is_concrete(low, high) and not low < t <= high:
        raise ValueError(f"t must lie in ({low}, {high}], got {t}")
    noise_key, fit_key = jax.random.split(key)
    targets = late_states(noise_key, process, data, t)
    transport = semi_discrete_transport(fit_key, targets, source, t=t, **options)
    built = dpm_ot(
        process, num_steps, transport=transport, sampler=sampler, **(sampler_options or {})
    )
    return transport, built
