"""The likelihood bound of masking with token-dependent schedules (GenMD4, arXiv 2406.04329, section 5).

With mu = p(x0 | x_t, masked, t), alpha_v = 1 - (1 - eps) t^w_v, and M the masked positions of x_t:
  (1) -log p(x0) <= integral over t in [t1, 1] of E[ sum over M of l_i ] dt + reconstruction at t1 + prior
  (2) l = sum over v of (-w_v / t) [ (log mu(x0) + 1) 1{v = x0} - mu(v) ]
        = (1 / t) [ w_x0 (-log mu(x0) - 1) + sum over v of w_v mu(v) ]
  (3) reconstruction: masked at t1 w.p. (1 - eps) t1^w_x0, decoded with law ~ t1^w_v
  (4) prior: what is still clean at t = 1, eps of the tokens, coded uniformly
The powers also decide which masks are drawn. Their gradient through the draw is the score function with
the other of two draws as a baseline (REINFORCE leave-one-out):
  (5) (l1 - l2) (log q(x_t1 | x0) - log q(x_t2 | x0)) / 2, l held constant
Deviations from the official code: the integral over [t1, 1] is multiplied by its length, which makes the
value a bound; the prior term, of about L eps log V, is counted by `state_prior` and not dropped.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.numerics import example_keys, expand, fold_all
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import build_times
from diffusion_jax.objectives.token_cross_entropy import reduced_logits


def state_integrand(process, denoise: Callable, x, tokens, t):
    """(2) summed over masked positions, one value an example.

    Args:
      process: a `StateMasking` process.
      denoise: `(x int [B, L], t [B]) -> logits [B, L, V]`.
      x: int `[B, L]`, tokens with masks.
      tokens: int `[B, L]`, clean.
      t: `[B]`, positive.
    Returns:
      `(integrand [B], cross_entropy [B])`, the latter summed over masked positions.
    """

    def each(logits, tokens):
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        normaliser = jax.nn.logsumexp(wide, axis=-1)
        chosen = jnp.take_along_axis(wide, tokens[..., None].astype(jnp.int32), axis=-1)[..., 0]
        probs = jnp.exp(wide - normaliser[..., None])
        mean_power = probs @ jnp.asarray(process.all_powers(), wide.dtype)
        cross_entropy = normaliser - chosen
        return process.powers_of(tokens) * (cross_entropy - 1.0) + mean_power, cross_entropy

    value, cross_entropy = reduced_logits(denoise, x, process.point(t), each, tokens)
    masked = x == process.mask_id
    summed = jnp.where(masked, value / expand(t, value), 0.0).sum(axis=1)
    return summed, jnp.where(masked, cross_entropy, 0.0).sum(axis=1)


def state_reconstruction(process, tokens, t=None):
    """(3) in nats a sequence, `[B]`; t defaults to `process.t_min`."""
    t = jnp.asarray(process.t_min if t is None else t)
    rate = jnp.exp(process.log_mask_rates(tokens, t))
    logits = jnp.asarray(process.all_powers()) * jnp.log(t)
    chosen = process.powers_of(tokens) * jnp.log(t)
    return (rate * (jax.nn.logsumexp(logits) - chosen)).sum(axis=1)


def state_prior(process, length: int):
    """(4) in nats a sequence: `L eps log V`, if x_1 is coded as a mask with probability 1 - eps."""
    return length * process.eps * jnp.log(process.vocab_size)


def leave_one_out(first, second, log_first, log_second):
    """(5), a term whose gradient is that of the expectation through two draws: all `[B]`.

    Args:
      first, second: values of the two draws.
      log_first, log_second: their log-probabilities, differentiable.
    """
    advantage = jax.lax.stop_gradient(first - second)
    return 0.5 * advantage * (log_first - log_second)


def state_masked_loss(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    times: str | Callable = "uniform",
    index=None,
    total: int | None = None,
):
    """One-sample estimate of the bound, nats a sequence, whose gradient holds the powers' too.

    Two maskings of each example at one time: two network calls, as one of twice the batch would cost.

    Args:
      process: a `StateMasking` process, its powers possibly traced.
      denoise: `(x int [B, L], t [B]) -> logits [B, L, V]`.
      key: split into times and masks; example i's masks are folded with `index[i]`.
      tokens: int `[B, L]`, clean.
      times: a name or a time sampler on [t_min, 1].
      index, total: positions in, and size of, the global batch.
    Returns:
      `(losses [B], aux)`; aux holds `t`, `masked` (the fraction masked) and `cross_entropy`, the mean
      over masked positions, all `[B]`.
    Raises:
      ValueError: tokens that are not clean integers `[B, L]`.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    index, total = global_index(tokens, index, total)
    t_key, mask_key = jax.random.split(key)
    t, inverse_density = build_times(times)(process, t_key, index, total)
    keys = example_keys(mask_key, index)
    values, logs, cross, count = [], [], 0.0, 0
    for draw in range(2):
        x = jax.lax.stop_gradient(process.corrupt(fold_all(keys, draw), tokens, t))
        value, cross_entropy = state_integrand(process, denoise, x, tokens, t)
        values.append(inverse_density * value)
        logs.append(process.log_prob(x, tokens, t))
        cross, count = cross + cross_entropy, count + (x == process.mask_id).sum(axis=1)
    through_draws = leave_one_out(*values, *logs)
    losses = 0.5 * (values[0] + values[1]) + state_reconstruction(process, tokens)
    losses += through_draws - jax.lax.stop_gradient(through_draws)
    return losses, {
        "t": t,
        "masked": count / (2 * tokens.shape[1]),
        "cross_entropy": cross / jnp.maximum(count, 1),
    }
