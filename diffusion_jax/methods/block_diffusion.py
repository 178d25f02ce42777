"""Block diffusion: blocks one after the other, each a masked diffusion (BD3LM, arXiv 2503.09573)."""

from collections.abc import Mapping
from typing import Any

import jax

from diffusion_jax import objectives
from diffusion_jax.methods.autoregressive import check_attention
from diffusion_jax.methods.base import OBJECTIVE, Method, Network
from diffusion_jax.methods.decoding import left_to_right_method
from diffusion_jax.methods.token_models import check_masked_model
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.token_states import check_ends_masked

_SAMPLERS = ("block_decoding",)


@register("method", "block_diffusion", family="discrete", paper="2503.09573")
def block_diffusion(
    process,
    module,
    spec,
    *,
    block_size: int | None = None,
    objective: str = "count",
    clip: tuple[float, float] = (0.0, 1.0),
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str = "block_decoding",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """A block-causal network trained on the bound of block diffusion, in nats a token.

    One pass of twice the length sees the noisy blocks and the clean ones before them. `bound` is by
    counts of masks in each block: unbiased, whatever the objective. Sampling fills in block after block
    with a key-value cache; a batch may hold "prompt" tokens `[B, n]`, which stay where they are not the
    mask id.

    Args:
      process: an `Absorbing` process.
      module: network `(tokens, t, label=, clean=) -> logits [B, L, V]` with `attention="block"`.
      spec: the data's `DataSpec` of kind "tokens".
      block_size: that of the module, which it must be where it is named.
      objective: "count" (least variance) or "continuous" (the paper's).
      clip: mask rates of "continuous", see `objectives.block`; `search_clip` finds them.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on log-probabilities; other than 1 doubles the calls.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: data that are not tokens, a process that is not `Absorbing`, of another vocabulary or
        that does not end fully masked, a network of another attention or block size, a bad objective.
    """
    what = "a block diffusion model"
    check_masked_model(what, process, spec)
    check_ends_masked(process)
    check_attention(what, module, "block")
    size = check_block_size(what, module, block_size)
    check_choice("objective", objective, objectives.BLOCK_MASKINGS)
    objectives.check_clip(clip)
    options = {"clip": tuple(clip)} if objective == "continuous" else {}
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout)

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def loss(params, key, batch, context):
        losses, aux = objectives.block_cross_entropy(
            process,
            net.bind(params, batch, context.train, key),
            jax.random.fold_in(key, OBJECTIVE),
            batch["tokens"],
            block_size=size,
            masking=objective,
            index=batch["index"],
            total=context.batch_size,
            **options,
        )
        return losses.mean() / length, {"cross_entropy": aux["cross_entropy"].mean()}

    def bound(params, key, batch):
        return objectives.block_cross_entropy(
            process,
            net.bind(params, batch),
            key,
            batch["tokens"],
            block_size=size,
            index=batch["index"],
        )[0]

    return left_to_right_method(
        process,
        net,
        init,
        loss,
        bound,
        reading="block",
        guidance=guidance,
        samplers=_SAMPLERS,
        sampler=sampler,
        nfe=nfe,
        sampler_options=sampler_options,
        length=length,
        block_size=size,
    )


def check_block_size(what, module, block_size) -> int:
    """The module's block size. Raises ValueError where it has none, or `block_size` names another."""
    own = getattr(module, "block_size", None)
    if own is None:
        raise ValueError(f"{what} needs a network with a block_size")
    if block_size not in (None, own):
        raise ValueError(f"{what} of block_size {block_size} has a network of block_size {own}")
    return own
