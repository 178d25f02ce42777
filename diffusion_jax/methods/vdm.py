"""Variational diffusion models (VDM, arXiv 2107.00630): likelihood as the loss, log-SNR fixed or learned.

The network is told the noise level, not the time: `eps_hat = x + F(x, s)`, where s is the time at
which the *fixed* linear schedule between the configured ends has the log-SNR of x. A learned gamma
decides at which noise levels the loss looks, and nothing else: the model it trains is a denoiser for
every schedule between the ends. So the samplers of a `LinearLogSNR` are exact for it, and their
tables stay host constants although the schedule is a parameter. A learned end that has moved inside
the configured one ends what the network knows: beyond it, s is held at its last trained value.

Deviations from the official code: the configured ends are kept exactly unless `ends` says otherwise;
labels and guidance; x is rounded to its level by the nearest one (the same as its decoder's argmax).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.methods.base import (
    OBJECTIVE,
    Method,
    Network,
    assemble,
    prior_start,
    sampling_denoiser,
)
from diffusion_jax.numerics import expand, pytree_dataclass, static
from diffusion_jax.objectives.variational import (
    bits_per_dim,
    level_values,
    nearest_level,
    variational_draws,
    variational_terms,
)
from diffusion_jax.processes import LinearLogSNR
from diffusion_jax.registry import check_choice, register

SCHEDULES = ("fixed", "scalar", "monotone")
SCHEDULE_LOSSES = ("bound", "variance")
_ENDS = ("first_gamma", "last_gamma")


@pytree_dataclass
class LogSNRDenoiser:
    """A network that is told the log-SNR, as a denoiser for any variance-preserving point.

    Args:
      network: `(features of x, s [B]) -> eps_hat - x`.
      process: `LinearLogSNR`, the clock s.
      features: `(x) -> network input`.
      low, high: bounds on s.
    """

    network: Any
    process: Any
    low: Any
    high: Any
    features: Callable = static()

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def at(self, x, point):
        """x0_hat `[B, ...]` at a `Point`."""
        alpha, sigma = (
            jnp.asarray(point[n], jnp.promote_types(x.dtype, jnp.float32))
            for n in ("alpha", "sigma")
        )
        s = self.process.t_of_lam(jnp.log(alpha) - jnp.log(sigma))
        s = jnp.broadcast_to(jnp.clip(s, self.low, self.high), x.shape[:1])
        eps_hat = x + self.network(self.features(x), s)
        return (x - expand(sigma, x) * eps_hat) / expand(alpha, x)


def build_log_snr(process: LinearLogSNR, schedule: str, **options: Any):
    """The Linen module of a learned schedule that starts as `process`, or None for "fixed".

    Args:
      process: gives the ends.
      schedule: "fixed", "scalar" or "monotone".
      options: further arguments of `networks.log_snr.MonotoneLogSNR`.
    Raises:
      ValueError: unknown schedule, or options it does not have.
    """
    from diffusion_jax.networks import log_snr  # imports flax

    modules = {"fixed": None, "scalar": log_snr.ScalarLogSNR, "monotone": log_snr.MonotoneLogSNR}
    check_choice("schedule", schedule, SCHEDULES)
    if options and schedule != "monotone":
        raise ValueError(f"schedule {schedule!r} takes no options, got {sorted(options)}")
    if modules[schedule] is None:
        return None
    try:
        return modules[schedule](process.gamma_min, process.gamma_max, **options)
    except TypeError as error:
        raise ValueError(f"schedule {schedule!r}: {error}") from error


def bind_log_snr(process: LinearLogSNR, module, params) -> Callable:
    """`t -> gamma(t)` for a method's parameters: the learned one where there is a module."""
    if module is None:
        return process.gamma
    return lambda t: module.apply({"params": params["log_snr"]}, t)


