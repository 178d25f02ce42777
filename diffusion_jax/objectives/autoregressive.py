"""Next-token cross-entropy: `-log p(x) = sum over i of -log p(x_i | x_1 .. x_(i-1))`, exact."""

from collections.abc import Callable

import jax.numpy as jnp

from diffusion_jax.objectives.token_cross_entropy import token_cross_entropy


def next_token_cross_entropy(process, denoise: Callable, tokens, *, where=None):
    """The negative log-likelihood of an autoregressive model, nats a sequence, one value an example.

    Args:
      process: a process over the tokens; its vocabulary is checked.
      denoise: `(tokens int [B, L], t) -> logits [B, L, V]`, those at position i given tokens before i
        alone; its `cross_entropy` is used where it has one, see `token_cross_entropy`.
      tokens: int `[B, L]`.
      where: bool `[B, L]`, the positions that count (default: all). Where they are the last ones, this
        is the likelihood of an answer given its prompt.
    Returns:
      `(losses [B], aux)`; aux holds `cross_entropy`, the mean over the positions that count, `[B]`.
    Raises:
      ValueError: tokens that are not integers 0..V-1 `[B, L]`, logits or `where` of another shape.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    if where is not None and (where.shape != tokens.shape or where.dtype != bool):
        raise ValueError(
            f"where must be bool of shape {tokens.shape}, got {where.dtype} {where.shape}"
        )
    t = jnp.zeros(tokens.shape[:1])  # there is no noise
    each = token_cross_entropy(denoise, tokens, process.point(t), tokens)
    count = tokens.shape[1]
    if where is not None:
        each, count = jnp.where(where, each, 0.0), jnp.maximum(where.sum(axis=1), 1)
    losses = each.sum(axis=1)
    return losses, {"cross_entropy": losses / count}
