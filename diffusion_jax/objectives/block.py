"""Block diffusion: autoregressive over blocks, masked diffusion inside each (BD3LM, arXiv 2503.09573).

  (1) -log p(x) = sum over blocks b of -log p(x^b | x^<b)                                         [eq. 3]
  (2)          <= sum over b of the integral over r of E[S_b] / r dr                              [eq. 8]
with r the mask rate of block b and S_b the cross-entropy summed over its masked positions, each predicted
from what is unmasked in its block and the clean tokens of all earlier blocks. (2) is (1) for blocks of one
token, the bound of `objectives.masked` for one block, and exact for a model that is.

A denoiser gets both: `denoise(x_t, t, clean=x_0)`, t `[B, L]` (one time a block), and gives the logits of
all blocks at once (`networks.visibility`, "streams"); for a masked model `blockwise` makes one.

Every block draws its own mask rate; those of a sequence, and those of a block over the batch, are spread
evenly with one random shift. `clip` = (low, high) keeps rates where the estimate of (2) varies little (section 5 of the paper): a
loss of another weighting, for training alone; `search_clip` finds it.

Deviations: a sequence's rates lie apart (theirs lie together, one fine grid over all blocks of the batch); masks are not drawn again until their share lies in `clip`; the search is a
function to be called, not a part of the training loop. `masking="count"` is ours: a uniform number of
masks in each block, as in `objectives.masked`.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import evaluate
from diffusion_jax.numerics import example_keys, is_concrete
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.times import stratified
from diffusion_jax.objectives.token_cross_entropy import cross_entropy
from diffusion_jax.registry import check_choice

_MAX_ENUMERATED = 12


class BlockMasking(NamedTuple):
    """Masked sequences and the weights of their cross-entropies.

    Attributes:
      x: int `[B, L]`, mask ids among the tokens.
      t: `[B, L]`, the time of each position's block.
      weight: `[B, L]`.
    """

    x: Any
    t: Any
    weight: Any


def block_sizes(length: int, block_size: int) -> np.ndarray:
    """Tokens in each block, int `[blocks]`; the last one may be shorter.

    Raises:
      ValueError: a block size that is no positive int.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive int, got {block_size!r}")
    begins = np.arange(0, length, block_size)
    return np.minimum(block_size, length - begins)


def _spread(key, index, total, blocks):
    """Uniform numbers `[B, blocks]`: even grids over the batch and over a sequence, one random shift."""
    return (stratified(key, index, total)[:, None] + jnp.arange(blocks) / blocks) % 1.0


def _uniforms(key, index, length):
    return jax.vmap(lambda k: jax.random.uniform(k, (length,)))(example_keys(key, index))


def check_clip(clip) -> None:
    """Raises ValueError unless `clip` holds two rates, 0 <= low < high <= 1."""
    low, high = clip
    if is_concrete(low, high) and not 0.0 <= low < high <= 1.0:
        raise ValueError(f"clip must be 0 <= low < high <= 1, got {(low, high)}")


def by_time(process, key, tokens, index, total, block_size, clip=(0.0, 1.0)) -> BlockMasking:
    """Independent masks at a time of each block; mask rates within `clip`, times within [t_min, 1].

    The weight is w(t) / p(t) over the width of the clip: 1 / r for the linear schedule, as the paper has
    it, so that a narrower clip is no smaller loss.
    """
    check_clip(clip)
    low, high = clip
    sizes = block_sizes(tokens.shape[1], block_size)
    t_key, mask_key = jax.random.split(key)
    ends = (process.t_of_mask_rate(jnp.asarray(v, jnp.float32)) for v in (low, high))
    first, last = (jnp.maximum(end, process.t_min) for end in ends)
    t = last - (last - first) * _spread(t_key, index, total, len(sizes))
    weight = process.weight(t) * (last - first) / (high - low)
    t, weight = (
        jnp.repeat(v, sizes, axis=1, total_repeat_length=tokens.shape[1]) for v in (t, weight)
    )
    hit = _uniforms(mask_key, index, tokens.shape[1]) < process.mask_rate(t)
    return BlockMasking(_masked(process, tokens, hit), t, weight)


