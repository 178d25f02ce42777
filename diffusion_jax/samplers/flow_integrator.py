"""The probability-flow ODE in the angle of its schedule, its divergence, and the adaptive integrator.

Every Gaussian process is the same ODE in that angle. With r = sqrt(alpha^2 + sigma^2),
  (1) z = x / r, theta = atan(sigma / alpha), so that z_theta = cos(theta) x0 + sin(theta) eps
  (2) dz / dtheta = (cos(theta) z - x0_hat(r z)) / sin(theta)
  (3) div f = E[probe . (df/dz) probe] for probes with unit covariance (Hutchinson), or the trace itself.
The angle stays finite where sigma / alpha does not (rectified flow at t = 1) and z keeps the size of the
data whatever sigma is (EDM, VE), so one pair of tolerances serves all schedules.

The field at sigma = 0 is 0 / 0. When an end of the interval is there (EDM and rectified flow at t = 0),
the noise prediction of `process.t_min` is used below `process.t_min`: the map stays invertible, and for a
network that is where its training ended.

The solvers are diffrax's, imported on first use.
"""

import math
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import (
    expand,
    join_traced,
    namespace,
    split_traced,
    sum_per_example,
)

SOLVERS = {
    "bosh3": "Bosh3",
    "dopri5": "Dopri5",
    "dopri8": "Dopri8",
    "heun": "Heun",
    "tsit5": "Tsit5",
}
DIVERGENCES = ("exact", "hutchinson")
CONTROLS = ("batch", "example")


class FlowInfo(NamedTuple):
    """What a solution cost.

    Attributes:
      nfe: int32 scalar, calls of the network on the whole batch.
      nfe_each: int32 `[B]`, calls that an example needed by itself.
      accepted, rejected: int32 `[B]`, steps.
      success: bool `[B]`; where False the solver gave up and the result is not finite.
    """

    nfe: Any
    nfe_each: Any
    accepted: Any
    rejected: Any
    success: Any


class FlowOptions(NamedTuple):
    """What is structure in a compiled program."""

    solver: str
    max_steps: int
    control: str
    divergence: str | None


def _diffrax():
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("adaptive ODE solvers need diffrax: pip install diffrax") from error
    return diffrax


