"""DBIM: implicit samplers for trained bridges (Zheng et al., arXiv 2405.15885).

With lam = log(b / c), s -> t a step, h = lam_t - lam_s, D_s, D_u, ... the predictions at s and before:
  (1) boot, the only way to leave the source: D = D(x1, t = 1), x = a x1 + b D + c z
  (2) order 1: x_t = k x_s + (b_t - k b_s) D_s + (a_t - k a_s) x1 + w z, k = sqrt(c_t^2 - w^2) / c_s,
      w = eta alpha_t rho_t sqrt(1 - rho_t^2 / rho_s^2)
  (3) orders 2 and 3, eta = 0: (2) + b_t [(e^-h + h - 1) D' + (h^2/2 - h + 1 - e^-h) D''], D' and D''
      the derivatives in lam of the polynomial through the last two (D'' = 0) or three predictions
The first step of (3) is of order 1, the second of order 2 at most, the last of order 1
(`lower_order_final`).
Deviations: none. On the last step the noise is dropped while k keeps w, as in the authors' code;
its history at t = 1, which no step reads, is not kept.
"""

import itertools

import numpy as np

from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.bridge_steps import (
    BOOT_GAP,
    booted,
    check_bridge,
    check_calls,
    check_entries,
    check_noise,
    check_sde_bridge,
    expecting,
    first_order,
)
from diffusion_jax.samplers.linear import D, H, Z
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.time_grids import build_times


def _bend(lam, i, order):
    """What (3) adds to the first-order step i -> i + 1, divided by b."""
    h, h1 = lam[i + 1] - lam[i], lam[i] - lam[i - 1]
    linear, quadratic = np.expm1(-h) + h, 0.5 * h * h - h - np.expm1(-h)
    slope = (D - H(1)) / h1
    if order == 2:
        return linear * slope
    h2 = lam[i - 1] - lam[i - 2]
    before = (H(1) - H(2)) / h2
    curvature = 2.0 * (slope - before) / (h1 + h2)
    return linear * (slope + 0.5 * h1 * curvature) + quadratic * curvature


@register("sampler", "dbim", family="bridge", paper="2405.15885", order=1, min_steps=2)
def dbim(
    process,
    num_steps: int | None = None,
    *,
    eta: float = 0.0,
    order: int = 1,
    lower_order_final: bool = True,
    booting: str = "draw",
    grid=None,
    t_start=None,
    t_end=None,
) -> Sampler:
    """DBIM of order 1, 2 or 3; `x_init` is the source.

    Equivalences: eta = 1 is the posterior sampler of I2SB and the first-order SDE step of Bridge-TTS
    (the source drops out); eta = 0 is the first-order step of the bridge's probability-flow ODE, of
    CDBM and of Bridge-TTS.

    Args:
      process: a bridge process; eta > 0 needs that of an SDE. The boot supposes lam = -inf at the
        source: an interpolant whose c vanishes there as fast as b (every gamma but "brownian") loses
        some of its variance to it; `bridge_euler` with kappa > 0 keeps it.
      num_steps: network calls, default 20, at least `order + 1`: one at the source, then one on each
        grid point but the last.
      eta: 0 (deterministic after the boot) to 1 (Markovian); 0 for orders 2 and 3.
      order: 1, 2 or 3. 2 and 3 help most at few calls; on the default grid, whose ends are large
        steps of lam, 3 is not better than 2.
      lower_order_final: make the last step one of order 1. On the default grid it must be.
      booting: "draw" the noise of the boot, the latent variable of the deterministic sampler, or take
        it as "given": x_init is `Pinned(source, noise)`, and eta = 0 then draws nothing.
      grid, t_start, t_end: times `[num_steps]` from just below t = 1 (1e-3 of the paper's clock) to
        t_min; see `time_grids.build_times`, with `num_steps - 1` intervals.
    Raises:
      ValueError: eta outside [0, 1], or above 0 where the order is above 1 or the bridge is not that
        of an SDE; an unknown order or booting; too few calls for the order; not a bridge; a bridge
        without noise; two times on one entry of I2SB's table, or another bad grid; when sampling, an
        x_init that does not fit `booting`.
    """
    check_bridge(process)
    check_choice("order", order, (1, 2, 3))
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta must lie in [0, 1], got {eta}")
    if eta > 0:
        check_sde_bridge(process, f"eta = {eta}")
        if order > 1:
            raise ValueError(f"orders 2 and 3 are deterministic: eta must be 0, got {eta}")
    name = "dbim" if order == 1 else f"dbim_{order}"
    least = f"dbim of order {order}"
    check_calls(least, num_steps, order + 1)
    start = process.t_max - BOOT_GAP / process.clock_scale if t_start is None else t_start
    intervals = None if num_steps is None else num_steps - 1
    times = build_times(process, intervals, grid, start, t_end, default_steps=19)
    check_calls(least, len(times), order + 1)
    points = [process.point(t) for t in times]
    check_noise(process, points[:-1])
    check_entries(process, times)
    with np.errstate(divide="ignore"):
        lam = np.asarray(process.lam(times))
    rows = booted(process, points[0], booting)
    last = len(points) - 2
    for i, (here, there) in enumerate(itertools.pairwise(points)):
        reached = 1 if lower_order_final and i == last else min(order, i + 1)
        while reached > 1 and not np.isfinite(lam[i + 1 - reached : i + 2]).all():
            reached -= 1
        w = 0.0
        if eta > 0:
            rho2, rho2_next = process.rho2(here["t"]), process.rho2(there["t"])
            w = eta * process.alpha(there["t"]) * np.sqrt(rho2_next * (1.0 - rho2_next / rho2))
        y = first_order(here, there, w)
        if reached > 1:
            y = y + there["b"] * _bend(lam, i, reached)
        rows.add(here, y + (0.0 if i == last else w) * Z, push=D)
    declared = order if eta == 0 else None
    return expecting(rows.sampler(points[-1], order=declared, name=name), booting)


def _named(name, order):
    """Registers `dbim` of a higher order under a name of its own."""

    def make(process, num_steps=None, **options):
        return dbim(process, num_steps, **{"order": order, **options})

    make.__name__ = make.__qualname__ = name
    make.__doc__ = f"`dbim` with order={order}."
    meta = {"paper": "2405.15885", "order": order, "min_steps": order + 1}
    register("sampler", name, family="bridge", **meta)(make)


_named("dbim_2", 2)
_named("dbim_3", 3)
