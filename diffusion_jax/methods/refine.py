"""ReDiff (arXiv 2510.19871): a masked model that also revises the tokens it has revealed."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.methods.base import OBJECTIVE, Method, Network
from diffusion_jax.methods.masked import masked
from diffusion_jax.numerics import example_keys, is_concrete
from diffusion_jax.objectives.refine import (
    check_refining,
    correcting_cross_entropy,
    refining_cross_entropy,
)
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.confidence import confidence
from diffusion_jax.samplers.scan import sample as run_sampler

_DRAFT = 0xD2AF  # stream of the drafts


@register("method", "refine", family="discrete", paper="2510.19871")
def refine(
    process,
    module,
    spec,
    *,
    stage: int = 1,
    replace: float = 0.05,
    parts: Sequence[float] = (1.0, 1.0, 1.0),
    average: str = "count",
    weighted: bool = True,
    objective: str = "lambda",
    objective_options: Mapping[str, Any] | None = None,
    answers_only: bool = False,
    draft_steps: int = 8,
    draft_rate: float = 1.0,
    rehearsal: float = 1.0,
    label_dropout: float = 0.1,
    sampler: str = "confidence",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """A masked model trained to correct errors, in two stages; sampled by decoding that revises.

    Stage 1 trains on synthetic errors. Stage 2 begins with the parameters of stage 1
    (`train.init_from`) and trains on drafts of the model itself, the data being the expert's corrections.

    Deviations: the authors' drafts are made once, by the model of stage 1, and a larger model corrects
    them; here the averaged parameters make them anew in every step, from texts with `draft_rate` of the
    tokens masked, and the text is the correction. With `draft_rate` 1 and nothing given, a draft has little to
    do with the text: lower it, or use prompts. The losses of both stages are added (the authors mix
    their samples).

    Args:
      process, module, spec: as for the method "masked".
      stage: 1 or 2.
      replace, parts, average, weighted: of `objectives.refining_cross_entropy`.
      objective, objective_options: its masking; by default "lambda" with eps = 1e-3, the paper's.
      answers_only: mask, replace and score only what the batch's "prompt" leaves open.
      draft_steps: network calls of a draft: the fewer, the more errors.
      draft_rate: share of the tokens that a draft is to fill in.
      rehearsal: weight of the loss of stage 1 in stage 2.
      label_dropout: chance of the null label in training.
      sampler, nfe, sampler_options: the default sampler; "confidence" orders by the sampled token and
        revises everything.
    Raises:
      ValueError: as for the method "masked", or an option out of range.
    """
    check_choice("stage", stage, (1, 2))
    check_refining(replace, parts)
    if is_concrete(draft_rate) and not 0.0 < draft_rate <= 1.0:
        raise ValueError(f"draft_rate must lie in (0, 1], got {draft_rate}")
    if is_concrete(rehearsal) and rehearsal < 0:
        raise ValueError(f"rehearsal must be 0 or positive, got {rehearsal}")
    if sampler_options is None and sampler == "confidence":
        sampler_options = {"order": "sampled", "revise": 1.0}
    if objective_options is None:
        objective_options = {"eps": 1e-3} if objective == "lambda" else {}
    options = dict(objective_options)
    base = masked(
        process,
        module,
        spec,
        objective=objective,
        objective_options=options,
        answers_only=answers_only,
        label_dropout=label_dropout,
        sampler=sampler,
        nfe=nfe,
        sampler_options=sampler_options,
    )
    net, length = Network.of(module, spec, label_dropout, process=process), spec.shape[0]
    drafting = confidence(process, draft_steps, length=length, order="sampled")

    def drafts_of(params, key, batch, where):
        """What the model makes of the batch's texts where some of each is masked, int `[B, L]`."""
        tokens = batch["tokens"]
        mask_key, walk_key = jax.random.split(key)
        draw = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))
        hidden = draw(example_keys(mask_key, batch["index"])) < draft_rate
        hidden = hidden if where is None else hidden & where
        start = jnp.where(hidden, jnp.asarray(process.mask_id, tokens.dtype), tokens)
        denoise = jax.lax.stop_gradient(base.denoiser(params, batch))
        return run_sampler(drafting, denoise, walk_key, start, index=batch["index"])

    def loss(params, key, batch, context):
        where = batch["prompt"] == process.mask_id if answers_only else None
        network = net.bind(params, batch, context.train, key)
        key = jax.random.fold_in(key, OBJECTIVE)
        losses, aux = refining_cross_entropy(
            process,
            network,
            key,
            batch["tokens"],
            replace=replace,
            parts=parts,
            average=average,
            weighted=weighted,
            masking=objective,
            where=where,
            index=batch["index"],
            total=context.batch_size,
            **options,
        )
        if average == "sum":
            counted = length if where is None else jnp.maximum(where.sum(axis=1), 1)
            losses = losses / counted
        metrics = {name: values.mean() for name, values in aux.items()}
        if stage == 1:
            return losses.mean(), metrics
        drafter = params if context.ema is None else context.ema
        drafts = drafts_of(drafter, jax.random.fold_in(key, _DRAFT), batch, where)
        corrections, found = correcting_cross_entropy(
            process, network, drafts, batch["tokens"], where=where
        )
        metrics |= {"correction": corrections.mean(), "wrong": found["wrong"].mean()}
        return (corrections + rehearsal * losses).mean(), metrics

    return base._replace(loss=loss)
