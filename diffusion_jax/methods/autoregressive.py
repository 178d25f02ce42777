"""Autoregressive models: the baseline of discrete diffusion, in the same frame."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax import objectives
from diffusion_jax.methods.base import Method, Network
from diffusion_jax.methods.decoding import left_to_right_method
from diffusion_jax.methods.token_models import check_answers, check_masked_model
from diffusion_jax.registry import register

_SAMPLERS = ("left_to_right",)


@register("method", "autoregressive", family="discrete")
def autoregressive(
    process,
    module,
    spec,
    *,
    answers_only: bool = False,
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str = "left_to_right",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """A causal network trained on next-token cross-entropy, in nats a token.

    `bound` is the negative log-likelihood itself. Sampling makes one call a token with a key-value
    cache; a batch may hold "prompt" tokens `[B, n]`, which stay where they are not the mask id. The
    logits know what stands before: masks that are followed by given tokens are filled in without
    regard to these.

    Args:
      process: an `Absorbing` process: its mask id is the beginning of a sequence and marks what is still
        to come; its schedule has no meaning here.
      module: network `(tokens, t, label=) -> logits [B, L, V]` with `attention="causal"`.
      spec: the data's `DataSpec` of kind "tokens".
      answers_only: train on, and give the likelihood of, what the batch's "prompt" leaves open;
        otherwise prompts are for sampling alone.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on log-probabilities; other than 1 doubles the calls.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: data that are not tokens, a process that is not `Absorbing` or of another vocabulary, a
        network that sees what it is to predict.
    """
    check_masked_model("an autoregressive model", process, spec)
    check_attention("an autoregressive model", module, "causal")
    check_answers(answers_only, spec)
    net = Network.of(module, spec, label_dropout)

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def losses_of(network, batch):
        where = batch["prompt"] == process.mask_id if answers_only else None
        return objectives.next_token_cross_entropy(process, network, batch["tokens"], where=where)

    def loss(params, key, batch, context):
        _, aux = losses_of(net.bind(params, batch, context.train, key), batch)
        value = aux["cross_entropy"].mean()
        return value, {"bits_per_token": value / np.log(2.0)}

    def bound(params, key, batch):
        return losses_of(net.bind(params, batch), batch)[0]

    return left_to_right_method(
        process,
        net,
        init,
        loss,
        bound,
        reading="causal",
        guidance=guidance,
        samplers=_SAMPLERS,
        sampler=sampler,
        nfe=nfe,
        sampler_options=sampler_options,
        length=spec.shape[0],
    )


def check_attention(what, module, wanted):
    """Raises ValueError for a network of another attention: its samples would be noise."""
    found = getattr(module, "attention", None)
    if found != wanted:
        raise ValueError(f"{what} needs a network with attention={wanted!r}, got {found!r}")
