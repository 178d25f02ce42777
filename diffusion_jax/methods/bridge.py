"""Bridge models: data restored from, or translated out of, a paired source (DDBM, DBIM)."""

from collections.abc import Mapping
from typing import Any

import jax

from diffusion_jax import guidance as transforms
from diffusion_jax import objectives
from diffusion_jax.denoisers import Denoiser
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble
from diffusion_jax.processes import BridgeProcess
from diffusion_jax.registry import register


@register("method", "bridge", family="bridge")
def bridge(
    process,
    module,
    spec,
    *,
    parameterization: str = "ddbm",
    times: str = "uniform",
    times_options: Mapping[str, Any] | None = None,
    sigma_data: float = 0.5,
    sigma_source: float = 0.5,
    covariance: float = 0.0,
    label_dropout: float = 0.0,
    clip: bool = True,
    sampler: str = "dbim",
    nfe: int | None = 20,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Denoising bridge matching (arXiv 2309.16948), sampled by DBIM (arXiv 2405.15885) or DDBM's Heun.

    Args:
      process: a bridge process.
      module: network `(x, t, source=, label=) -> output` of the shape of x.
      spec: the data's `DataSpec`, with an element "source".
      parameterization: "ddbm" or "x0", see `denoisers.Denoiser`.
      times, times_options: of `objectives.bridge_denoising`.
      sigma_data, sigma_source, covariance: standard deviations of data and source, and their covariance.
      label_dropout: chance of the null label in training.
      clip: clip x0_hat to [-1, 1] in sampling.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: another kind of process, a data set without sources, or sources of another shape than
        the data.
    """
    if not isinstance(process, BridgeProcess):
        raise ValueError(f"a bridge needs a bridge process, got {type(process).__name__}")
    if "source" not in spec.elements:
        raise ValueError(
            f"a bridge needs pairs: the data has {', '.join(sorted(spec.elements))} but no 'source' "
            "(the data set 'paired' makes pairs from any images)"
        )
    if spec.elements["source"].shape != spec.shape:
        raise ValueError(
            f"data and source differ in shape: {spec.shape} and {spec.elements['source'].shape}"
        )
    classes = spec.num_classes if getattr(module, "num_classes", None) else None
    net = Network(module, classes, label_dropout, uses_source=True)
    draw_times = objectives.times.build_times(times, **(times_options or {}))

    def init(key, batch):
        return net.init(key, batch[spec.kind], batch)

    def plain(params, batch, train=False, key=None):
        bound = net.bind(params, batch, train, key)
        return Denoiser(bound, process, parameterization, sigma_data, sigma_source, covariance)

    def loss(params, key, batch, context):
        losses, aux = objectives.bridge_denoising(
            process,
            plain(params, batch, context.train, key),
            jax.random.fold_in(key, OBJECTIVE),
            batch[spec.kind],
            batch["source"],
            times=draw_times,
            index=batch["index"],
            total=context.batch_size,
        )
        return losses.mean(), {"x0_mse": aux["x0_error"].mean()}

    def denoiser(params, batch, train=False, key=None):
        denoise = plain(params, batch, train, key)
        return transforms.clip(denoise) if clip else denoise

    return assemble(
        process,
        init,
        loss,
        denoiser,
        lambda key, batch: batch["source"],
        sampler,
        nfe,
        dict(sampler_options or {}),
    )
