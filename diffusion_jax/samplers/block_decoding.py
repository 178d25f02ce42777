"""Decoding from left to right: token by token, block by block, window by window.

  left_to_right        autoregressive models: one token a call.
  block_decoding       block diffusion (BD3LM, arXiv 2503.09573): a block of masks is filled in, in an order
                       of `confidence` or by ancestral steps, then the next one. With blocks of one token
                       this is `left_to_right`; with one block, plain decoding of a masked model.
  semi_autoregressive  plain masked models beyond their length (MDLM, arXiv 2406.07524, section 4): the
                       last tokens become the prefix of the next window, whose rest is masked again.

All are one scan over blocks x steps. A denoiser with a key-value cache (`methods.decoding`) reads
`point["begin"]`, where the block begins, and `point["first"]`, whether this is the block's first call: it
then reads the block before together with the new one, so that no call is spent on the cache alone. It
may return the logits of the block alone.

A step in which no sequence has anything to reveal makes no call: a prompt costs none, `nfe` is the most
that can be made.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import fold_all, is_concrete
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.categorical import build_draw, draw_tokens, draw_where
from diffusion_jax.samplers.confidence import (
    ORDERS,
    order_scores,
    reveal_count,
    select,
    token_log_probs,
)
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    check_absorbing,
    check_length,
    check_logits,
    result,
)

BLOCK_ORDERS = (*ORDERS, "ancestral")
_CHUNK = 65_536  # numbers of a sequence that are drawn from at a time


class BlockState(NamedTuple):
    """Scan state: tokens `[B, L]`, and whether a call was needed so far (bool scalar)."""

    x: Any
    begun: Any


class PrefixPrepare(NamedTuple):
    """`Sampler.prepare`: a number of sequences, or tokens `[B, n]`, n <= L, followed by masks."""

    vocab_size: int
    length: int

    def __call__(self, x_init):
        if np.ndim(x_init) != 2:
            return MaskedPrepare(self.vocab_size, self.length)(x_init)
        tokens = MaskedPrepare(self.vocab_size, None)(x_init)
        missing = self.length - tokens.shape[1]
        if missing < 0:
            raise ValueError(
                f"a prompt of {tokens.shape[1]} tokens is longer than the length {self.length} that "
                "the sampler was built for"
            )
        return jnp.pad(tokens, ((0, 0), (0, missing)), constant_values=self.vocab_size)


def _start(rng, start, tokens):
    return BlockState(tokens, jnp.asarray(False))


class _Step(NamedTuple):
    """A step on `size` positions, of which the network sees `window` (None: all)."""

    vocab_size: int
    size: int
    window: int | None
    order: str
    greedy: bool

    def __call__(self, call, rng, state, inputs):
        tokens, begin, point = state.x, inputs["begin"], inputs["point"]
        block = jax.lax.dynamic_slice_in_dim(tokens, begin, self.size, axis=1)
        masked = block == self.vocab_size
        seen = tokens
        if self.window is not None:
            seen = jax.lax.dynamic_slice_in_dim(tokens, begin, self.window, axis=1)
        uniforms, places = self._draws(rng, block, inputs["draw"])
        if self.order != "ancestral":
            process = inputs["process"]
            share = jnp.maximum((seen == self.vocab_size).sum(axis=1), 1) / seen.shape[1]
            rate = jnp.minimum(share, process.mask_rate(jnp.ones_like(share)))
            t = process.t_of_mask_rate(rate)
            point = {**point, "t": t, "alpha": 1.0 - rate, "mask_rate": rate}

        def use(logits):
            logits = self._own(logits, seen, begin)
            filled = self._fill(logits, block, masked, uniforms, places, inputs)
            return jax.lax.dynamic_update_slice_in_dim(tokens, filled, begin, axis=1)

        # a call for the cache's sake: what was decoded before must be read, also by a given block
        open_here = masked.any()
        needed = open_here | (point["first"] & state.begun)
        x = call.when(needed, seen, point, use, tokens)
        return BlockState(x, state.begun | open_here), None

    def _own(self, logits, seen, begin):
        """The block's logits `[B, size, V]` of all, or as they are."""
        if logits.shape[1] == self.size:
            check_logits(logits, seen[:, : self.size], self.vocab_size)
            return logits
        check_logits(logits, seen, self.vocab_size)
        return jax.lax.dynamic_slice_in_dim(logits, begin, self.size, axis=1)

    def _draws(self, rng, block, draw):
        """Uniforms for the tokens and for the places, `[B, size]` or None where neither is random."""
        shape, places = block.shape[1:], None
        if self.greedy and self.order not in ("random", "ancestral"):
            return jnp.zeros(block.shape), None
        keys = rng()
        if self.order in ("random", "ancestral"):
            places = jax.vmap(lambda k: jax.random.uniform(k, shape))(fold_all(keys, 0))
        if self.greedy:
            return jnp.zeros(block.shape), places
        return draw.uniforms(fold_all(keys, 1), shape), places

    def _fill(self, logits, block, masked, uniforms, places, inputs):
        draw, most = inputs["draw"], max(4, _CHUNK // self.vocab_size)
        if self.size == 1:
            drawn = draw_tokens(uniforms, logits, draw).astype(block.dtype)
            return jnp.where(masked, drawn, block)
        if self.order == "ancestral":
            chosen = masked & (places < inputs["reveal"])
            return draw_where(uniforms, logits, chosen, draw, block, most)
        wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if self.order == "sampled":
            drawn = draw_where(uniforms, wide, masked, draw, block, most)
            scores = token_log_probs(wide, drawn)
        else:
            scores = places if self.order == "random" else order_scores(self.order, wide)
        left = masked.sum(axis=1)
        count = reveal_count("uniform", left, left, inputs["steps_left"], 0.0)
        chosen = select(scores, masked, count)
        if self.order == "sampled":
            return jnp.where(chosen, drawn, block)
        return draw_where(uniforms, wide, chosen, draw, block, most)


def _build(
    name, process, begins, sizes, num_steps, size, window, length, order, drawing
) -> Sampler:
    """A sampler over blocks.

    Args:
      begins, sizes: of the blocks: where each begins, how many tokens it reveals.
      num_steps: to spend at most, None for one a token.
      size: positions that a step handles, the most that a block has.
      window: see `_Step`.
    """
    check_choice("order", order, BLOCK_ORDERS)
    draw = build_draw(**drawing)
    blocks = len(begins)
    if num_steps is None:
        steps = sizes
    else:
        if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer):
            raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
        if num_steps < blocks:
            raise ValueError(
                f"num_steps = {num_steps} is too few: {blocks} blocks take one each at least"
            )
        steps = np.full(blocks, num_steps // blocks)
        steps = steps if order == "ancestral" else np.minimum(steps, sizes)
    within = [np.linspace(1.0, 0.0, n + 1) for n in steps]
    t, s = (np.concatenate([grid[part] for grid in within]) for part in (np.s_[:-1], np.s_[1:]))
    points, following = process.point(t), process.point(s)
    total = int(np.sum(steps))
    reveal = np.where(s > 0, process.reveal_probability(t, s), 1.0)
    where = np.repeat(np.asarray(begins, np.int32), steps)
    points["begin"] = where
    points["first"] = np.concatenate([np.arange(n) == 0 for n in steps])
    following["begin"], following["first"] = where, np.zeros(total, bool)
    temperature = drawing.get("temperature", 1.0)
    greedy = is_concrete(temperature) and temperature == 0
    return Sampler(
        init=_start,
        step=_Step(process.vocab_size, size, window, order, greedy),
        finish=result,
        xs={
            "point": points,
            "next": following,
            "begin": np.minimum(where, length - size),
            "steps_left": np.concatenate([np.arange(n, 0, -1, dtype=np.int32) for n in steps]),
            "reveal": reveal,
            "draw": jax.tree.map(lambda v: np.full(total, v), draw),
            "process": jax.tree.map(lambda v: np.full(total, v), process),
        },
        start=(),
        nfe=total,
        prepare=PrefixPrepare(process.vocab_size, int(length)),
        stochastic=not greedy or order in ("random", "ancestral"),
        name=name,
    )


def _check_lengths(name, process, length, **sizes):
    check_absorbing(process)
    if length is None:
        raise ValueError(f"{name} needs the sequence length")
    check_length(length)
    for field, value in sizes.items():
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}: {field} must be a positive int, got {value!r}")


