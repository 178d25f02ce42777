"""Discrete diffusion adaptation: an autoregressive model learns to fill in whole segments in parallel.

DiDA, of Emu3.5 (arXiv 2510.26583). A noisy copy of each segment stands beside the clean sequence: its
tokens see the clean tokens of all earlier segments and, both ways, their own segment; clean tokens stay
causal and never see noisy ones. So the model keeps what it was, and `autoregressive` opens its weights.
Noisy tokens have the positions of their clean copies.

Loss: the bound of block diffusion on the noisy copies, plus `next_token` times the autoregressive loss.
Sampling: a segment of masks is refined in a few calls against the cache; the first call of the next one
reads it causally once it is clean.

What the paper leaves open is ours: noise (masks), weights (those of the bound, and 1 for the next token),
the order of refinement (that of the sampler), segments of one length. Theirs are images between texts,
whose noisy copies alone count; here every segment has one, and a prompt is what is given.
"""

from collections.abc import Mapping
from typing import Any

import jax

from diffusion_jax import objectives
from diffusion_jax.methods.autoregressive import check_attention
from diffusion_jax.methods.base import OBJECTIVE, Method, Network
from diffusion_jax.methods.block_diffusion import check_block_size
from diffusion_jax.methods.decoding import left_to_right_method
from diffusion_jax.methods.token_models import check_masked_model
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.token_states import check_ends_masked

_SAMPLERS = ("block_decoding",)


@register("method", "dida", family="discrete", paper="2510.26583")
def dida(
    process,
    module,
    spec,
    *,
    block_size: int | None = None,
    next_token: float = 1.0,
    objective: str = "count",
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str = "block_decoding",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """A causal network that also predicts the masked tokens of a segment, in nats a token.

    Begin from an autoregressive model: `config.train.init_from`. The network is the same but for its
    `block_size`. `bound` is that of sampling by segments; the likelihood of the autoregressive model is
    `autoregressive(...).bound` of the same parameters.

    Args:
      process: an `Absorbing` process.
      module: network with `attention="causal"` and a `block_size`, the length of a segment; learned
        positions need one more than there are tokens.
      spec: the data's `DataSpec` of kind "tokens".
      block_size: that of the module, which it must be where it is named.
      next_token: weight of the autoregressive loss on the clean tokens.
      objective: "count" or "continuous", see `objectives.block`.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on log-probabilities; other than 1 doubles the calls.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: data that are not tokens, a process that is not `Absorbing`, of another vocabulary or
        that does not end fully masked, a network of another attention or block size, a bad objective or
        weight.
    """
    what = "DiDA"
    check_masked_model(what, process, spec)
    check_ends_masked(process)
    check_attention(what, module, "causal")
    size = check_block_size(what, module, block_size)
    check_choice("objective", objective, objectives.BLOCK_MASKINGS)
    if next_token < 0:
        raise ValueError(f"next_token must be 0 or positive, got {next_token}")
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout)

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def losses_of(network, key, batch, total, masking, weight):
        return objectives.block_cross_entropy(
            process,
            network,
            key,
            batch["tokens"],
            block_size=size,
            masking=masking,
            index=batch["index"],
            total=total,
            next_token=weight,
        )

    def loss(params, key, batch, context):
        network = net.bind(params, batch, context.train, key)
        key = jax.random.fold_in(key, OBJECTIVE)
        losses, aux = losses_of(network, key, batch, context.batch_size, objective, next_token)
        metrics = {name: aux[name].mean() for name in ("cross_entropy", "next_token")}
        return losses.mean() / length, metrics

    def bound(params, key, batch):
        return losses_of(net.bind(params, batch), key, batch, None, "count", 0.0)[0]

    return left_to_right_method(
        process,
        net,
        init,
        loss,
        bound,
        reading="segments",
        guidance=guidance,
        samplers=_SAMPLERS,
        sampler=sampler,
        nfe=nfe,
        sampler_options=sampler_options,
        length=length,
        block_size=size,
    )
