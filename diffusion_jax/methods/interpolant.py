"""Stochastic interpolants: a velocity, and a denoiser that makes every diffusion available after training."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import objectives
from diffusion_jax.fields import InterpolantField, split_heads
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble, sampling_denoiser
from diffusion_jax.numerics import example_keys, normal_per_example
from diffusion_jax.objectives.interpolant import check_targets
from diffusion_jax.processes import BridgeProcess
from diffusion_jax.registry import check_choice, register

COUPLINGS = ("data", "noise")


@register("method", "interpolant", family="bridge", paper="2303.08797")
def interpolant(
    process,
    module,
    spec,
    *,
    coupling: str | None = None,
    targets: Sequence[str] | None = None,
    weights: Mapping[str, float] | None = None,
    antithetic: bool = True,
    times: str = "uniform",
    times_options: Mapping[str, Any] | None = None,
    label_dropout: float = 0.0,
    guidance: float = 1.0,
    sampler: str = "interpolant_heun",
    nfe: int | None = 50,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Stochastic interpolants (arXiv 2303.08797) between data and a source that the network is not told.

    One network has a head for each target. Sampling starts from a draw of the source and follows the ODE,
    or an SDE of any epsilon: `interpolant_euler` and `interpolant_heun` take it as an option. (A network
    that is told the source is the method "bridge".)

    Args:
      process: an interpolant, or any bridge process. With gamma "none" and coupling "noise" it is one-sided:
        flow matching (`RectifiedFlow` where linear), and the score follows from the velocity.
      module: network `(x, t, label=) -> output` of the shape of x; its output channels are multiplied by
        the number of targets.
      spec: the data's `DataSpec`; labels are used where it has classes and the network takes them.
      coupling: "noise", the source is a standard normal drawn for each example, or "data", the source is
        `batch["source"]`; default "data" where there is one.
      targets: of `fields.PARTS`; default a velocity and a denoiser, or the velocity alone where c = 0. The
        velocity alone allows the ODE only, but for one-sided interpolants.
      weights: factors of the targets' losses, default 1.
      antithetic, times, times_options: of `objectives.interpolant_losses`.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on the drift; other than 1 doubles the network calls.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: another kind of process, no source for the coupling, sources of another shape than the
        data, a network whose channels do not fit, a sampler that does not integrate a drift, and
        unknown names.
    """
    if not isinstance(process, BridgeProcess):
        raise ValueError(
            f"an interpolant needs an interpolant or bridge process, got {type(process).__name__}"
        )
    coupling = coupling or ("data" if "source" in spec.elements else "noise")
    check_choice("coupling", coupling, COUPLINGS)
    if coupling == "data":
        if "source" not in spec.elements:
            raise ValueError(
                f"coupling 'data' needs pairs: the data has {', '.join(sorted(spec.elements))} but no "
                "'source'"
            )
        if spec.elements["source"].shape != spec.shape:
            raise ValueError(
                f"data and source differ in shape: {spec.shape} and {spec.elements['source'].shape}"
            )
    quiet = bool(process.c(0.5) == 0)
    if targets is None:
        targets = ("velocity",) if quiet else ("velocity", "denoiser")
    targets = check_targets(process, targets)
    weights = dict(weights or {})
    for name in weights:
        check_choice("a weight's target", name, targets)
    one_sided = quiet and coupling == "noise"
    module = _with_heads(module, spec.shape[-1], targets)
    net = Network.of(module, spec, label_dropout)
    draw_times = objectives.times.build_times(times, **(times_options or {}))

    def init(key, batch):
        return net.init(key, batch[spec.kind], batch)

    def source(key, batch):
        if coupling == "data":
            return batch["source"]
        index = batch["index"]
        like = jnp.zeros((index.shape[0], *spec.shape), jnp.float32)
        return normal_per_example(example_keys(key, index), like)

    def field(params, batch, train=False, key=None):
        heads = split_heads(net.bind(params, batch, train, key), targets)
        return InterpolantField(process, joint=heads, one_sided=one_sided)

    def loss(params, key, batch, context):
        source_key, loss_key = jax.random.split(jax.random.fold_in(key, OBJECTIVE))
        losses, _ = objectives.interpolant_losses(
            process,
            field(params, batch, context.train, key).joint,
            loss_key,
            batch[spec.kind],
            source(source_key, batch),
            targets=targets,
            antithetic=antithetic,
            times=draw_times,
            index=batch["index"],
            total=context.batch_size,
        )
        means = {name: value.mean() for name, value in losses.items()}
        total = sum(weights.get(name, 1.0) * value for name, value in means.items())
        return total, {f"{name}_loss": value for name, value in means.items()}

    return assemble(
        process,
        init,
        loss,
        sampling_denoiser(field, clip=False, net=net, guidance=guidance),
        source,
        sampler,
        nfe,
        dict(sampler_options or {}),
        output="drift",
    )


def _with_heads(module, channels, targets):
    """The network with a head for each target, and without a source among its inputs."""
    wanted = channels * len(targets)
    names = [n for n in ("out_channels", "out_features") if hasattr(module, n)]
    if not names and len(targets) > 1:
        raise ValueError(
            f"{type(module).__name__} has no out_channels: it cannot have heads for {', '.join(targets)}"
        )
    for name in names:
        given = getattr(module, name)
        if given not in (None, wanted):
            raise ValueError(
                f"network.{name} = {given}: {', '.join(targets)} of {channels} channels need {wanted}"
            )
        module = module.clone(**{name: wanted})
    return module.clone(source_channels=0) if getattr(module, "source_channels", 0) else module
