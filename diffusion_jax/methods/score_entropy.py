"""SEDD: a network of concrete scores, trained on score entropy (arXiv 2310.16834)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax import objectives
from diffusion_jax.guidance import guide
from diffusion_jax.methods.base import OBJECTIVE, Method, Network, assemble
from diffusion_jax.methods.token_models import (
    check_token_model,
    ends,
    guided,
    start_of,
    with_small_times,
)
from diffusion_jax.numerics import example_keys, expand, pytree_dataclass, static
from diffusion_jax.objectives.score_entropy import check_total_noise
from diffusion_jax.processes import Absorbing, Uniform, scores
from diffusion_jax.registry import register


@pytree_dataclass
class ScoreNetwork:
    """A network's output as log-scores: of an absorbing process less log(exp(sigma_bar) - 1) + log V."""

    network: Any
    process: Any
    scaled: bool = static()

    def __call__(self, x, t):
        out = self.network(x, t)
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        if not self.scaled:
            return out
        shift = scores.score_scalar(self.process, jnp.asarray(t)) - jnp.log(out.shape[-1])
        return out + expand(shift, out)


@register("method", "score_entropy", family="discrete", output="score", paper="2310.16834")
def score_entropy(
    process,
    module,
    spec,
    *,
    scale_by_noise: bool = True,
    times: str = "uniform",
    label_dropout: float = 0.1,
    guidance: float = 1.0,
    sampler: str = "score_analytic",
    nfe: int | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """SEDD (Lou, Meng and Ermon, arXiv 2310.16834): the network gives log p_t(y) / p_t(x).

    The loss is in nats a token. A batch may hold "prompt" tokens `[B, L]` for sampling: what is not the
    mask id V is given. `bound` adds to the integrated score entropy the terms of both ends; with alpha(1) >
    0 an absorbing process leaves so many tokens unmasked at t = 1, which sampling from masks ignores, as
    all authors do.

    Args:
      process: `Absorbing` or `Uniform` with finite total noise (schedule linear with eps_end = 1e-3, or
        geometric).
      module: network `(tokens, t, label=) -> [B, L, V]`; it must see t.
      spec: the data's `DataSpec` of kind "tokens".
      scale_by_noise: for an absorbing process take log(exp(sigma_bar) - 1) + log V from the output, so
        that a network that knows nothing starts with scores of the right sum.
      times: of `objectives.denoising_score_entropy`.
      label_dropout: chance of the null label in training, for guidance.
      guidance: classifier-free guidance weight on log-scores; other than 1 doubles the calls.
      sampler, nfe, sampler_options: the default sampler.
    Raises:
      ValueError: data that are not tokens, another process, one of infinite noise or another vocabulary.

    With the network `ddit` this is the paper's model; others are told t, not the total noise. Deviation:
    times are stratified.
    """
    check_token_model(
        "score entropy", process, spec, (Absorbing, Uniform), "an Absorbing or Uniform process"
    )
    check_total_noise(process)
    length = spec.shape[0]
    net = Network.of(module, spec, label_dropout, process=process)
    scaled = scale_by_noise and isinstance(process, Absorbing)
    fine = with_small_times(process)

    def init(key, batch):
        return net.init(key, batch["tokens"], batch)

    def score(network):
        return ScoreNetwork(network, process, scaled)

    def loss(params, key, batch, context):
        losses, aux = objectives.denoising_score_entropy(
            process,
            score(net.bind(params, batch, context.train, key)),
            jax.random.fold_in(key, OBJECTIVE),
            batch["tokens"],
            times=times,
            index=batch["index"],
            total=context.batch_size,
        )
        return losses.mean() / length, {"changed": aux["changed"].mean()}

    def bound(params, key, batch):
        network, tokens = score(net.bind(params, batch)), batch["tokens"]
        drawn, first = jax.random.split(key)
        losses, _ = objectives.denoising_score_entropy(
            fine, network, drawn, tokens, index=batch["index"]
        )
        t = jnp.full(tokens.shape[:1], fine.t_min)
        xt = process.corrupt(example_keys(first, batch["index"]), tokens, t)
        log_loo = scores.conditional(process, network(xt, t), xt, t)
        return losses + ends(process, log_loo, tokens, xt, t)

    def denoiser(params, batch, train=False, key=None, raw=False):
        return score(guided(net, params, batch, guidance, train, key, guide))

    made = assemble(
        process,
        init,
        loss,
        denoiser,
        start_of(process, length),
        sampler,
        nfe,
        sampler_options,
        output="score",
        every_sampler={"length": length},
    )
    return made._replace(bound=bound)
