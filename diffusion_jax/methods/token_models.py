"""What methods of discrete models share: checks, guidance, and where sampling starts."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion_jax import guidance as transforms
from diffusion_jax.numerics import is_concrete
from diffusion_jax.objectives.score_entropy import prior_kl
from diffusion_jax.processes import Absorbing, StateMasking, scores
from diffusion_jax.samplers import Prompt


def check_token_model(what, process, spec, kinds, names):
    """Raises ValueError unless the data are tokens and the process is one of `kinds` on its vocabulary."""
    if spec.kind != "tokens":
        raise ValueError(f"{what} needs tokens, the data is of kind {spec.kind!r}")
    if not isinstance(process, kinds):
        raise ValueError(f"{what} needs {names}, got {type(process).__name__}")
    if process.vocab_size != spec.vocab_size:
        raise ValueError(
            f"the process has vocab_size {process.vocab_size}, the data has {spec.vocab_size}"
        )


def check_masked_model(what, process, spec):
    """`check_token_model` for a process that masks tokens."""
    check_token_model(what, process, spec, Absorbing, "an Absorbing process")


def check_answers(answers_only, spec):
    """Raises ValueError for `answers_only` on data without prompts."""
    if answers_only and "prompt" not in spec.elements:
        raise ValueError(f"answers_only needs data with a 'prompt'; it has {sorted(spec.elements)}")


def start_of(process, length):
    """`start` of `methods.base.assemble`: the prior, held to `batch["prompt"]` where it is not V."""

    def start(key, batch):
        index = batch["index"]
        if "prompt" not in batch:
            return process.prior(key, (index.shape[0], length), index=index)
        prompt = batch["prompt"]
        if isinstance(process, Absorbing | StateMasking):
            return prompt
        given = prompt != process.vocab_size
        return Prompt(jnp.where(given, prompt, 0), given)

    return start


def guided(net, params, batch, guidance, train, key, mix):
    """The bound network; where `guidance` is not 1, `mix(conditional, unconditional, guidance)`."""
    bound = net.bind(params, batch, train, key)
    if guidance == 1.0:
        return bound
    return mix(bound, net.bind(params, net.unconditional(batch), train, key), guidance)


def mix_log_probs(conditional, unconditional, weight):
    """Classifier-free guidance on log p(x0 | x_t)."""
    return transforms.guide(_log_probs(conditional), _log_probs(unconditional), weight)


def _log_probs(network):
    return jax.tree_util.Partial(_log_softmax, network)


def _log_softmax(network, tokens, t):
    return scores.log_softmax(network(tokens, t))


def with_small_times(process):
    """The process with training times down to 1e-4 at least, for bounds."""
    if is_concrete(process.t_min) and process.t_min > 1e-4:
        return dataclasses.replace(process, t_min=1e-4)
    return process


def ends(process, log_loo, tokens, xt, t):
    """The terms of a bound at both ends, `[B]`: -log p(x0 | x_t) at the smallest t, and the prior's.

    Args:
      log_loo: log leave-one-out posteriors at (xt, t), `[B, L, V]`.
    """
    decoded = scores.posterior(process, log_loo, xt, t)
    first = -jnp.take_along_axis(decoded, tokens[..., None].astype(jnp.int32), axis=-1)[..., 0]
    total = first.sum(axis=1)
    if not hasattr(process, "mask_id"):
        total = total + prior_kl(process, tokens).sum(axis=1)
    return total