def by_count(process, key, tokens, index, total, block_size) -> BlockMasking:
    """Exactly k masks in a block of n, k ~ U{1..n}, weight n / k: (2) itself, and of finite variance."""
    length = tokens.shape[1]
    sizes = block_sizes(length, block_size)
    count_key, mask_key = jax.random.split(key)
    count = jnp.floor(_spread(count_key, index, total, len(sizes)) * sizes).astype(jnp.int32) + 1
    count = jnp.minimum(count, sizes)
    padding = len(sizes) * block_size - length
    uniform = jnp.pad(
        _uniforms(mask_key, index, length), ((0, 0), (0, padding)), constant_values=2.0
    ).reshape(-1, len(sizes), block_size)
    order = jnp.argsort(uniform, axis=2)
    hit = jnp.argsort(order, axis=2) < count[..., None]
    last = jnp.take_along_axis(order, count[..., None] - 1, axis=2)
    rate = jnp.take_along_axis(uniform, last, axis=2)[..., 0]
    rate, weight = (jnp.repeat(v, block_size, axis=1)[:, :length] for v in (rate, sizes / count))
    hit = hit.reshape(-1, len(sizes) * block_size)[:, :length]
    t = process.t_of_mask_rate(jnp.minimum(rate, 1.0))
    return BlockMasking(_masked(process, tokens, hit), t, weight.astype(rate.dtype))


BLOCK_MASKINGS = {"continuous": by_time, "count": by_count}


def _masked(process, tokens, hit):
    return jnp.where(hit, jnp.asarray(process.mask_id, tokens.dtype), tokens)


def stream_cross_entropy(denoise: Callable, x, point, clean, targets):
    """`-log p(target)` of a denoiser of two streams, `[B, n]`; its own `cross_entropy` where it has one."""
    own = getattr(denoise, "cross_entropy", None)
    if own is not None:
        return own(x, point["t"], targets, clean=clean)
    return cross_entropy(denoise(x, point["t"], clean=clean), targets)