@register("method", "vdm", family="gaussian", paper="2107.00630")
def vdm(
    process,
    module,
    spec,
    *,
    levels: int = 256,
    steps: int = 0,
    schedule: str = "fixed",
    schedule_options: Mapping[str, Any] | None = None,
    schedule_loss: str = "bound",
    fourier: Sequence[int] = (),
    label_dropout: float = 0.0,
    guidance: float = 1.0,
    clip: bool = False,
    round_samples: bool = True,
    sampler: str = "ddpm",
    nfe: int | None = 1000,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """VDM on images (arXiv 2107.00630). The loss is in bits per dimension; `bound` gives nats.

    Parameters are those of the network; with a learned schedule {"network": ..., "log_snr": ...}.

    Args:
      process: `LinearLogSNR`: the fixed schedule, or where a learned one starts.
      module: network `(x, t, label=) -> output` of the shape of x; with `fourier`, its `out_channels`
        must be the channels of the data.
      spec: the data's `DataSpec`; labels are used where it has classes and the network takes them.
      levels: number of values a pixel takes, evenly on [-1, 1].
      steps: T of the discrete-time bound; 0 for continuous time.
      schedule: "fixed", "scalar" or "monotone", see `networks.log_snr`.
      schedule_options: of `networks.log_snr.MonotoneLogSNR`: `features`, `ends`,
        `hidden_scale`.
      schedule_loss: what a learned gamma minimises: "bound", like everything else (the official code),
        or "variance": between its ends, the second moment of the diffusion term (the paper's app.
        I.2), at the cost of a second network call.
      fourier: exponents of the sines and cosines of x that the network sees beside x; 6, 7 for 256
        levels (`networks.features.value_features`).
      label_dropout, guidance: of classifier-free guidance; the bound is that of the unguided model.
      clip: clip x0_hat to [-1, 1] in sampling.
      round_samples: return the nearest levels.
      sampler, nfe, sampler_options: the default sampler; "ddpm" is the paper's.
    Raises:
      ValueError: another process or kind of data, unknown names, a module whose output would not
        have the shape of the data.
    """
    if not isinstance(process, LinearLogSNR):
        raise ValueError(f"vdm needs the process linear_log_snr, got {type(process).__name__}")
    if spec.kind == "tokens":
        raise ValueError("vdm needs data of kind 'image' or 'points', got 'tokens'")
    check_choice("schedule_loss", schedule_loss, SCHEDULE_LOSSES)
    channels = spec.shape[-1]
    if fourier and getattr(module, "out_channels", channels) != channels:
        raise ValueError(
            f"fourier features need a network with out_channels = {channels}, "
            f"got {module.out_channels}"
        )
    from diffusion_jax.networks.features import value_features  # imports flax

    levels = tuple(level_values(levels))
    options = dict(schedule_options or {})
    gamma_module = build_log_snr(process, schedule, **options)
    moving = schedule == "scalar" or options.get("ends", "fixed") != "fixed"
    by_variance = schedule_loss == "variance"
    if by_variance and (schedule != "monotone" or options.get("ends", "fixed") == "free"):
        raise ValueError(
            "schedule_loss 'variance' needs schedule 'monotone' with ends 'fixed' or 'learned'"
        )
    net = Network.of(module, spec, label_dropout)
    exponents = tuple(fourier)
    features = functools.partial(value_features, exponents=exponents)

    def init(key, batch):
        net_key, gamma_key = jax.random.split(key)
        network = net.init(net_key, features(batch[spec.kind]), batch)
        if gamma_module is None:
            return network
        return {"network": network, "log_snr": gamma_module.init(gamma_key, jnp.zeros(1))["params"]}

    def plain(params, batch, train=False, key=None):
        own = params if gamma_module is None else params["network"]
        network = net.bind(own, batch, train, key)
        low, high = 0.0, 1.0
        if moving:
            gamma = bind_log_snr(process, gamma_module, params)
            low, high = process.t_of_gamma(gamma(jnp.array([0.0, 1.0])))
        return LogSNRDenoiser(network, process, low, high, features)

    def terms(params, batch, draws, train=False, key=None):
        gamma = bind_log_snr(process, gamma_module, params)
        denoise = plain(params, batch, train, key)
        x0 = batch[spec.kind]
        return variational_terms(gamma, denoise, x0, *draws, levels=levels, steps=steps)

    def loss(params, key, batch, context):
        x0 = batch[spec.kind]
        total = context.batch_size or x0.shape[0]
        draws = variational_draws(jax.random.fold_in(key, OBJECTIVE), x0, batch["index"], total)
        ends, shape = split_schedule(params) if by_variance else (params, None)
        found = terms(ends, batch, draws, context.train, key)
        bits = jax.tree.map(lambda v: bits_per_dim(v, spec.shape).mean(), found)
        value = bits.total
        if by_variance:
            own = terms(shape, batch, draws, context.train, key).diffusion
            second_moment = jnp.square(bits_per_dim(own, spec.shape)).mean()
            value = value + second_moment - jax.lax.stop_gradient(second_moment)
        metrics = {f"bits_{name}": v for name, v in bits._asdict().items()}
        if moving:
            gamma = bind_log_snr(process, gamma_module, params)
            metrics |= dict(zip(_ENDS, gamma(jnp.array([0.0, 1.0]))))
        return value, metrics

    def bound(params, key, batch):
        x0 = batch[spec.kind]
        draws = variational_draws(key, x0, batch["index"], x0.shape[0])
        return terms(params, batch, draws).total

    denoiser = sampling_denoiser(plain, clip=clip, net=net, guidance=guidance)
    start = prior_start(process, spec)
    made = assemble(process, init, loss, denoiser, start, sampler, nfe, sampler_options)

    def sample(params, key, batch, sampler=None, **options):
        drawn = made.sample(params, key, batch, sampler, **options)
        if not round_samples:
            return drawn
        if options.get("trajectory"):
            return nearest_level(drawn[0], levels), drawn[1]
        return nearest_level(drawn, levels)

    return made._replace(sample=sample, bound=bound)


def split_schedule(params):
    """The parameters twice: with gamma's interior held, and with everything but that held."""
    stop = jax.lax.stop_gradient
    gamma = params["log_snr"]
    ends = {k: v if k in _ENDS else stop(v) for k, v in gamma.items()}
    shape = {k: stop(v) if k in _ENDS else v for k, v in gamma.items()}
    held = jax.tree.map(stop, params["network"])
    return params | {"log_snr": ends}, {"network": held, "log_snr": shape}
