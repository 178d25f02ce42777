"""Cross-entropy of tokens, whole or position by position.

At V = 50,257 the logits of a batch are the largest array of training: [B, L, V] float32, and as much
again for their gradient. Where the denoiser offers `cross_entropy(x, t, targets)` (a bound network of
`methods.base` does, for modules with a separate last layer), `chunked_cross_entropy` makes the logits of
a few positions at a time and once more in the backward pass: memory [B, chunk, V] for one more matrix
product with the output layer. Positions are cut along L, so a batch laid over devices stays where it is.

Masked losses use masked positions only, about half of all; packing these together would save half of
the output layer, but stratified mask rates leave no position that is unmasked in the whole batch, and
packing across sequences moves them between devices. It is not done.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion_jax.denoisers import evaluate

# Logits up to this many are made at once: 64 MiB in float32.
ELEMENTS = 2**24


def cross_entropy(logits, targets):
    """`-log softmax(logits)[target]`: logits `[..., V]`, targets int `[...]` -> `[...]`, at least float32.

    Raises:
      ValueError: shapes that do not fit.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"logits of shape {logits.shape} do not fit tokens of shape {targets.shape}"
        )
    wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(wide, targets[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return jax.nn.logsumexp(wide, axis=-1) - chosen


def chunked(head: Callable, reduce: Callable, hidden, *arrays, elements: int = ELEMENTS):
    """`reduce(head(hidden), *arrays)` with at most about `elements` logits at a time.

    Args:
      head: `[B, n, C] -> logits [B, n, V]`, position by position; may close over traced parameters.
      reduce: `(logits [B, n, V], *arrays [B, n, ...]) -> [B, n, ...]`, position by position.
      hidden: `[B, L, C]`.
      arrays: `[B, L, ...]`.
      elements: at least one position of every sequence is taken. Where all logits together are no more,
        they are made at once and kept for the backward pass.
    Returns:
      what `reduce` gives, `[B, L, ...]`, an array or a pytree.
    Raises:
      ValueError: shapes that do not fit, `elements` below 1.
    """
    if elements < 1:
        raise ValueError(f"elements must be positive, got {elements}")
    for other in arrays:
        if hidden.ndim != 3 or hidden.shape[:2] != other.shape[:2]:
            raise ValueError(
                f"hidden states of shape {hidden.shape} do not fit tokens of shape {other.shape}"
            )
    batch, length, _ = hidden.shape
    vocab_size = jax.eval_shape(head, hidden[:, :1]).shape[-1]
    chunk = max(1, elements // max(1, batch * vocab_size))
    if chunk >= length:
        return reduce(head(hidden), *arrays)
    pieces = -(-length // chunk)
    chunk = -(-length // pieces)
    padding = pieces * chunk - length

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(batch, pieces, chunk, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(batch, pieces * chunk, *x.shape[3:])[:, :length]

    def piece(_, inputs):
        return None, reduce(head(inputs[0]), *inputs[1:])

    # one body, compiled once; its logits are made again in the backward pass instead of being kept
    again = jax.checkpoint(piece, prevent_cse=False)
    _, found = jax.lax.scan(again, None, tuple(cut(x) for x in (hidden, *arrays)))
    return jax.tree.map(join, found)


def chunked_cross_entropy(head: Callable, hidden, targets, *, elements: int = ELEMENTS):
    """`cross_entropy(head(hidden), targets)`, `[B, L]`, see `chunked`."""
    return chunked(head, cross_entropy, hidden, targets, elements=elements)


def reduced_logits(denoise: Callable, x, point, reduce: Callable, *arrays):
    """`reduce(logits, *arrays)` of a denoiser at a point of the schedule, position by position.

    In pieces where the denoiser offers `reduced(x, t, reduce, *arrays)`, at once where not; `reduce` as
    in `chunked`.
    """
    own = getattr(denoise, "reduced", None)
    if own is not None:
        return own(x, point["t"], reduce, *arrays)
    return reduce(evaluate(denoise, x, point)[0], *arrays)


def token_cross_entropy(denoise: Callable, x, point, targets):
    """`-log p(targets_i | x)` of a denoiser at a point of the schedule, `[B, L]`, at least float32."""
    return reduced_logits(denoise, x, point, cross_entropy, targets)