@register("sampler", "left_to_right", family="discrete", calls="length")
def left_to_right(process, length: int, **drawing) -> Sampler:
    """One token a call, from left to right: sampling from an autoregressive model.

    Args:
      process: an `Absorbing` process; its mask id marks the tokens that are still to come.
      length: L. `x_init` is a number of sequences, or prompts `[B, n]`, n <= L: the masks among them
        and what follows are filled in.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, a bad length, an unknown or bad option.
    """
    _check_lengths("left_to_right", process, length)
    begins, sizes = np.arange(length), np.ones(length, int)
    return _build("left_to_right", process, begins, sizes, None, 1, None, length, "left", drawing)


@register("sampler", "block_decoding", family="discrete", paper="2503.09573", grid=False)
def block_decoding(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    block_size: int | None = None,
    order: str = "random",
    **drawing,
) -> Sampler:
    """Blocks of masks filled in one after the other (BD3LM, arXiv 2503.09573, section 3.3).

    Args:
      process: an `Absorbing` process.
      num_steps: network calls for all blocks together, default `length`; rounded down to as many for
        every block.
      length: L, any multiple of the block size or not (the last block is then shorter). `x_init` is a
        number of sequences, or prompts `[B, n]`, n <= L: masks among them and what follows are filled in.
      block_size: tokens in a block.
      order: in which a block is revealed: "random" (first-hitting, exact with one step a token), "left",
        "confidence", "margin", "entropy", "sampled" (see `confidence`), or "ancestral".
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, a bad length, block size, order or option, fewer steps than
        blocks.
    """
    _check_lengths("block_decoding", process, length, block_size=block_size)
    size = min(block_size, length)
    begins = np.arange(0, length, size)
    sizes = np.minimum(size, length - begins)
    return _build(
        "block_decoding", process, begins, sizes, num_steps, size, None, length, order, drawing
    )


