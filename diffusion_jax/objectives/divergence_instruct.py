"""Divergence distillation of masked models (DiDi-Instruct, arXiv 2509.25035): the formulas.

A student q of few steps and its teacher p are compared through their noised samples z_t, by
  (1) IKL = integral of omega(t) KL(q(z_t) || p(z_t)) dt
A masked z_t has p(z_t) = p(tokens it shows) times what the schedule decides, so that
  (2) R = log q(z_t) / p(z_t) is the ratio of two marginals and does not depend on t, and with omega = 1 and
      alpha = 1 - t the integral is the sum over sets of shown positions, of size m, of
      m! (L - m)! / (L + 1)! KL(q(shown) || p(shown))
  (3) grad IKL = E[ omega / pi R(z_t) grad log q(x) ], t ~ pi, x ~ q, z_t | x: a policy gradient in which the
      student is rewarded by -R
  (4) a classifier of real (1) against student tokens (0) at masked positions has the log-odds -R at its
      optimum, whatever the position. It is the reward, and the loss is -(omega advantage log q(x)).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import gammaln


def integral_kl(student, teacher):
    """(1) for joint tables, exactly: omega = 1, alpha = 1 - t.

    Args:
      student, teacher: probabilities `[V] * L`; differentiable.
    Returns:
      scalar.
    Raises:
      ValueError: tables of different shape.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"tables of shape {student.shape} and {teacher.shape} do not fit")
    length, total = student.ndim, 0.0
    weights = [_set_weight(m, length) for m in range(length + 1)]
    for shown in range(1, 2**length):
        hidden = tuple(i for i in range(length) if not shown >> i & 1)
        q, p = student.sum(axis=hidden), teacher.sum(axis=hidden)
        safe = jnp.where(q > 0, q, 1.0)
        kl = (q * (jnp.log(safe) - jnp.log(jnp.where(q > 0, p, 1.0)))).sum()
        total = total + weights[length - len(hidden)] * kl
    return total


def _set_weight(shown, length):
    """`integral of t^(length - shown) (1 - t)^shown dt`, the weight of one set of shown positions."""
    return jnp.exp(gammaln(shown + 1.0) + gammaln(length - shown + 1.0) - gammaln(length + 2.0))


def log_prob_of_reveals(logits, before, after, mask_id: int):
    """log p of the tokens that a step revealed, summed: `[B]`, at least in float32.

    Args:
      logits: `[B, L, V]`, of the call at `before`.
      before, after: int `[B, L]`; a position counts that is masked before and not after.
    """
    revealed = (before == mask_id) & (after != mask_id)
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.where(revealed, after, 0)[..., None].astype(jnp.int32)
    log_p = jnp.take_along_axis(wide, chosen, axis=-1)[..., 0] - jax.nn.logsumexp(wide, axis=-1)
    return jnp.where(revealed, log_p, 0.0).sum(axis=1)


def _mean_where(values, where):
    """Mean over the positions of each row `[B, L] -> [B]`; 0 where there are none."""
    return jnp.where(where, values, 0.0).sum(axis=1) / jnp.maximum(where.sum(axis=1), 1)


def critic_loss(log_odds, masked, real: bool, smoothing: float = 0.1):
    """Binary cross-entropy of the discriminator on one side, mean over masked positions: `[B]`.

    Args:
      log_odds: `[B, L]`, of being real.
      masked: bool `[B, L]`.
      real: label: real tokens have 1 - smoothing, the student's have smoothing.
    """
    label = 1.0 - smoothing if real else smoothing
    each = jax.nn.softplus(log_odds) - label * log_odds
    return _mean_where(each, masked)


def critic_reward(log_odds, masked, clip: float | None = None):
    """The student's reward `[B]`: mean log-odds over masked positions, an estimate of -R."""
    reward = _mean_where(log_odds, masked)
    return reward if clip is None else jnp.clip(reward, -clip, clip)


def group_advantages(rewards, *, ddof: int = 0, clip: float | None = None, eps: float = 1e-8):
    """Rewards normalised within their groups: `(r - mean) / (std + eps)`.

    Args:
      rewards: `[..., G]`, the last axis is a group.
      ddof: 0 for the standard deviation of a population, 1 for that of a sample.
      clip: bound on the result, or None.
    """
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    advantages = centred / (jnp.std(rewards, axis=-1, ddof=ddof, keepdims=True) + eps)
    return advantages if clip is None else jnp.clip(advantages, -clip, clip)


def policy_loss(log_prob, advantage, weight: Any = 1.0):
    """`-weight advantage log_prob`, whose gradient is the policy gradient; `[...]`, as `log_prob`."""
    return -jax.lax.stop_gradient(weight * advantage) * log_prob


def token_divergence(student_logits, teacher_logits, masked):
    """KL(student || teacher) of the laws of one token, mean over masked positions: `[B]`."""
    log_q, log_p = (
        jax.nn.log_softmax(v.astype(jnp.promote_types(v.dtype, jnp.float32)), axis=-1)
        for v in (student_logits, teacher_logits)
    )
    return _mean_where((jnp.exp(log_q) * (log_q - log_p)).sum(axis=-1), masked)


def token_entropy(logits, masked):
    """Entropy of the law of one token, nats, mean over masked positions: `[B]`."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)), axis=-1)
    return _mean_where(-(jnp.exp(log_q) * log_q).sum(axis=-1), masked)
