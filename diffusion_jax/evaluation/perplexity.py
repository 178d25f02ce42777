"""Perplexity of token models: Monte Carlo bounds, likelihoods along an order, whole sets of text.

Perplexity is exp(nats per token); a bound on -log p gives an upper bound on it. Which estimate a number
comes from matters more than its digits:
  `estimate_bound`   a method's own bound, one draw an example and repetition: for data sets
  `count_bound`      the masked bound by counts of masks (`objectives.masked`, k-DCE), many draws of one
                     sequence spread evenly: for single answers, given their prompts
  `order_nats`       the chain rule along any order, with the rest masked: exact for that order; its mean
                     over orders is the bound of a network that does not see the time
Exact values of short sequences: `mask_sets`.
"""

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from diffusion_jax.data.codecs import codec_of
from diffusion_jax.data.files import decode_utf8, read_bytes
from diffusion_jax.data.text import CLEANS, clean_text8
from diffusion_jax.numerics import example_keys
from diffusion_jax.objectives.masked import masked_cross_entropy
from diffusion_jax.objectives.per_example import global_index
from diffusion_jax.objectives.token_cross_entropy import token_cross_entropy
from diffusion_jax.registry import check_choice

MAX_BYTES = 2 * 2**30
UNKNOWNS = ("error", "drop")


class Perplexity(NamedTuple):
    """A likelihood per token.

    Attributes:
      tokens: how many were scored.
      nats_per_token, bits_per_token, perplexity: the mean, in three units.
      standard_error: of the nats, from the repetitions; 0 for what is not random, None for one draw.
    """

    tokens: int
    nats_per_token: float
    bits_per_token: float
    perplexity: float
    standard_error: float | None


def summarise(nats, tokens: int) -> Perplexity:
    """Nats a sequence of every repetition, `[draws, N]`, as a `Perplexity` of `tokens` tokens in all.

    Raises:
      ValueError: no draws, or no tokens.
    """
    nats = np.asarray(nats, np.float64)
    if nats.ndim != 2 or 0 in nats.shape or tokens < 1:
        raise ValueError(
            f"a perplexity needs nats [draws, N] and tokens, got {nats.shape} and {tokens}"
        )
    means = nats.sum(axis=1) / tokens
    mean, draws = float(means.mean()), len(means)
    error = float(means.std() / np.sqrt(draws - 1)) if draws > 1 else None
    return Perplexity(int(tokens), mean, mean / math.log(2.0), _exp(mean), error)


def _exp(nats: float) -> float:
    """exp without an OverflowError: a model that rules a token out has an infinite perplexity."""
    return math.exp(nats) if nats < 700.0 else math.inf


