"""Masked discrete models (MDLM, MD4, RADD): a network that fills in masked tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import guidance as transforms
from diffusion_jax import objectives
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble
from diffusion_jax.processes import Absorbing
from diffusion_jax.registry import register


@register("method", "masked", family="discrete")
def masked(
    process,
    module,
    spec,
    *,
    times: str = "uniform",
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str = "masked_ancestral",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Masked diffusion trained on its continuous-time bound (arXiv 2406.07524, 2406.04329, 2406.03736).

    The loss is in nats a token. A batch may hold "prompt" tokens `[B, L]` for sampling: what is not the
    mask id stays, the rest is infilled.

    Args:
      process: an `Absorbing` process.
      module: network `(tokens, t, label=) -> logits [B, L, V]`.
      spec: the data's `DataSpec` of kind "tokens".
      times: of `objectives.masked_cross_entropy`.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on log-probabilities; other than 1 doubles the calls.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: data that are not tokens, a process that is not `Absorbing` or of another vocabulary.
    """
    if spec.kind != "tokens":
        raise ValueError(f"a masked model needs tokens, the data is of kind {spec.kind!r}")
    if not isinstance(process, Absorbing):
        raise ValueError(f"a masked model needs an Absorbing process, got {type(process).__name__}")
    if process.vocab_size != spec.vocab_size:
        raise ValueError(
            f"the process has vocab_size {process.vocab_size}, the data has {spec.vocab_size}"
        )
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout)

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def loss(params, key, batch, context):
        losses, aux = objectives.masked_cross_entropy(
            process,
            net.bind(params, batch, context.train, key),
            jax.random.fold_in(key, OBJECTIVE),
            batch["tokens"],
            times=times,
            index=batch["index"],
            total=context.batch_size,
        )
        return losses.mean() / length, {"cross_entropy": aux["cross_entropy"].mean()}

    def denoiser(params, batch, train=False, key=None, raw=False):
        bound = net.bind(params, batch, train, key)
        if guidance == 1.0:
            return bound
        unconditional = net.bind(params, net.unconditional(batch), train, key)
        return transforms.guide(_log_probs(bound), _log_probs(unconditional), guidance)

    def start(key, batch):
        if "prompt" in batch:
            return batch["prompt"]
        return jnp.full((batch["index"].shape[0], length), process.mask_id, jnp.int32)

    return assemble(
        process,
        init,
        loss,
        denoiser,
        start,
        sampler,
        nfe,
        sampler_options,
        every_sampler={"length": length},
    )


def _log_probs(network):
    return jax.tree_util.Partial(_log_softmax, network)


def _log_softmax(network, tokens, t):
    return jax.nn.log_softmax(network(tokens, t).astype(jnp.float32), axis=-1)
