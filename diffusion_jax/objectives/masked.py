"""Masked cross-entropy: the continuous-time bound of MDLM, MD4 and RADD.

`-log p(x0) <= integral over t of w(t) E[ sum over masked positions of -log p(x0_i | x_t) ]` with
w = -alpha' / (1 - alpha) (arXiv 2406.07524, eq. 10; 2406.04329, eq. 4; 2406.03736, eq. 3.10). With the
linear schedule w = 1/t, and t is the mask rate itself (RADD's lambda-DCE).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import example_keys
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import build_times


def masked_sum(logits, tokens, masked):
    """Cross-entropy summed over masked positions: logits `[B, L, V]` -> `[B]`, float32."""
    if logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits of shape {logits.shape} do not fit tokens of shape {tokens.shape}"
        )
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(wide, tokens[..., None].astype(jnp.int32), axis=-1)[..., 0]
    cross_entropy = jax.nn.logsumexp(wide, axis=-1) - chosen
    return jnp.where(masked, cross_entropy, 0.0).sum(axis=1)


def masked_cross_entropy(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    times: str | Callable = "uniform",
    index=None,
    total: int | None = None,
):
    """One-sample estimate of the bound, nats a sequence, one value an example.

    Times are drawn on [t_min, 1]; what lies below t_min is left out (for the linear schedule a
    fraction of about t_min of the bound), so an evaluation that reports likelihoods wants a small t_min.

    Args:
      process: an `Absorbing` process.
      denoise: `(x_t int [B, L], t [B]) -> logits [B, L, V]`.
      key: split into times and masks; example i's mask is folded with `index[i]`.
      tokens: int `[B, L]`, clean.
      times: a registered name or a time sampler; "uniform" is low-discrepancy.
      index, total: positions in, and size of, the global batch.
    Returns:
      `(losses [B], aux)`; aux holds `t`, `masked` (the fraction masked) and `cross_entropy`, the
      mean over masked positions, all `[B]`.
    Raises:
      ValueError: tokens that are not clean integers `[B, L]`, logits of another shape.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    index, total = global_index(tokens, index, total)
    t_key, mask_key = jax.random.split(key)
    t, inverse_density = build_times(times)(process, t_key, index, total)
    xt = process.corrupt(example_keys(mask_key, index), tokens, t)
    masked = xt == process.mask_id
    logits, _ = evaluate(denoise, xt, process.point(t))
    summed = masked_sum(logits, tokens, masked)
    losses = process.weight(t) * inverse_density * summed
    count = masked.sum(axis=1)
    return losses, {
        "t": t,
        "masked": count / tokens.shape[1],
        "cross_entropy": summed / jnp.maximum(count, 1),
    }
