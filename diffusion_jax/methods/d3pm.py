"""Discrete-time chains: D3PM (arXiv 2107.03006), VQ-Diffusion (2111.14822), CDCD (2206.07771)."""

from collections.abc import Mapping
from typing import Any

import jax

from diffusion_jax import objectives
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble
from diffusion_jax.methods.token_models import check_token_model, guided, mix_log_probs, start_of
from diffusion_jax.objectives.score_entropy import prior_kl
from diffusion_jax.processes import D3PM, Absorbing, MaskReplace, Uniform, scores
from diffusion_jax.registry import register


@register("method", "d3pm", family="discrete", paper="2107.03006")
def d3pm(
    process,
    module,
    spec,
    *,
    num_steps: int | None = None,
    parameterization: str | None = None,
    auxiliary: float = 0.001,
    auxiliary_weight: str = "constant",
    first_step: str = "chain",
    contrast: float = 0.0,
    contrast_options: Mapping[str, Any] | None = None,
    times: str = "uniform",
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str = "discrete_ancestral",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """D3PM's hybrid loss on any finite chain, with CDCD's contrastive term.

    The loss is in nats a token and step: L_k and its cross-entropy, k uniform, not T times it. A batch may
    hold "prompt" tokens `[B, L]` for sampling: what is not V is given. `bound` is T L_k and the prior's term.

    Args:
      process: `D3PM` or `MaskReplace`, or `Absorbing` or `Uniform` at times k / `num_steps`.
      module: network `(tokens, t, label=) -> logits [B, L, V]`, t = k / T.
      spec: the data's `DataSpec` of kind "tokens".
      num_steps: T, for a process that has none of its own.
      parameterization: "leave_one_out" (D3PM; the default) or "posterior" (VQ-Diffusion and CDCD; the
        default on `MaskReplace`).
      auxiliary, auxiliary_weight, contrast, times: of `objectives.hybrid_loss`.
      first_step: L_1 and the last step of `discrete_ancestral`: "chain", by the chain as all others, or
        D3PM's "network", the softmax itself, which asks a network that leaves the token out everywhere
        else to copy it at k = 1.
      contrast_options: its `contrast_weight`, `negatives`, `num_negatives`, `wise`, `chunks`.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on log-probabilities; other than 1 doubles the calls.
      sampler, nfe, sampler_options: the default sampler; nfe None is T.
    Raises:
      ValueError: data that are not tokens, another process or vocabulary, no number of steps, an unknown
        option.

    Deviations: `first_step`; no truncated-logistic head (logits over the tokens for every kernel); see also
    `processes.d3pm` and `objectives.transition_kl`.
    """
    kinds = (D3PM, MaskReplace, Absorbing, Uniform)
    check_token_model(
        "d3pm", process, spec, kinds, "a D3PM, MaskReplace, Absorbing or Uniform process"
    )
    steps = getattr(process, "num_train_steps", num_steps)
    if not isinstance(steps, int) or num_steps not in (None, steps):
        raise ValueError(
            f"d3pm on {type(process).__name__}: num_steps = {num_steps!r} must be a positive int, the "
            "process's own if it has one"
        )
    mixture = isinstance(process, MaskReplace)
    parameterization = parameterization or ("posterior" if mixture else "leave_one_out")
    scores.check_parameterization(parameterization)
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout)
    options = {
        "num_steps": steps,
        "parameterization": parameterization,
        "first_step": first_step,
        "auxiliary": auxiliary,
        "auxiliary_weight": auxiliary_weight,
        "times": times,
    }

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def loss(params, key, batch, context):
        losses, aux = objectives.hybrid_loss(
            process,
            net.bind(params, batch, context.train, key),
            jax.random.fold_in(key, OBJECTIVE),
            batch["tokens"],
            contrast=contrast,
            index=batch["index"],
            total=context.batch_size,
            **options,
            **dict(contrast_options or {}),
        )
        metrics = {
            n: aux[n].mean() / length for n in ("bound", "cross_entropy", "contrast") if n in aux
        }
        return losses.mean() / length, metrics

    def bound(params, key, batch):
        tokens = batch["tokens"]
        _, aux = objectives.hybrid_loss(
            process, net.bind(params, batch), key, tokens, index=batch["index"], **options
        )
        if isinstance(process, Absorbing):
            return aux["bound"]
        return aux["bound"] + prior_kl(process, tokens).sum(axis=1)

    def denoiser(params, batch, train=False, key=None, raw=False):
        return guided(net, params, batch, guidance, train, key, mix_log_probs)

    given = {"length": length}
    if parameterization != "leave_one_out":  # which samplers take without being told
        given["parameterization"] = parameterization
    own = dict(sampler_options or {})
    if sampler == "discrete_ancestral":
        nfe = steps if nfe is None else nfe
        if parameterization == "leave_one_out":
            own = {"last_step": first_step, **own}
    made = assemble(
        process,
        init,
        loss,
        denoiser,
        start_of(process, length),
        sampler,
        nfe,
        own,
        every_sampler=given,
    )
    return made._replace(bound=bound)
