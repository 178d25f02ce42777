"""Masked discrete models (MDLM, MD4, RADD): a network that fills in masked tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import guidance as transforms
from diffusion_jax import objectives
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble
from diffusion_jax.methods.token_models import (
    check_answers,
    check_masked_model,
    guided,
    mix_log_probs,
    start_of,
)
from diffusion_jax.registry import register
from diffusion_jax.samplers.token_states import check_ends_masked


@register("method", "masked", family="discrete")
def masked(
    process,
    module,
    spec,
    *,
    objective: str = "count",
    objective_options: Mapping[str, Any] | None = None,
    answers_only: bool = False,
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    prompt_guidance: float = 0.0,
    sampler: str = "masked_ancestral",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Masked diffusion trained on a likelihood bound (arXiv 2406.07524, 2406.04329, 2406.03736).

    The loss is in nats a token. A batch may hold "prompt" tokens `[B, L]`: what is not the mask id is
    given. Sampling fills in the rest.

    `bound` is the continuous-time bound, whatever the objective: by counts of masks, which has finite
    variance and leaves out no times. For a network that does not see the time it is the mean
    any-order autoregressive likelihood, and that of first-hitting samples.

    Args:
      process: an `Absorbing` process.
      module: network `(tokens, t, label=) -> logits [B, L, V]`; one that sees t is told the mask rate's t, a
        `ddit` the total noise there, which must be finite.
      spec: the data's `DataSpec` of kind "tokens".
      objective: what is averaged in training, a name of `objectives.build_masking`: "count" (of masks,
        any-order: the least variance), "continuous" (MDLM, MD4: the process's schedule), "lambda" (RADD,
        SMDM: uniform mask rates), "importance" (MDLM), "finite" (MD4 with T steps).
      objective_options: times, eps or steps, of that objective.
      answers_only: train on, and bound the likelihood of, what the batch's "prompt" leaves open, given
        the prompt; otherwise prompts are for sampling alone.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on log-probabilities; other than 1 doubles the calls.
      prompt_guidance: w >= 0 of `guidance.guide_prompt` for batches with a "prompt" (SMDM, arXiv
        2410.18514); other than 0 doubles the calls.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: data that are not tokens, a process that is not `Absorbing`, of another vocabulary or
        that does not end fully masked, an unknown objective.
    """
    check_masked_model("a masked model", process, spec)
    check_ends_masked(process)
    check_answers(answers_only, spec)
    options = dict(objective_options or {})
    objectives.build_masking(objective, **options)
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout, process=process)

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def losses_of(network, key, batch, total, masking, **masking_options):
        where = batch["prompt"] == process.mask_id if answers_only else None
        return objectives.masked_cross_entropy(
            process,
            network,
            key,
            batch["tokens"],
            masking=masking,
            where=where,
            index=batch["index"],
            total=total,
            **masking_options,
        )

    def loss(params, key, batch, context):
        network = net.bind(params, batch, context.train, key)
        key = jax.random.fold_in(key, OBJECTIVE)
        losses, aux = losses_of(network, key, batch, context.batch_size, objective, **options)
        tokens = length
        if answers_only:
            tokens = jnp.maximum((batch["prompt"] == process.mask_id).sum(axis=1), 1)
        return (losses / tokens).mean(), {"cross_entropy": aux["cross_entropy"].mean()}

    def bound(params, key, batch):
        return losses_of(net.bind(params, batch), key, batch, None, "count")[0]

    def denoiser(params, batch, train=False, key=None, raw=False):
        if prompt_guidance == 0.0 or "prompt" not in batch:
            return by_label(params, batch, train, key)
        twice = jax.tree.map(lambda v: jnp.concatenate([v, v]), dict(batch))
        given = jnp.asarray(batch["prompt"]) != process.mask_id
        return transforms.guide_prompt(
            by_label(params, twice, train, key), given, process.mask_id, prompt_guidance
        )

    def by_label(params, batch, train, key):
        return guided(net, params, batch, guidance, train, key, mix_log_probs)

    made = assemble(
        process,
        init,
        loss,
        denoiser,
        start_of(process, length),
        sampler,
        nfe,
        sampler_options,
        every_sampler={"length": length},
    )
    return made._replace(bound=bound)
