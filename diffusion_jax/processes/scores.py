"""Between what networks of discrete diffusion give: posteriors, leave-one-out posteriors, concrete scores.

For a position with token z = x_t^i:
  (1) p(x0^i = v | x_t) ~ p(x0^i = v | x_t without i) q(z | v)                        [Bayes]
  (2) concrete score: p_t(x with j at i) / p_t(x) = sum_v x_v q(j | v) / sum_v x_v q(z | v), x the
      leave-one-out posterior p(x0^i | x_t without i)
  (3) absorbing, z the mask: both posteriors are the conditional c(v | unmasked), and the score is
      c(v) alpha / (1 - alpha): RADD's "conditional times a scalar" (arXiv 2406.03736, theorem 1)
UDLM (2412.10193) and D3PM (2107.03006) train the leave-one-out posterior, VQ-Diffusion and CDCD the
posterior itself; (1) turns one into the other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import expand, namespace
from diffusion_jax.processes.discrete import Absorbing, Uniform
from diffusion_jax.processes.token_kernels import log_or_low
from diffusion_jax.registry import check_choice


class GuidedLogits(NamedTuple):
    """Two networks' logits whose steps p(x_s | x_t) are to be mixed: conditional^w unconditional^(1 - w)."""

    conditional: Any
    unconditional: Any
    weight: Any


class SteeredLogits(NamedTuple):
    """Logits, and what is added to log p(x_s | x_t), `[B, L, S]`."""

    logits: Any
    shift: Any


PARAMETERIZATIONS = ("leave_one_out", "posterior")


def check_parameterization(parameterization):
    """Raises ValueError unless it is one of `PARAMETERIZATIONS`."""
    check_choice("parameterization", parameterization, PARAMETERIZATIONS)


def log_softmax(logits):
    """Log-probabilities along the last axis, NumPy or JAX, at least float32."""
    if namespace(logits) is jnp:
        return jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divided(logits, seen):
    """Log-softmax of logits over what `seen [..., V]` says of each token; what it rules out stays so."""
    xp = namespace(logits, seen)
    limits = xp.finfo(logits.dtype)
    return log_softmax(xp.where(seen > limits.tiny, logits - log_or_low(seen), limits.min / 2))


def leave_one_out(process, logits, tokens, t, parameterization: str = "posterior"):
    """Log leave-one-out posteriors `[..., V]` from a network's logits.

    Args:
      process: a discrete process.
      logits: `[..., V]`.
      tokens: int `[...]`, x_t.
      t: scalar or `[B]`.
      parameterization: what the logits are of: "posterior" or "leave_one_out" (then they are only
        normalised).
    Raises:
      ValueError: another parameterization.
    """
    check_parameterization(parameterization)
    if parameterization == "posterior":
        return divided(logits, process.likelihood(tokens, t, logits.dtype))
    return log_softmax(logits)


def posterior(process, logits, tokens, t):
    """Log posteriors p(x0^i | x_t), `[..., V]`, from logits of leave-one-out posteriors."""
    return log_softmax(logits + log_or_low(process.likelihood(tokens, t, logits.dtype)))


def score_scalar(process, t):
    """log of alpha / (1 - alpha) = 1 / (exp(sigma_bar) - 1): RADD's scalar of an absorbing process."""
    rate = process.mask_rate(t)
    xp = namespace(rate)
    return xp.log1p(-rate) - xp.log(rate)


def concrete_score(process, logits, tokens, t, parameterization: str = "leave_one_out"):
    """Log concrete scores from a network's logits over clean tokens.

    Args:
      process: a discrete process in continuous time.
      logits, tokens, t, parameterization: as `leave_one_out`.
    Returns:
      `[..., V]`, for a `CTMC` `[..., S]`. Of an absorbing process only masked positions mean something.
    """
    return process.log_score(leave_one_out(process, logits, tokens, t, parameterization), tokens, t)


def conditional(process, log_score, tokens, t):
    """Log leave-one-out posteriors `[..., V]` from log concrete scores; for absorbing the conditionals.

    A score of a trained network need not be one of any distribution: absorbing scores are normalised,
    negative weights of uniform ones cut off.

    Raises:
      ValueError: neither an `Absorbing` nor a `Uniform` process.
    """
    if isinstance(process, Absorbing):
        return log_softmax(log_score - expand(score_scalar(process, t), log_score))
    if not isinstance(process, Uniform):
        raise ValueError(
            f"conditionals of scores need an absorbing or uniform process, got {type(process).__name__}"
        )
    xp = namespace(log_score)
    here = xp.arange(process.vocab_size) == tokens[..., None]
    marginal = xp.where(here, 1.0, xp.exp(log_score))
    marginal = marginal / marginal.sum(axis=-1, keepdims=True)
    rate = expand(process.mask_rate(t), marginal)
    return log_softmax(log_or_low(xp.maximum(marginal - rate / process.vocab_size, 0.0)))
