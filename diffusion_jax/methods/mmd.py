"""MMD-DDM: a score model fine-tuned through its own sampler for a fixed number of calls (arXiv 2301.07969).

The loss is the unbiased squared MMD (`objectives.mmd2`) between features of a batch of samples, drawn by
the sampler that will be used and differentiated through all of its steps, and features of the batch of
data. Steps are recomputed in the backward pass, so memory hardly grows with their number.

The loss belongs to the whole batch: it is no mean over examples. Under `parallel.mode = "jit"` a batch
that is spread over devices is still one batch; microbatches and pmap would compare parts of it, and are
refused. To add up several batches an update use `train.optimizer.accumulate`.

Reading the result: a distance in the features that were trained on overstates the quality. Judge in
another feature space.

Deviations from the official code:
- the batch's labels condition its samples where the model has classes (the paper's models have none);
- dropout is off while sampling (theirs is on, a side effect of `model.train()`);
- pixels outside [-1, 1] keep their gradient (`saturation="hard"` is theirs: clipped, without gradient);
- x0_hat is clipped in every step as the library's samplers do (`clip=False` is theirs);
- gradients are clipped once an update, not once a micro-batch.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import objectives
from diffusion_jax.guidance.transforms import clip as clip_transform
from diffusion_jax.methods.base import (
    OBJECTIVE,
    Method,
    assemble,
    prior_start,
    sampling_denoiser,
)
from diffusion_jax.methods.score import score
from diffusion_jax.objectives.features import Features, build_features
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.scan import sample as run_sampler

SATURATION = ("straight_through", "hard", "none")


@register("method", "mmd", family="gaussian", paper="2301.07969", whole_batch=True)
def mmd(
    process,
    module,
    spec,
    *,
    parameterization: str = "edm",
    sigma_data: float = 0.5,
    guidance: float = 1.0,
    clip: bool = True,
    sampler: str = "ddim",
    nfe: int | None = 5,
    sampler_options: Mapping[str, Any] | None = None,
    kernel: str = "polynomial",
    kernel_options: Mapping[str, Any] | None = None,
    features: str | Features = "pixels",
    feature_layer: str = "features",
    saturation: str = "straight_through",
    remat: bool = True,
) -> Method:
    """Fine-tuning of a score model for one sampler at one number of calls (arXiv 2301.07969).

    Begin from a trained model: `config.train.init_from`. `parameterization`, `sigma_data`, network and
    process must be those it was trained with.

    Args:
      process, module, spec, parameterization, sigma_data, guidance, clip: as for `score`.
      sampler, nfe, sampler_options: the sampler that is trained, and the default one; deterministic.
      kernel, kernel_options: of `objectives.build_kernel`.
      features: "pixels", the .npz file of a classifier (`evaluation.Classifier.save`; images of the
        data's shape), or an `objectives.features.Features`. Its parameters are the method's state.
      feature_layer: "features" or "texture" of that classifier.
      saturation: what features see of values outside [-1, 1], for images: "straight_through" clips and
        passes the gradient on as if it had not, "hard" clips, "none" does not. The clipping of x0_hat
        in the steps (`clip`) passes gradients on likewise.
      remat: recompute the steps in the backward pass.
    Raises:
      ValueError: as `score`; a sampler that draws random numbers, an unknown kernel, layer or
        saturation, features that are neither.
      ValueError (from the loss): a batch that is a part of the global one.
    """
    check_choice("saturation", saturation, SATURATION)
    base = score(
        process,
        module,
        spec,
        parameterization=parameterization,
        sigma_data=sigma_data,
        guidance=guidance,
        clip=False,
        sampler=sampler,
        nfe=nfe,
        sampler_options=sampler_options,
    )
    trained = base.default_sampler
    if trained.stochastic:
        raise ValueError(
            f"MMD fine-tuning runs through a deterministic sampler; {trained.name!r} draws noise"
        )
    k = objectives.build_kernel(kernel, **(kernel_options or {}))
    seen = build_features(features, feature_layer, spec.shape)
    bounded = spec.kind == "image"

    denoiser = sampling_denoiser(base.denoiser, clip=clip)
    start = prior_start(process, spec)

    def loss(params, key, batch, context):
        here = batch["index"].shape[0]
        if context.batch_size not in (None, here):
            raise ValueError(
                f"MMD compares whole batches: this is a part ({here} of {context.batch_size} examples);"
                " use train.microbatches=1 and parallel.mode='jit'"
            )
        denoise = base.denoiser(params, batch)
        if clip:
            passes = saturation == "straight_through"
            denoise = clip_transform(denoise, straight_through=passes)
        noise = start(jax.random.fold_in(key, OBJECTIVE), batch)
        drawn = run_sampler(trained, denoise, None, noise, index=batch["index"], remat=remat)
        if bounded and saturation != "none":
            drawn = _clip_passing(drawn) if saturation == "straight_through" else _clip(drawn)
        x, y = (seen.apply(context.state, v) for v in (drawn, batch[spec.kind]))
        value = objectives.mmd2(x, y, k)
        return value, {"feature_mean_gap": _mean_gap(x, y)}

    made = assemble(process, base.init, loss, denoiser, start, sampler, nfe, sampler_options)
    return made._replace(init_state=lambda key, params, batch: seen.load())


def _mean_gap(x, y):
    """Root mean square difference of the features' means."""
    return jnp.sqrt(jnp.mean((x.mean(axis=0) - y.mean(axis=0)) ** 2))


def _clip(x):
    return jnp.clip(x, -1.0, 1.0)


def _clip_passing(x):
    """Clipped to [-1, 1], with the gradient of the identity."""
    return x + jax.lax.stop_gradient(_clip(x) - x)
