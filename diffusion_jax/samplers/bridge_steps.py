"""What bridge samplers share: checks of process and grid, the boot, the exact first-order step.

A bridge cannot be left at its source by an ODE: c = 0 there, and the noise that tells one answer
from another has yet to enter. Either a step of an SDE brings it in, or the boot does:
  (1) D = D(x1, t = 1), x = a x1 + b D + c z at the first time below.
The probability-flow ODE is `d(x/c) = x1 d(a/c) + D d(b/c)`, exact for a frozen D; with w of the
noise made anew (arXiv 2405.15885) the step s -> t is
  (2) x_t = k x_s + (b_t - k b_s) D + (a_t - k a_s) x1 + w z,  k = sqrt(c_t^2 - w^2) / c_s.
"""

import dataclasses
import itertools

import numpy as np

from diffusion_jax.processes import BridgeProcess, SDEBridge
from diffusion_jax.processes.bridge_steps import ode_step
from diffusion_jax.registry import check_choice
from diffusion_jax.samplers.linear import SRC, A, D, Form, Pinned, Rows, X, Y, Z, check_x_init
from diffusion_jax.samplers.scan import Sampler

BOOT_GAP = 1e-3  # of the paper's clock: how far below the source DBIM's boot lands


def check_bridge(process) -> None:
    """Raises ValueError unless `process` is a bridge."""
    if not isinstance(process, BridgeProcess):
        raise ValueError(f"this sampler needs a bridge process, got {type(process).__name__}")


def check_sde_bridge(process, what: str) -> None:
    """Raises ValueError unless `process` is the h-transform of an SDE (it has alpha and rho)."""
    check_bridge(process)
    if not isinstance(process, SDEBridge):
        raise ValueError(f"{what} needs the bridge of an SDE, got {type(process).__name__}")


def check_calls(name: str, num_steps, least: int) -> None:
    """Raises ValueError unless `num_steps` is None or an int of at least `least`."""
    if num_steps is None:
        return
    if not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
    if num_steps < least:
        raise ValueError(f"{name} needs at least {least} network calls, got num_steps={num_steps}")


def check_entries(process, times) -> None:
    """Raises ValueError where two times stand on one entry of a tabulated schedule (I2SB)."""
    for here, there in itertools.pairwise(process.point(t) for t in times):
        if all(here[name] == there[name] for name in "abc"):
            pair = ", ".join(str(float(point["t"])) for point in (here, there))
            raise ValueError(
                f"the times {pair} stand on one entry of the schedule of {type(process).__name__}: "
                "take fewer steps or another grid"
            )


def check_noise(process, points, instead: str = "start below the source") -> None:
    """Raises ValueError where c = 0 at a point from which a step starts."""
    for point in points:
        if not point["c"] > 0:
            raise ValueError(
                f"{type(process).__name__} has no noise (c = 0) at t = {float(point['t']):g}, where a step "
                f"starts: {instead}"
            )


def first_order(here, there, w: float = 0.0) -> Form:
    """The mean of (2) from the point `here` to the point `there`."""
    kept = np.sqrt(max(there["c"] ** 2 - w**2, 0.0)) if w else there["c"]
    return ode_step(Y, D, SRC, here, {**there, "c": kept})


def booted(process, there, booting: str, **options) -> Rows:
    """Rows that begin with the boot (1) to the point `there`; its noise is drawn, or given.

    A given noise stands in the anchor until the boot; rows to come must leave the anchor alone.
    """
    check_choice("booting", booting, ("draw", "given"))
    start, z = ({}, Z) if booting == "draw" else ({"y": SRC, "anchor": X}, A)
    rows = Rows(start, source=True, **options)
    boot = there["a"] * SRC + there["b"] * D + there["c"] * z
    rows.add(process.point(process.t_max), boot, push=D)
    return rows


def _source_alone(x):
    if isinstance(x, Pinned):
        raise ValueError(
            "this sampler draws its booting noise: x_init is the source alone; "
            "booting='given' takes Pinned(source, noise)"
        )
    return check_x_init(x)


def _source_and_noise(x):
    if not isinstance(x, Pinned):
        raise ValueError("booting='given' needs x_init = Pinned(source, noise)")
    return check_x_init(x)


def expecting(sampler: Sampler, booting: str) -> Sampler:
    """The sampler with a check that x_init is what its boot needs."""
    prepare = _source_alone if booting == "draw" else _source_and_noise
    return dataclasses.replace(sampler, prepare=prepare)
