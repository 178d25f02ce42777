"""UDLM: diffusion with uniform noise, whose tokens can be corrected (arXiv 2412.10193)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import objectives
from diffusion_jax.guidance import guide_steps
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble
from diffusion_jax.methods.token_models import (
    check_token_model,
    ends,
    guided,
    start_of,
    with_small_times,
)
from diffusion_jax.numerics import example_keys
from diffusion_jax.processes import CTMC, Uniform, scores
from diffusion_jax.registry import register


@register("method", "uniform", family="discrete", paper="2412.10193")
def uniform(
    process,
    module,
    spec,
    *,
    parameterization: str = "leave_one_out",
    times: str = "uniform",
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str = "discrete_ancestral",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """UDLM (Schiff et al., arXiv 2412.10193) and its like on any chain of rates: the continuous-time bound.

    The loss is in nats a token. A batch may hold "prompt" tokens `[B, L]` for sampling: what is not V is
    given. `bound` adds the terms of both ends.

    Args:
      process: `Uniform`, or a `CTMC` whose states are the tokens.
      module: network `(tokens, t, label=) -> logits [B, L, V]`; it must see t.
      spec: the data's `DataSpec` of kind "tokens".
      parameterization: "leave_one_out", p(x0^i | x_t without i), as the paper (implicitly), or
        "posterior", p(x0^i | x_t): what a network trained by cross-entropy gives, converted by Bayes'
        rule.
      times: of `objectives.leave_one_out_bound`.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight; other than 1 doubles the calls. It acts on the step's
        p(x_s | x_t), as the paper's D-CFG.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: data that are not tokens, another process or vocabulary, an unknown parameterization.
    """
    check_token_model("this bound", process, spec, (Uniform, CTMC), "a Uniform process or a CTMC")
    if process.num_states != process.vocab_size:
        raise ValueError(
            f"the chain has {process.num_states} states for {process.vocab_size} tokens: a network of "
            "tokens needs them to be the same"
        )
    scores.check_parameterization(parameterization)
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout, process=process)
    fine = with_small_times(process)
    options = {"parameterization": parameterization}
    own = parameterization == "leave_one_out"  # what samplers take without being told

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def loss(params, key, batch, context):
        losses, aux = objectives.leave_one_out_bound(
            process,
            net.bind(params, batch, context.train, key),
            jax.random.fold_in(key, OBJECTIVE),
            batch["tokens"],
            times=times,
            index=batch["index"],
            total=context.batch_size,
            **options,
        )
        return losses.mean() / length, {"changed": aux["changed"].mean()}

    def bound(params, key, batch):
        network, tokens = net.bind(params, batch), batch["tokens"]
        drawn, first = jax.random.split(key)
        losses, _ = objectives.leave_one_out_bound(
            fine, network, drawn, tokens, index=batch["index"], **options
        )
        t = jnp.full(tokens.shape[:1], fine.t_min)
        xt = process.corrupt(example_keys(first, batch["index"]), tokens, t)
        log_loo = scores.leave_one_out(process, network(xt, t), xt, t, parameterization)
        return losses + ends(process, log_loo, tokens, xt, t)

    def denoiser(params, batch, train=False, key=None, raw=False):
        return guided(net, params, batch, guidance, train, key, guide_steps)

    made = assemble(
        process,
        init,
        loss,
        denoiser,
        start_of(process, length),
        sampler,
        nfe,
        sampler_options,
        every_sampler={"length": length} | ({} if own else options),
    )
    return made._replace(bound=bound)