def estimate_bound(
    bound: Callable,
    params: Any,
    key,
    data: Mapping[str, Any],
    *,
    draws: int = 16,
    batch_size: int = 250,
    progress: bool = False,
) -> np.ndarray:
    """`draws` independent repetitions of a method's `bound` on a data set.

    Args:
      bound: `(params, key, batch) -> [B]` nats.
      data: arrays with a leading axis N, "index" among them.
      batch_size: at most so many examples at a time, in chunks as equal as can be.
      progress: show a bar when standard error is a terminal.
    Returns:
      float64 `[draws, N]`.
    Raises:
      ValueError: draws or batch_size below 1.
    """
    for name, value in (("draws", draws), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    one, count = jax.jit(bound), len(data["index"])
    size = -(-count // -(-count // batch_size))
    out = np.empty((draws, count))
    with tqdm.tqdm(
        total=draws * count, disable=None if progress else True, desc="bound", unit="example"
    ) as bar:
        for i in range(draws):
            draw_key = jax.random.fold_in(key, i)
            for at in range(0, count, size):
                part = {k: v[at : at + size] for k, v in data.items()}
                out[i, at : at + size] = one(params, jax.random.fold_in(draw_key, at), part)
                bar.update(len(part["index"]))
    return out


def count_bound(
    process,
    denoise: Callable,
    key,
    tokens,
    *,
    draws: int = 128,
    where=None,
    index=None,
    total: int | None = None,
):
    """The masked bound of every sequence, by counts of masks spread evenly over its draws (k-DCE).

    With `where` it is the bound on the likelihood of these positions given the others: the answer to a
    prompt (SMDM, arXiv 2410.18514; LLaDA).

    Args:
      process: an `Absorbing` process.
      denoise: `(x int [B, L], t [B]) -> logits [B, L, V]`, called once a draw.
      key: of counts and masks.
      tokens: int `[B, L]`.
      where: bool `[B, L]` or None.
      index, total: positions in, and size of, the global batch.
    Returns:
      `[draws, B]` nats. Their spread over the draws is an upper bound on the error: even counts make
      the mean better than independent ones.
    Raises:
      ValueError: draws below 1, and as `objectives.masked_cross_entropy`.
    """
    if draws < 1:
        raise ValueError(f"draws must be positive, got {draws}")
    index, total = global_index(tokens, index, total)

    def one(draw):
        losses, _ = masked_cross_entropy(
            process,
            denoise,
            key,
            tokens,
            masking="count",
            where=where,
            index=draw * total + index,
            total=draws * total,
        )
        return losses

    return jax.lax.map(one, jnp.arange(draws))


def order_nats(process, denoise: Callable, tokens, order=None, where=None):
    """`-log p` of every token given those before it in an order, all others masked.

    `order = None` is left to right: the chain rule by which SMDM (arXiv 2410.18514) scores answers. One
    call a position.

    Args:
      process: an `Absorbing` process.
      denoise: `(x int [B, L], t [B]) -> logits [B, L, V]`.
      tokens: int `[B, L]`, clean.
      order: int `[B, L]`, permutations of the positions, the first one to be revealed first.
      where: bool `[B, L]`, the positions to score; the others are given from the start.
    Returns:
      `[B, L]`, 0 where not scored. Sums over positions are likelihoods.
    Raises:
      ValueError: tokens that are not clean integers, an order or `where` of another shape.
    """
    process.check_tokens(tokens, process.vocab_size - 1)
    batch, length = tokens.shape
    order = jnp.broadcast_to(jnp.arange(length), tokens.shape) if order is None else order
    where = jnp.ones(tokens.shape, bool) if where is None else jnp.asarray(where)
    for name, given in (("order", order), ("where", where)):
        if given.shape != tokens.shape:
            raise ValueError(f"{name} must have shape {tokens.shape}, got {given.shape}")
    # turn of each position among those to be scored
    place = jnp.argsort(order, axis=1)
    scored = jnp.take_along_axis(where, order, axis=1)
    turn = jnp.take_along_axis(jnp.cumsum(scored, axis=1) - 1, place, axis=1)
    free = where.sum(axis=1)

    def step(total, now):
        hidden = where & (turn >= now)
        x = jnp.where(hidden, jnp.asarray(process.mask_id, tokens.dtype), tokens)
        # the mean rate at which so many masks are left
        t = process.t_of_mask_rate(hidden.sum(axis=1) / (free + 1.0))
        each = token_cross_entropy(denoise, x, process.point(t), tokens)
        return total + jnp.where(where & (turn == now), each, 0.0), None

    dtype = jax.eval_shape(
        lambda: token_cross_entropy(denoise, tokens, process.point(jnp.zeros(batch)), tokens)
    ).dtype
    return jax.lax.scan(step, jnp.zeros(tokens.shape, dtype), jnp.arange(length))[0]


def any_order_nats(
    process, denoise: Callable, key, tokens, *, orders: int = 8, where=None, index=None
):
    """`-log p` along random orders, `[orders, B]`; one call a position and order.

    Arguments as `order_nats`; `key` is folded with the order's number and `index`.
    """
    index, _ = global_index(tokens, index, None)

    def one(number):
        keys = example_keys(jax.random.fold_in(key, number), index)
        order = jax.vmap(lambda k: jax.random.permutation(k, tokens.shape[1]))(keys)
        return order_nats(process, denoise, tokens, order, where).sum(axis=1)

    return jax.lax.map(one, jnp.arange(orders))


# Sets of text.


class TextSet(NamedTuple):
    """A text as windows of a model's tokens.

    Attributes:
      name: of the set.
      tokens: int32 `[N, L]`, windows one after the other.
      left_over: tokens after the last whole window, which are not scored.
      changed: characters that were mapped or dropped because the vocabulary lacks them.
    """

    name: str
    tokens: np.ndarray
    left_over: int
    changed: int


def read_text_set(
    spec,
    name: str,
    path: str | pathlib.Path,
    *,
    clean: str | None = None,
    unknown: str = "error",
    max_bytes: int = MAX_BYTES,
) -> TextSet:
    """A text file in the vocabulary of a model's data.

    Args:
      spec: the `DataSpec` of the data that the model learned: characters, bytes or a tokenizer file.
      name: of the set, for errors and tables.
      path: a UTF-8 text, plain or gzip.
      clean: "text8" reduces the text to a-z and single spaces before it is tokenised.
      unknown: what becomes of a character outside a vocabulary of characters: "error", "drop", or a
        symbol of the vocabulary that takes its place.
    Raises:
      ValueError: a file that cannot be read, is not UTF-8, or shorter than one window; a character
        outside the vocabulary; a model whose tokens are no text; a clean or unknown that does not exist.
    """
    codec, length = codec_of(spec), spec.shape[0]
    if clean is not None:
        check_choice("clean", clean, CLEANS)
    symbols = spec.symbols if spec.show == "text" else None
    if unknown not in UNKNOWNS:
        check_choice("unknown", unknown, (*UNKNOWNS, *(symbols or ())))
    text = decode_utf8(read_bytes(path, max_bytes), path)
    text = clean_text8(text) if clean == "text8" else text
    changed = 0
    if symbols is not None and unknown != "error":
        known = set(symbols)
        wrong = {c: unknown if unknown != "drop" else "" for c in set(text) - known}
        changed = sum(text.count(c) for c in wrong)
        text = text.translate(str.maketrans(wrong))
    try:
        tokens = codec.encode(text)
    except ValueError as error:
        remedies = [] if clean else [f"clean={c!r}" for c in CLEANS]
        remedies = " or ".join([*remedies, "unknown='drop'", "unknown=<a symbol>"])
        raise ValueError(f"text {name!r}: {error}; map the text with {remedies}") from error
    count = len(tokens) // length
    if not count:
        raise ValueError(
            f"text {name!r} has {len(tokens)} tokens, fewer than one window of {length}"
        )
    windows = tokens[: count * length].reshape(count, length)
    return TextSet(name, windows.astype(np.int32), len(tokens) - count * length, changed)


def score_sets(
    method,
    params: Any,
    sets: Mapping[str, Mapping[str, np.ndarray]],
    *,
    draws: int = 16,
    seed: int = 0,
    batch_size: int = 100,
    progress: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Perplexities of several data sets.

    Args:
      method: a `Method` with a `bound`.
      sets: name -> arrays with a leading axis N: "tokens" int `[N, L]` and the model's conditions. Where
        there is a "scored" bool `[N, L]`, its tokens alone count (the bound must be of these).
      draws: repetitions of the bound, for its standard error.
    Returns:
      One dict a set, "set", "sequences" and the fields of `Perplexity`; and the mean nats of every
      sequence, name -> `[N]`.
    Raises:
      ValueError: a method without a bound.
    """
    if method.bound is None:
        raise ValueError("this method has no likelihood bound")
    rows, each = [], {}
    for name, data in sets.items():
        data = {k: np.asarray(v) for k, v in data.items()}
        scored = data.pop("scored", None)
        count = len(data["tokens"])
        nats = estimate_bound(
            method.bound,
            params,
            jax.random.key(seed),
            data | {"index": np.arange(count, dtype=np.int32)},
            draws=draws,
            batch_size=batch_size,
            progress=progress,
        )
        found = summarise(nats, data["tokens"].size if scored is None else int(scored.sum()))
        rows.append({"set": name, "sequences": count, **found._asdict()})
        each[name] = nats.mean(axis=0)
    return rows, each


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `score_sets` as a Markdown table."""
    from diffusion_jax.evaluation.report import markdown_table

    columns = {
        "set": "set",
        "tokens": "tokens",
        "nats_per_token": "nats per token",
        "bits_per_token": "bits per token",
        "perplexity": "perplexity",
        "standard_error": "standard error (nats)",
    }
    return markdown_table(rows, columns, digits=4)
