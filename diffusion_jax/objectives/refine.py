"""Losses that teach a masked model to revise tokens it can see (ReDiff, arXiv 2510.19871).

Stage 1, synthetic errors: of the positions that stay unmasked a share is replaced by wrong tokens, and
the network predicts every position:
  (1) loss = sum over parts of  w mean over the part of -log p(x0_i | x),
      parts: masked positions, replaced ones, untouched ones; w = 1 / p, p the mask rate
so that the three parts count alike, however many positions each has.
Stage 2, its own errors: a draft without masks and the text as an expert corrects it, of the same length:
  (2) loss = mean over the corrected positions of -log p(x0_i | draft)

Equivalences: (1) without replacement, for the masked part alone and summed instead of averaged, is
`masked_cross_entropy`, bit for bit (LLaDA's loss with masking "lambda", eps = 1e-3).
Deviations: the means are those of each sequence (the authors': of the batch on one device), so that a
loss does not depend on how a batch is laid out; a replacement is never the token itself; (2) has no
factor 1 / p (nothing is masked; the authors' code has one and a comment that it should not).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.numerics import example_keys, fold_all, is_concrete
from diffusion_jax.objectives.masked import build_masking
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.token_cross_entropy import token_cross_entropy
from diffusion_jax.registry import check_choice

_REPLACE = 0x2E9  # stream of the replacements, apart from that of the masks


def replace_tokens(keys, tokens, rate, where, vocab_size: int):
    """`(tokens, replaced)`: each token at `where` becomes another one, uniformly, with probability `rate`.

    Args:
      keys: one key an example, `[B]`.
      tokens: int `[B, L]`.
      rate: scalar.
      where: bool `[B, L]`.
    """
    shape = tokens.shape[1:]
    hit = jax.vmap(lambda key: jax.random.uniform(key, shape))(fold_all(keys, 0)) < rate
    draw = lambda key: jax.random.randint(key, shape, 1, vocab_size, tokens.dtype)
    other = (tokens + jax.vmap(draw)(fold_all(keys, 1))) % vocab_size
    replaced = hit & where
    return jnp.where(replaced, other, tokens), replaced


def refining_cross_entropy(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    replace: Any = 0.05,
    parts: Sequence[float] = (1.0, 1.0, 1.0),
    average: str = "count",
    weighted: bool = True,
    masking: str | Callable = "lambda",
    where=None,
    index=None,
    total: int | None = None,
    **options: Any,
):
    """Eq. (1), one value an example.

    Args:
      process: an `Absorbing` process.
      denoise: `(x int [B, L], t [B]) -> logits [B, L, V]`, whose logits at unmasked positions count too.
      key: of masks and replacements; example i's are folded with `index[i]`.
      tokens: int `[B, L]`, clean.
      replace: share of the unmasked positions that are replaced.
      parts: weights of the masked, the replaced and the untouched part.
      average: "count", the mean over the positions of each part; "sum", nats a sequence.
      weighted: multiply by the weight of the masking (1 / p).
      masking, options: see `masked.build_masking`; the paper's is "lambda" with eps = 1e-3.
      where: bool `[B, L]`, the positions that are masked, replaced and scored (default: all).
      index, total: positions in, and size of, the global batch.
    Returns:
      `(losses [B], aux)`; aux holds the means of the three parts, "cross_entropy", "replaced" and
      "untouched", `[B]` (0 for an empty part).
    Raises:
      ValueError: tokens that are not clean integers `[B, L]`, an option out of range.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    check_choice("average", average, ("count", "sum"))
    check_refining(replace, parts)
    index, total = global_index(tokens, index, total)
    drawn = build_masking(masking, **options)(process, key, tokens, index, total, where)
    masked = drawn.x == process.mask_id
    free = ~masked if where is None else ~masked & where
    keys = example_keys(jax.random.fold_in(key, _REPLACE), index)
    x, replaced = replace_tokens(keys, drawn.x, replace, free, process.vocab_size)
    each = token_cross_entropy(denoise, x, process.point(drawn.t), tokens)
    losses, means = 0.0, []
    for weight, part in zip(parts, (masked, replaced, free & ~replaced)):
        summed, count = jnp.where(part, each, 0.0).sum(axis=1), part.sum(axis=1)
        means.append(summed / jnp.maximum(count, 1))
        if weight:
            losses = losses + weight * (summed if average == "sum" else means[-1])
    if weighted:
        losses = jnp.where(masked.any(axis=1), drawn.weight, 0.0) * losses
    return losses, dict(zip(("cross_entropy", "replaced", "untouched"), means))


def check_refining(replace, parts):
    """Raises ValueError unless `replace` lies in [0, 1] and `parts` are three weights of at least 0."""
    if is_concrete(replace) and not 0.0 <= replace <= 1.0:
        raise ValueError(f"replace must lie in [0, 1], got {replace}")
    if len(parts) != 3 or any(p < 0 for p in parts) or not any(parts):
        raise ValueError(
            f"parts must be weights of the masked, replaced and untouched part, got {parts}"
        )


def correcting_cross_entropy(process, denoise: Callable, drafts, tokens, *, where=None):
    """Eq. (2), one value an example; 0 for a draft without an error.

    Args:
      process: an `Absorbing` process.
      denoise: as in `refining_cross_entropy`; told the time `process.t_min`.
      drafts: int `[B, L]`, without masks; no gradient flows into them.
      tokens: int `[B, L]`, the corrected text.
      where: bool `[B, L]`, the positions that count (default: all).
    Returns:
      `(losses [B], aux)`; aux holds "wrong", the share of wrong positions, `[B]`.
    Raises:
      ValueError: shapes that differ, tokens that are not clean integers `[B, L]`.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    if drafts.shape != tokens.shape:
        raise ValueError(f"drafts have shape {drafts.shape}, the corrected tokens {tokens.shape}")
    drafts = jax.lax.stop_gradient(drafts)
    t = jnp.full(tokens.shape[:1], process.t_min, jnp.result_type(float))
    each = token_cross_entropy(denoise, drafts, process.point(t), tokens)
    wrong = drafts != tokens
    wrong = wrong if where is None else wrong & where
    count = wrong.sum(axis=1)
    losses = jnp.where(wrong, each, 0.0).sum(axis=1) / jnp.maximum(count, 1)
    return losses, {"wrong": count / tokens.shape[1]}