@register("sampler", "semi_autoregressive", family="discrete", paper="2406.07524", grid=False)
def semi_autoregressive(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    window: int | None = None,
    stride: int | None = None,
    order: str = "ancestral",
    **drawing,
) -> Sampler:
    """Texts of any length from a masked model of one length (MDLM, arXiv 2406.07524, section 4).

    The first window is decoded whole; then the last `window - stride` tokens are the prefix of the
    next one, of which `stride` tokens are new. The network sees one window, at positions 0..window - 1.

    Args:
      process: an `Absorbing` process.
      num_steps: network calls for all windows together, default one a token; rounded down to as many
        for every window.
      length: of the text, `window` plus any multiple of `stride`. `x_init` as in `block_decoding`.
      window: the length that the model was trained on.
      stride: new tokens in a window, default half of it.
      order: see `block_decoding`.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, lengths that do not fit, a bad order or option, fewer steps
        than windows.
    """
    stride = max(window // 2, 1) if stride is None and isinstance(window, int) else stride
    _check_lengths("semi_autoregressive", process, length, window=window, stride=stride)
    if stride > window or length < window or (length - window) % stride:
        raise ValueError(
            f"semi_autoregressive: length {length} must be window = {window} plus a multiple of "
            f"stride = {stride}, which is at most the window"
        )
    begins = np.arange(0, length - window + 1, stride)
    sizes = np.where(begins == 0, window, stride)
    return _build(
        "semi_autoregressive",
        process,
        begins,
        sizes,
        num_steps,
        window,
        window,
        length,
        order,
        drawing,
    )