def block_cross_entropy(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    block_size: int,
    masking: str | Callable = "count",
    index=None,
    total: int | None = None,
    next_token: float | None = None,
    **options: Any,
):
    """One-sample estimate of the bound (2), nats a sequence, one value an example.

    Args:
      process: an `Absorbing` process.
      denoise: `(x_t int [B, L], t [B, L], clean=int [B, L]) -> logits [B, L, V]`.
      key: split into mask rates and masks; example i's masks are folded with `index[i]`.
      tokens: int `[B, L]`, clean.
      block_size: tokens in a block; the last one may be shorter.
      masking, options: "count", "continuous" (option `clip`), or a callable like `by_count`.
      index, total: positions in, and size of, the global batch.
      next_token: weight of the clean stream's next-token cross-entropy, for denoisers that give its
        logits behind the others, `[B, 2 L, V]` (DiDA); None for those that do not.
    Returns:
      `(losses [B], aux)`; aux holds `masked` (the fraction masked), `cross_entropy`, the mean over
      masked positions, and `next_token`, the mean over the clean stream where there is one, all `[B]`.
    Raises:
      ValueError: tokens that are not clean integers `[B, L]`, logits of another shape, a bad block size,
        masking or option.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    block_sizes(tokens.shape[1], block_size)
    index, total = global_index(tokens, index, total)
    if not callable(masking):
        check_choice("masking", masking, BLOCK_MASKINGS)
        masking = BLOCK_MASKINGS[masking]
    drawn = masking(process, key, tokens, index, total, block_size, **options)
    masked = drawn.x == process.mask_id
    targets = tokens if next_token is None else jnp.concatenate([tokens, tokens], axis=1)
    each = stream_cross_entropy(denoise, drawn.x, process.point(drawn.t), tokens, targets)
    length = tokens.shape[1]
    noisy = jnp.where(masked, each[:, :length], 0.0)
    losses = (jnp.where(masked, drawn.weight, 0.0) * noisy).sum(axis=1)
    count = masked.sum(axis=1)
    aux = {
        "masked": count / length,
        "cross_entropy": noisy.sum(axis=1) / jnp.maximum(count, 1),
    }
    if next_token is not None:
        own = each[:, length:].sum(axis=1)
        losses, aux["next_token"] = losses + next_token * own, own / length
    return losses, aux


class Blockwise(NamedTuple):
    """A masked model as a denoiser of two streams; see `blockwise`."""

    denoise: Any
    mask_id: int
    block_size: int

    def __call__(self, x, t, *, clean):
        position = np.arange(x.shape[1])
        logits = []
        for begin in range(0, x.shape[1], self.block_size):
            end = begin + self.block_size
            seen = jnp.where(position < begin, clean, x)
            seen = jnp.where(position < end, seen, jnp.asarray(self.mask_id, x.dtype))
            time = t if jnp.ndim(t) < 2 else t[:, begin]
            logits.append(evaluate(self.denoise, seen, {"t": time})[0][:, begin:end])
        return jnp.concatenate(logits, axis=1)


def blockwise(denoise: Callable, process, block_size: int) -> Blockwise:
    """A masked model's predictions of every block, later blocks masked: one call a block.

    Its bound (2) is that of decoding the model block by block; with blocks of one token the likelihood
    by the chain rule.

    Args:
      denoise: `(x int [B, L], t) -> logits [B, L, V]`.
    """
    return Blockwise(denoise, process.mask_id, block_size)


def exact_block_bound(process, denoise: Callable, tokens, *, block_size: int) -> np.ndarray:
    """The bound (2) without sampling: all sets of masks of a block, of all blocks at once.

    A set of m masks in a block of n weighs (m - 1)! (n - m)! / n!, as integrating out the rate leaves it.

    Args:
      process, denoise, tokens, block_size: as for `block_cross_entropy`; blocks of at most 12 tokens.
    Returns:
      float64 `[N]`, nats a sequence.
    Raises:
      ValueError: as `block_cross_entropy`, and blocks too long to enumerate.
    """
    tokens = jnp.asarray(tokens)
    process.check_tokens(tokens, process.vocab_size - 1)
    length = tokens.shape[1]
    sizes = block_sizes(length, block_size)
    size = min(block_size, length)
    if size > _MAX_ENUMERATED:
        raise ValueError(f"blocks of {size} tokens are too long to enumerate; at most 12")
    sets = np.array(list(itertools.product([False, True], repeat=size)))[1:]
    tiled = np.tile(sets, len(sizes))[:, :length]
    block = np.repeat(np.arange(len(sizes)), sizes)

    @jax.jit
    def summed(hit):
        x, t = _masked(process, tokens, hit), jnp.full(tokens.shape, 0.5)
        each = stream_cross_entropy(denoise, x, process.point(t), tokens, tokens)
        return jnp.where(hit, each, 0.0)

    total = np.zeros(len(tokens))
    for hit in tiled:
        weight = np.zeros(length)
        for b, n in enumerate(sizes):
            m = int(hit[block == b].sum())
            if m:  # a shorter block meets each of its sets several times
                each = math.factorial(m - 1) * math.factorial(n - m) / math.factorial(n)
                weight[block == b] = each / 2.0 ** (size - n)
        total += (np.asarray(summed(hit), np.float64) * weight).sum(axis=1)
    return total


class ClipSearch(NamedTuple):
    """What `search_clip` found.

    Attributes:
      clip: (low, high) of least variance.
      variances: of every candidate, (low, high) -> variance.
    """

    clip: tuple[float, float]
    variances: Mapping[tuple[float, float], float]


def search_clip(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    block_size: int,
    draws: int = 16,
    widths=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    step: float = 0.05,
) -> ClipSearch:
    """The range of mask rates in which the loss varies least (BD3LM, section 5.2). On the host.

    Args:
      process, denoise, tokens, block_size: as for `block_cross_entropy`.
      key: all candidates use the same draws.
      draws: of the masks of all sequences.
      widths: of the ranges that are tried, in (0, 1].
      step: between the lower ends of ranges of one width.
    Raises:
      ValueError: bad widths or step, fewer than two draws.
    """
    if not all(0.0 < w <= 1.0 for w in widths) or not step > 0 or draws < 2:
        raise ValueError(
            f"search_clip needs widths in (0, 1], a positive step and two draws, got {widths}, "
            f"{step}, {draws}"
        )

    @jax.jit
    def variance(clip):
        def one(n):
            losses, _ = block_cross_entropy(
                process,
                denoise,
                jax.random.fold_in(key, n),
                tokens,
                block_size=block_size,
                masking="continuous",
                clip=clip,
            )
            return losses

        return jax.lax.map(one, jnp.arange(draws)).var(axis=0, ddof=1).mean()

    found = {}
    for width in widths:
        for low in np.arange(0.0, 1.0 - width + 1e-9, step):
            clip = (round(float(low), 6), round(float(min(low + width, 1.0)), 6))
            found[clip] = float(variance(jnp.asarray(clip, jnp.float32)))
    return ClipSearch(min(found, key=found.get), found)
