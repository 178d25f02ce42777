"""The probability-flow ODE by adaptive solvers: sampling, encoding, exact likelihood (arXiv 2011.13456).

Every Gaussian process is the same ODE in the angle of its schedule. With r = sqrt(alpha^2 + sigma^2),
  (1) z = x / r, theta = atan(sigma / alpha), so that z_theta = cos(theta) x0 + sin(theta) eps
  (2) dz / dtheta = (cos(theta) z - x0_hat(r z)) / sin(theta)
  (3) log p(x_s) = log p(x_t) + D log(r_t / r_s) + int_s^t div_z (dz / dtheta) dtheta
  (4) div f = E[probe . (df/dz) probe] for probes with unit covariance (Hutchinson), or the trace itself.
The angle stays finite where sigma / alpha does not (rectified flow at t = 1) and z keeps the size of the
data whatever sigma is (EDM, VE), so one pair of tolerances serves all schedules.

The field at sigma = 0 is 0 / 0. When an end of the interval is there (EDM and rectified flow at t = 0),
the noise prediction of `process.t_min` is used below `process.t_min`: the map stays invertible, and for a
network that is where its training ended.

Step sizes (`control`): "example" gives each example its own, so that its result depends on itself alone.
All are advanced together, each network call at times `[B]`, until the slowest is done. "batch" takes one
step size for all (the largest error of an example decides) and calls with a scalar time: for denoisers
that take no others, and for reverse-mode derivatives, which diffrax does not take through the batching
rule of the other; results then depend on the batch, within the tolerance.

Deviations from the released code of arXiv 2011.13456: theta is the variable of integration instead of t;
its solver measures the error over the whole batch; its bits per dimension are in `evaluation.likelihood`.
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
    batch_size,
    example_keys,
    expand,
    fold_all,
    join_traced,
    namespace,
    split_traced,
    sum_per_example,
)
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.registry import closest, names
from diffusion_jax.samplers.scan import check_key

SOLVERS = {
    "bosh3": "Bosh3",
    "dopri5": "Dopri5",
    "dopri8": "Dopri8",
    "heun": "Heun",
    "tsit5": "Tsit5",
}
DIVERGENCES = ("exact", "hutchinson")
NOISES = ("gaussian", "rademacher")
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


class _Options(NamedTuple):
    """What is structure in a compiled program."""

    solver: str
    max_steps: int
    control: str
    divergence: str | None


def _check_choice(name: str, value: Any, valid) -> None:
    if value not in valid:
        raise ValueError(f"unknown {name} {value!r}{closest(value, valid)}")


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
    _check_choice("solver", solver, SOLVERS)
    _check_choice("control", control, CONTROLS)
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


def _diffrax():
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("adaptive ODE solvers need diffrax: pip install diffrax") from error
    return diffrax


def _is_number(*values) -> bool:
    return not any(isinstance(v, jax.core.Tracer) for v in values)


def _angle(process, t):
    """theta(t) and r(t); float64 NumPy unless traced."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    xp = namespace(alpha, sigma)
    return xp.arctan2(sigma, alpha), xp.hypot(alpha, sigma)


class _Path(NamedTuple):
    """The ends of an integration: angles, radii, and the angle below which the field is frozen."""

    begin: Any
    end: Any
    r_begin: Any
    r_end: Any
    floor: Any
    t_low: Any
    t_high: Any


def _path(process, t_from, t_to) -> _Path:
    for name, t in (("t_from", t_from), ("t_to", t_to)):
        if _is_number(t) and not 0.0 <= t <= 1.0:
            raise ValueError(f"{name} must lie in [0, 1], got {t}")
    (begin, r_begin), (end, r_end) = _angle(process, t_from), _angle(process, t_to)
    xp = namespace(begin, end)
    low = xp.minimum(begin, end)
    floor = xp.where(low > 0.0, low, _angle(process, process.t_min)[0])
    earliest = xp.minimum(xp.asarray(t_from), xp.asarray(t_to))
    t_low = xp.where(low > 0.0, earliest, process.t_min)
    t_high = xp.maximum(xp.asarray(t_from), xp.asarray(t_to))
    return _Path(begin, end, r_begin, r_end, floor, t_low, t_high)


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
    """Velocity and mean over P probes `[B, P, ...]` of (4)."""
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


def _run(process, denoise, options, path, x, probe, rtol, atol):
    """`_flow`, compiled once for a structure; refuses a failed solution where it can be seen."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    state = x.astype(dtype)
    path = _Path(*(jnp.asarray(v, dtype) for v in path))
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
    if _is_number(info.success) and not bool(info.success.all()):
        failed = int((~info.success).sum())
        raise ValueError(
            f"the ODE solver gave up on {failed} of {len(info.success)} examples: more than max_steps ="
            f" {options.max_steps} steps, or the denoiser is not finite; raise max_steps or rtol and atol"
        )
    return end.astype(x.dtype), gain, info


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
    options = _Options(solver, max_steps, control, None)
    path = _path(process, t_from, t_to)
    end, _, info = _run(process, denoise, options, path, x, None, rtol, atol)
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
    _check_choice("noise", noise, NOISES)
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
    """Exact log density of data under the probability-flow ODE, by the change of variables (3).

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
    _check_choice("divergence", divergence, DIVERGENCES)
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
    if _is_number(t_from, t_to) and not t_from < t_to:
        raise ValueError(f"need t_from < t_to, got t_from = {t_from}, t_to = {t_to}")
    options = _Options(solver, max_steps, control, divergence)
    path = _path(process, t_from, t_to)
    latent, gain, info = _run(process, denoise, options, path, x.astype(dtype), probe, rtol, atol)
    prior = (
        normal_log_prob(latent, process.prior_std)
        if prior_log_prob is None
        else prior_log_prob(latent)
    )
    return prior + gain, latent, info
