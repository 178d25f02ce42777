"""Score models: a denoiser of a Gaussian process, class-conditional or not."""

from collections.abc import Mapping
from typing import Any

import jax

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
    label_dropout: float = 0.1,
    guidance: float = 1.0,
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
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight in sampling; other than 1 doubles the network calls.
      clip: clip x0_hat to [-1, 1] in sampling (images); `denoiser(..., raw=True)` does not, for what
        needs derivatives (likelihood) or the law of the network's own output.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: another kind of process, and unknown names.
    """
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"a score model needs a Gaussian process, got {type(process).__name__}")
    net = Network.of(module, spec, label_dropout)
    if weighting == "edm":
        weighting_options = {"sigma_data": sigma_data, **(weighting_options or {})}
    weight = objectives.weightings.build_weighting(weighting, **(weighting_options or {}))
    draw_times = objectives.times.build_times(times, **(times_options or {}))

    def init(key, batch):
        return net.init(key, batch[spec.kind], batch)

    def plain(params, batch, train=False, key=None):
        bound = net.bind(params, batch, train, key)
        return Denoiser(bound, process, parameterization, sigma_data)

    def loss(params, key, batch, context):
        denoise = plain(params, batch, context.train, key)
        losses, aux = objectives.denoising(
            process,
            denoise,
            jax.random.fold_in(key, OBJECTIVE),
            batch[spec.kind],
            weighting=weight,
            times=draw_times,
            index=batch["index"],
            total=context.batch_size,
        )
        return losses.mean(), {"x0_mse": aux["x0_error"].mean()}

    denoiser = sampling_denoiser(plain, clip=clip, net=net, guidance=guidance)
    start = prior_start(process, spec)
    return assemble(process, init, loss, denoiser, start, sampler, nfe, sampler_options)
