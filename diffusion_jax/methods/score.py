"""Score models: a denoiser of a Gaussian process, class-conditional or not."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import objectives
from diffusion_jax.denoisers import Denoiser
from diffusion_jax.methods.base import (
    OBJECTIVE,
    Method,
    Network,
    assemble,
    prior_start,
    sampling_denoiser,
)
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.registry import register


@register("method", "score", family="gaussian")
def score(
    process,
    module,
    spec,
    *,
    parameterization: str = "edm",
    weighting: str = "edm",
    weighting_options: Mapping[str, Any] | None = None,
    times: str = "uniform",
    times_options: Mapping[str, Any] | None = None,
    sigma_data: float = 0.5,
    uncertainty: bool = False,
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    guided_channels: int | None = None,
    learned_variance: bool = False,
    clip: bool = True,
    sampler: str = "dpmpp_2m",
    nfe: int | None = 20,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Denoising score matching on images or points (arXiv 2011.13456, 2206.00364).

    Args:
      process: a Gaussian process.
      module: network `(x, t, label=) -> output` of the shape of x.
      spec: the data's `DataSpec`; labels are used where it has classes and the network takes them.
      parameterization: what the network's output means, see `denoisers.Denoiser`.
      weighting, weighting_options, times, times_options: of `objectives.denoising`.
      sigma_data: standard deviation of the data ("edm" parameterization and weighting).
      uncertainty: divide the loss w |x0_hat - x0|^2 by its scale at each noise level, exp(u), and add u,
        which the network learns beside (arXiv 2312.02696, eq. 14 and 21). The network has a method
        `log_variance` of what it is told in place of t, [B] -> [B].
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight in sampling; other than 1 doubles the network calls.
      guided_channels: guide the first so many channels of x alone (DiT); None: all.
      learned_variance: the network has as many channels again for the variance of the reverse steps (ADM,
        DiT); the loss is `objectives.learned_variance_denoising`, and sampler "ddpm" with
        `variance="learned"` draws by it, others leave it aside.
      clip: clip x0_hat to [-1, 1] in sampling (images); `denoiser(..., raw=True)` does not, for what
        needs derivatives (likelihood) or the law of the network's own output.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: another kind of process, unknown names, an output of the wrong shape, an uncertainty that
        the network has not.
    """
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"a score model needs a Gaussian process, got {type(process).__name__}")
    if uncertainty and not hasattr(module, "log_variance"):
        raise ValueError(f"{type(module).__name__} has no log_variance for uncertainty=True")
    net = Network.of(module, spec, label_dropout)
    if weighting == "edm":
        weighting_options = {"sigma_data": sigma_data, **(weighting_options or {})}
    weight = objectives.weightings.build_weighting(weighting, **(weighting_options or {}))
    draw_times = objectives.times.build_times(times, **(times_options or {}))

    def init(key, batch):
        return net.init(key, batch[spec.kind], batch)

    def plain(params, batch, train=False, key=None):
        bound = net.bind(params, batch, train, key)
        return Denoiser(
            bound, process, parameterization, sigma_data, learned_variance=learned_variance
        )

    def loss(params, key, batch, context):
        denoise = plain(params, batch, context.train, key)
        objective = objectives.denoising
        if learned_variance:
            objective = objectives.learned_variance_denoising
        weighted, aux = objective(
            process,
            denoise,
            jax.random.fold_in(key, OBJECTIVE),
            batch[spec.kind],
            weighting=weight,
            times=draw_times,
            index=batch["index"],
            total=context.batch_size,
        )
        metrics = {"x0_mse": aux["x0_error"].mean()}
        if learned_variance:
            metrics["vlb"] = aux["vlb"].mean()
        if not uncertainty:
            return weighted.mean(), metrics
        told = aux["t"]
        if parameterization == "edm":
            told = denoise.preconditioning(process.point(told)).c_noise
        u = module.apply({"params": params}, told, method="log_variance")
        metrics |= {"weighted_mse": weighted.mean(), "log_variance": u.mean()}
        return (weighted * jnp.exp(-u) + u).mean(), metrics

    denoiser = sampling_denoiser(
        plain, clip=clip, net=net, guidance=guidance, guided_channels=guided_channels
    )
    start = prior_start(process, spec)
    made = assemble(process, init, loss, denoiser, start, sampler, nfe, sampler_options)
    return made._replace(project=getattr(module, "project", None))
