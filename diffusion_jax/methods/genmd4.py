"""GenMD4: masked diffusion with a learnt schedule for every token (arXiv 2406.04329, section 5)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble
from diffusion_jax.methods.token_models import check_token_model, start_of
from diffusion_jax.objectives.state_dependent import state_masked_loss, state_prior
from diffusion_jax.processes.state_masking import StateMasking
from diffusion_jax.registry import register


@register("method", "genmd4", family="discrete", paper="2406.04329")
def genmd4(
    process,
    module,
    spec,
    *,
    times: str = "uniform",
    learn_powers: bool = True,
    label_dropout: float = 0.0,
    sampler: str = "state_masked_ancestral",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """GenMD4 (arXiv 2406.04329). The loss is in nats a token; a batch may hold a "prompt" for sampling.

    Parameters are {"network": ..., "powers": [V]}, the powers before a softplus; they start as the
    process's. Two network calls a training step.

    Args:
      process: a `StateMasking` process.
      module: network `(tokens, t, label=) -> logits [B, L, V]`; it should see the time, since what a mask
        says about its token changes with it.
      spec: the data's `DataSpec` of kind "tokens".
      times: of the loss, on [t_min, 1].
      learn_powers: False keeps the process's.
      label_dropout: chance of the null label in training.
      sampler, nfe, sampler_options: the default sampler; it follows the learnt powers.
    Raises:
      ValueError: data that are not tokens, another process or vocabulary.
    """
    check_token_model("genmd4", process, spec, StateMasking, "a StateMasking process")
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout)

    def init(key, batch):
        powers = jnp.asarray(process.all_powers(), jnp.float32)
        # the inverse of softplus, without overflow
        raw = powers + jnp.log(-jnp.expm1(-powers))
        return {"network": net.init(key, batch["tokens"], batch), "powers": raw}

    def learnt(params):
        powers = jax.nn.softplus(params["powers"])
        if not learn_powers:
            powers = jax.lax.stop_gradient(powers)
        return dataclasses.replace(process, powers=powers)

    def losses_of(params, key, batch, total, train=False, dropout_key=None):
        network = net.bind(params["network"], batch, train, dropout_key)
        return state_masked_loss(
            learnt(params),
            network,
            key,
            batch["tokens"],
            times=times,
            index=batch["index"],
            total=total,
        )

    def loss(params, key, batch, context):
        own = jax.random.fold_in(key, OBJECTIVE)
        losses, aux = losses_of(params, own, batch, context.batch_size, context.train, key)
        powers = jax.nn.softplus(params["powers"])
        return losses.mean() / length, {
            "cross_entropy": aux["cross_entropy"].mean(),
            "power_min": powers.min(),
            "power_max": powers.max(),
        }

    def bound(params, key, batch):
        return losses_of(params, key, batch, None)[0] + state_prior(process, length)

    def denoiser(params, batch, train=False, key=None, raw=False):
        return net.bind(params["network"], batch, train, key)

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

    def sample(params, key, batch, sampler=None, **options):
        chosen = made.default_sampler if sampler is None else sampler
        if isinstance(chosen.start, StateMasking):
            chosen = dataclasses.replace(chosen, start=learnt(params))
        return made.sample(params, key, batch, chosen, **options)

    return made._replace(sample=sample, bound=bound)
