"""Which keys a query attends to, where that is not all of them: comparisons of numbered slots.

A slot is a place in the sequence that the network reads. Sequences are read in three ways:

  causal   slot 0 is the beginning, slot i holds token i - 1; a slot sees those up to itself, and its
           output is the prediction of token i
  block    slot i holds token i; a slot sees its own block and those before (arXiv 2503.09573)
  streams  a noisy copy beside the clean sequence: a noisy slot sees its own segment of the noisy stream
           and the clean tokens of all earlier segments; a clean slot sees clean ones only, causally or
           block by block (arXiv 2503.09573, section 3.2; 2510.26583)

In the first two a query sees a beginning of the sequence: it is told by the last slot seen, `limit`.
"""

import jax
import jax.numpy as jnp


def block_limits(slots: jax.Array, block_size: int) -> jax.Array:
    """The last slot of each slot's block: int [L] -> int [L]."""
    return slots // block_size * block_size + block_size - 1


def up_to(limit: jax.Array, keys: int) -> jax.Array:
    """Bool [L, keys]: a query sees the slots up to its `limit`, int [L]."""
    return jnp.arange(keys)[None, :] <= limit[:, None]


def streams(segment: jax.Array, before: jax.Array, limit: jax.Array) -> jax.Array:
    """Bool [2 L, 2 L] for the noisy stream followed by the clean one.

    Args:
      segment: int [L], the segment of each noisy slot.
      before: int [L], how many clean slots a noisy one sees.
      limit: int [L], the last clean slot that a clean one sees.
    """
    slots = jnp.arange(segment.shape[0])[None, :]
    own = segment[:, None] == segment[None, :]
    noisy = jnp.concatenate([own, slots < before[:, None]], axis=1)
    clean = jnp.concatenate([jnp.zeros_like(own), slots <= limit[:, None]], axis=1)
    return jnp.concatenate([noisy, clean], axis=0)