def is_known(*values) -> bool:
    """Whether no value is traced, so that it can be checked."""
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def _angle(process, t):
    """theta(t) and r(t); float64 NumPy unless traced."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    xp = namespace(alpha, sigma)
    return xp.arctan2(sigma, alpha), xp.hypot(alpha, sigma)


class FlowPath(NamedTuple):
    """The ends of an integration: angles, radii, and the angle below which the field is frozen."""

    begin: Any
    end: Any
    r_begin: Any
    r_end: Any
    floor: Any
    t_low: Any
    t_high: Any


def flow_path(process, t_from, t_to) -> FlowPath:
    """The path between two times. Raises ValueError for a known time outside [0, 1]."""
    for name, t in (("t_from", t_from), ("t_to", t_to)):
        if is_known(t) and not 0.0 <= t <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {t}")
    (begin, r_begin), (end, r_end) = _angle(process, t_from), _angle(process, t_to)
    xp = namespace(begin, end)
    low = xp.minimum(begin, end)
    floor = xp.where(low > 0.0, low, _angle(process, process.t_min)[0])
    earliest = xp.minimum(xp.asarray(t_from), xp.asarray(t_to))
    t_low = xp.where(low > 0.0, earliest, process.t_min)
    t_high = xp.maximum(xp.asarray(t_from), xp.asarray(t_to))
    return FlowPath(begin, end, r_begin, r_end, floor, t_low, t_high)


def _velocity(process, denoise, path, z, theta):
    """Right-hand side of (2): z `[B, ...]`, theta scalar or `[B]`."""
    theta = jnp.maximum(theta, path.floor.astype(theta.dtype))
    # float32 pi / 2 lies beyond pi / 2
    c, s = jnp.maximum(jnp.cos(theta), 0.0), jnp.sin(theta)
    t = process.t_of_lam(jnp.log(c) - jnp.log(s)).astype(theta.dtype)
    t = jnp.clip(t, path.t_low.astype(t.dtype), path.t_high.astype(t.dtype))
    point = process.point(t)
    r = jnp.hypot(point["alpha"], point["sigma"])
    point = {**point, "alpha": r * c, "sigma": r * s}
    x0_hat = evaluate(denoise, expand(r, z) * z, point)[0]
    if x0_hat.shape != z.shape:
        raise ValueError(f"denoise gave shape {x0_hat.shape} for x of shape {z.shape}")
    return (expand(c, z) * z - x0_hat.astype(z.dtype)) / expand(s, z)


def _exact_divergence(field, z):
    """Velocity and trace of its Jacobian, one tangent a dimension, 16 at a time."""
    velocity, push = jax.linearize(field, z)
    size = math.prod(z.shape[1:])

    def diagonal(i):
        unit = jax.nn.one_hot(i, size, dtype=z.dtype).reshape(1, *z.shape[1:])
        return sum_per_example(push(jnp.broadcast_to(unit, z.shape)) * unit)

    return velocity, jax.lax.map(diagonal, jnp.arange(size), batch_size=min(16, size)).sum(0)


def _hutchinson(field, z, probe):
    """Velocity and mean over P probes `[B, P, ...]` of (3)."""
    if probe.shape[1] == 1:
        velocity, moved = jax.jvp(field, (z,), (probe[:, 0],))
        return velocity, sum_per_example(moved * probe[:, 0])
    velocity, push = jax.linearize(field, z)
    each = jax.vmap(lambda v: sum_per_example(push(v) * v), in_axes=1)(probe)
    return velocity, each.mean(0)


def _rates(process, denoise, path, divergence, z, theta, probe):
    """dz/dtheta `[B, ...]` and its divergence a dimension `[B]` (zeros if none is asked for)."""

    def field(z):
        return _velocity(process, denoise, path, z, theta)

    if divergence is None:
        return field(z), jnp.zeros(z.shape[0], z.dtype)
    velocity, total = (
        _exact_divergence(field, z) if divergence == "exact" else _hutchinson(field, z, probe)
    )
    # per dimension: the tolerance is then one on bits per dimension, whatever their number
    return velocity, total / math.prod(z.shape[1:])


def _worst_rms(state):
    """The larger root mean square of the leaves of a state."""
    return jnp.stack([jnp.sqrt(jnp.mean(v**2)) for v in jax.tree.leaves(state)]).max()


def _worst_example(state):
    """`_worst_rms` of the worst example of a batch."""
    return jax.vmap(_worst_rms)(state).max()


def _counting(diffrax, controller):
    """The step size controller, which also counts attempts until a first step is accepted.

    A solver whose last stage is the first of the next step makes one more call until then.
    """

    class Counting(diffrax.AbstractAdaptiveStepSizeController):
        inner: Any
        rtol: Any
        atol: Any
        norm: Callable

        def wrap(self, direction):
            return Counting(self.inner.wrap(direction), self.rtol, self.atol, self.norm)

        def init(self, *args):
            step, state = self.inner.init(*args)
            return step, (state, jnp.array(True), jnp.array(0, jnp.int32))

        def adapt_step_size(self, *args):
            *rest, (state, waiting, count) = args
            keep, low, high, jumped, state, result = self.inner.adapt_step_size(*rest, state)
            count = count + waiting.astype(count.dtype)
            return keep, low, high, jumped, (state, waiting & ~keep, count), result

    return Counting(controller, controller.rtol, controller.atol, controller.norm)


def _integrate(rates, options, path, z, probe, rtol, atol):
    """Integrates (z, divergence a dimension) along the path: end, integral, attempts, first attempts, accepted, ok.

    `rates(z, theta, probe)` is batched; with control "example" a batching rule hands it all examples at
    once although each is solved by itself.
    """
    diffrax = _diffrax()
    solver = getattr(diffrax, SOLVERS[options.solver])()
    begin, end = path.begin.astype(z.dtype), path.end.astype(z.dtype)
    eps = float(jnp.finfo(z.dtype).eps)
    # the field changes over angles of the size of the angle itself
    span, scale = end - begin, jnp.maximum(begin, path.floor.astype(z.dtype))
    first_step = 0.2 * jnp.sign(span) * jnp.minimum(jnp.abs(span), scale)

    def solve(f, z, total, args, norm):
        controller = diffrax.PIDController(
            rtol=rtol, atol=atol, norm=norm, dtmin=2.0 * eps, force_dtmin=False
        )
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda theta, state, args: f(args, state[0], theta)),
            solver,
            begin,
            end,
            first_step,
            (z, total),
            args,
            saveat=diffrax.SaveAt(t1=True, controller_state=True),
            stepsize_controller=_counting(diffrax, controller),
            max_steps=options.max_steps,
            throw=False,
        )
        end_z, end_total = jax.tree.map(lambda v: v[-1], solution.ys)
        first = solution.controller_state[2]
        ok = solution.result == diffrax.RESULTS.successful
        stats = solution.stats
        return end_z, end_total, stats["num_steps"], first, stats["num_accepted_steps"], ok

    size = z.shape[0]
    if options.control == "batch":
        end_z, total, *counts = solve(
            lambda probe, z, theta: rates(z, theta, probe),
            z,
            jnp.zeros(size, z.dtype),
            probe,
            _worst_example,
        )
        return end_z, total, *(jnp.broadcast_to(c, (size,)) for c in counts)

    import equinox

    # what the network closes over becomes explicit: nothing traced may hide in the batching rule
    converted = equinox.filter_closure_convert(rates, z, jnp.full(size, begin), probe)
    arrays, static = equinox.partition(converted, equinox.is_array)

    @jax.custom_batching.custom_vmap
    def one(arrays, z, theta, probe):
        # only its shapes are read: every call is batched
        return jnp.full_like(z, jnp.nan), jnp.full((), jnp.nan, z.dtype)

    @one.def_vmap
    def _(axis_size, in_batched, arrays, z, theta, probe):
        def whole(values, batched):
            return jax.tree.map(
                lambda v, b: v if b else jnp.broadcast_to(v, (axis_size, *v.shape)), values, batched
            )

        z, theta, probe = (
            whole(v, b) for v, b in zip((z, theta, probe), in_batched[1:], strict=True)
        )
        return equinox.combine(arrays, static)(z, theta, probe), (True, True)

    def solve_one(z, probe):
        def f(args, z, theta):
            return one(args[0], z, theta, args[1])

        return solve(f, z, jnp.zeros((), z.dtype), (arrays, probe), _worst_rms)

    return jax.vmap(solve_one)(z, probe)


def _flow(model, options, path, x, probe, rtol, atol):
    """End x, D log(r_end / r_begin) + integral of the divergence, and the cost."""
    process, denoise = model
    z = x / path.r_begin.astype(x.dtype)

    def rates(z, theta, probe):
        return _rates(process, denoise, path, options.divergence, z, theta, probe)

    z, total, steps, first, accepted, ok = _integrate(rates, options, path, z, probe, rtol, atol)
    dimensions = math.prod(x.shape[1:])
    growth = dimensions * (jnp.log(path.r_end) - jnp.log(path.r_begin)).astype(x.dtype)
    tableau = getattr(_diffrax(), SOLVERS[options.solver]).tableau
    # the last stage of an accepted step is the first of the next one
    later = (tableau.num_stages - tableau.fsal) * steps
    first = first * int(tableau.fsal)
    info = FlowInfo(later.max() + first.max(), later + first, accepted, steps - accepted, ok)
    return z * path.r_end.astype(x.dtype), dimensions * total + growth, info


_flow_static = jax.jit(
    lambda arrays, static, options, *rest: _flow(join_traced(arrays, static), options, *rest),
    static_argnums=(1, 2),
)
# weak for the same reason as in `samplers.scan`: a program goes when its denoiser goes
_flow_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def integrate_flow(process, denoise, options, path, x, probe, rtol, atol):
    """Carries x along a path; compiled once for a structure.

    Args:
      process, denoise: the ODE's.
      options, path: `FlowOptions`, `FlowPath`.
      x: `[B, ...]` at the path's beginning; computed in float32 or better.
      probe: `[B, P, ...]` for the Hutchinson divergence, else None.
      rtol, atol: tolerances.
    Returns:
      x at the end, D log(r_end / r_begin) + the integral of the divergence `[B]`, `FlowInfo`.
    Raises:
      ValueError: the solver gave up (outside `jit`).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = x.astype(dtype)
    path = FlowPath(*(jnp.asarray(v, dtype) for v in path))
    rest = (path, state, probe, jnp.asarray(rtol, dtype), jnp.asarray(atol, dtype))
    if isinstance(denoise, types.FunctionType):
        if denoise not in _flow_of:
            reference = weakref.ref(denoise)
            _flow_of[denoise] = jax.jit(
                lambda arrays, static, options, *rest: _flow(
                    (join_traced(arrays, static), reference()), options, *rest
                ),
                static_argnums=(1, 2),
            )
        end, gain, info = _flow_of[denoise](*split_traced(process), options, *rest)
    else:
        end, gain, info = _flow_static(*split_traced((process, denoise)), options, *rest)
    if is_known(info.success) and not bool(info.success.all()):
        failed = int((~info.success).sum())
        raise ValueError(
            f"the ODE solver gave up on {failed} of {len(info.success)} examples: more than max_steps ="
            f" {options.max_steps} steps, or the denoiser is not finite; raise max_steps or rtol and atol"
        )
    return end.astype(x.dtype), gain, info
