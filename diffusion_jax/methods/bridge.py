"""Bridge models: data restored from, or translated out of, a paired source (DDBM, I2SB, DBIM)."""

from collections.abc import Mapping
from typing import Any

import jax

from diffusion_jax import guidance as transforms
from diffusion_jax import objectives
from diffusion_jax.denoisers import Denoiser
from diffusion_jax.methods.base import (
    OBJECTIVE,
    Method,
    Network,
    assemble,
    sampling_denoiser,
)
from diffusion_jax.processes import BridgeProcess
from diffusion_jax.registry import register


@register("method", "bridge", family="bridge", paper="2309.16948")
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
    source_input: bool = True,
    masked: bool = False,
    label_dropout: float = 0.0,
    guidance: float = 1.0,
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
      parameterization: "ddbm" (preconditioned), "x0" (Bridge-TTS's data prediction), "i2sb" (I2SB's
        residual, the base diffusion's noise) or "eps" (the bridge's noise), see `denoisers.Denoiser`.
      times, times_options: of `objectives.bridge_denoising`.
      sigma_data, sigma_source, covariance: standard deviations of data and source, and their
        covariance ("ddbm").
      source_input: whether the network is told the source; I2SB's restoration models are not
        (`network.source_channels=0`), and then only the law of x0 is learned, not the pairing.
      masked: inpainting: the batch's "mask" (1 = unknown) says where the loss counts, and elsewhere
        the source stands in for x0_hat.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight in sampling; other than 1 doubles the network calls.
      clip: clip x0_hat to [-1, 1] in sampling.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: another kind of process, a data set without sources (or masks), sources of another
        shape than the data, "eps" for times that reach the source.
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
    if masked and "mask" not in spec.elements:
        raise ValueError(
            f"masked=True needs masks: the data has {', '.join(sorted(spec.elements))} but no 'mask' "
            "(the corruption 'inpaint' makes them)"
        )
    if parameterization == "eps" and not float(process.b(process.t_max)) > 0:
        raise ValueError(
            f"parameterization 'eps' has no x0_hat at the source: t_max = {process.t_max} must be below 1"
        )
    net = Network.of(module, spec, label_dropout, uses_source=source_input)
    draw_times = objectives.times.build_times(times, **(times_options or {}))

    def init(key, batch):
        return net.init(key, batch[spec.kind], batch)

    def plain(params, batch, train=False, key=None):
        bound = net.bind(params, batch, train, key)
        source = source_of(batch) if parameterization == "eps" else None
        statistics = sigma_data, sigma_source, covariance
        return Denoiser(bound, process, parameterization, *statistics, source)

    def loss(params, key, batch, context):
        losses, aux = objectives.bridge_denoising(
            process,
            plain(params, batch, context.train, key),
            jax.random.fold_in(key, OBJECTIVE),
            batch[spec.kind],
            source_of(batch),
            times=draw_times,
            mask=batch["mask"] if masked else None,
            index=batch["index"],
            total=context.batch_size,
        )
        return losses.mean(), {"x0_mse": aux["x0_error"].mean()}

    everywhere = sampling_denoiser(plain, clip=clip, net=net, guidance=guidance)

    def denoiser(params, batch, train=False, key=None, raw=False):
        denoise = everywhere(params, batch, train, key, raw)
        if not masked:
            return denoise
        if "mask" not in batch:
            raise ValueError(f"an inpainting model needs masks; the batch has {sorted(batch)}")
        return transforms.inpaint(denoise, source_of(batch), batch["mask"])

    return assemble(
        process,
        init,
        loss,
        denoiser,
        lambda key, batch: source_of(batch),
        sampler,
        nfe,
        sampler_options,
    )


def source_of(batch):
    if "source" not in batch:
        raise ValueError(f"a bridge starts at a source; the batch has {sorted(batch)}")
    return batch["source"]
