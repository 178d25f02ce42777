"""Decoding in an order that the model chooses: confidence, margin, entropy; MaskGIT, LLaDA, refinement.

In every step the masked positions of a sequence are ranked by a score and the first of them revealed,
each sequence by itself:
  (1) "random" and "left": no score of the model; one position a step is exact any-order sampling.
  (2) "confidence" max_v p(v), "margin" p of the first token minus p of the second (arXiv 2502.06768),
      "entropy": functions of the state. One position a step is exact too: which position comes next
      says nothing about its value.
  (3) "sampled", p of the token that was drawn (MaskGIT, arXiv 2202.04200; "low_confidence" of LLaDA,
      arXiv 2502.09992): draws at every masked position and keeps the likeliest. Not exact for a perfect
      model, likely tokens come too often: a way to trade diversity for likelihood.
Several positions a step are drawn independently of each other: not exact in any order.

How many are revealed (`counts`): "uniform", n masks over S steps, n // S each and one more in the first
n % S (LLaDA); "cosine", floor(n cos(pi/2 k/S)) are left after step k, at least one in between (MaskGIT).
Ties go to the lowest position.

Equivalences: order "random" with one position a step has the law of first-hitting sampling; "sampled" at
temperature 0 is "confidence"; no revision is plain confidence decoding, bit for bit.
Deviations: blocks are runs of `block_length` masked positions, counted from each sequence's own first
mask (LLaDA: from the end of a prompt that all sequences share). A network with a time is told the time
at which the expected share of masks is the one that it sees.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import fold_all, is_concrete, namespace
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.categorical import build_draw, draw_where
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.token_states import (
    MaskedPrepare,
    check_absorbing,
    check_length,
    check_logits,
    result,
)

ORDERS = ("random", "left", "confidence", "margin", "entropy", "sampled")
SCHEDULES = ("uniform", "cosine")
_NOISY = ("confidence", "sampled")
_GIVEN = -1  # block of a position that was never masked
_CHUNK = 65_536  # numbers of a sequence that are drawn from at a time


def order_scores(order: str, logits):
    """Scores `[..., L]` of the positions, the highest is revealed first; NumPy or JAX.

    Args:
      order: "left", "confidence" (the log-probability of the likeliest token), "margin" or "entropy";
        the others rest on draws.
      logits: `[..., L, V]`, of the network as it is: temperature and filters shape the draw only.
    Raises:
      ValueError: another order.
    """
    check_choice("order", order, ("left", "confidence", "margin", "entropy"))
    xp = namespace(logits)
    if order == "left":
        return xp.broadcast_to(-xp.arange(logits.shape[-2]) * 1.0, logits.shape[:-1])
    top = logits.max(axis=-1, keepdims=True)
    first = logits.argmax(axis=-1)[..., None]
    others = xp.where(xp.arange(logits.shape[-1]) == first, -xp.inf, logits - top)
    rest = xp.exp(others).sum(axis=-1)  # the likeliest token has weight 1: exact where it is sure
    if order == "confidence":
        return -xp.log1p(rest)
    if order == "margin":
        return (1.0 - xp.exp(others.max(axis=-1))) / (1.0 + rest)
    finite = xp.where(xp.isfinite(others), others, 0.0)
    return (xp.exp(others) * finite).sum(axis=-1) / (1.0 + rest) - xp.log1p(rest)


def token_log_probs(logits, tokens):
    """Log-probabilities `[...]` of tokens `[...]` under logits `[..., V]`; NumPy or JAX."""
    xp = namespace(logits, tokens)
    top = logits.max(axis=-1, keepdims=True)
    total = xp.log(xp.exp(logits - top).sum(axis=-1))
    place = xp.clip(tokens, 0, logits.shape[-1] - 1)[..., None]
    return xp.take_along_axis(logits - top, place, axis=-1)[..., 0] - total


def select(scores, candidates, count):
    """The `count` candidates of highest score in each sequence, bool `[B, L]`; NumPy or JAX.

    Args:
      scores: `[B, L]`.
      candidates: bool `[B, L]`; where there are fewer than `count`, all of them.
      count: int `[B]`.
    """
    xp = namespace(scores, candidates, count)
    scores = xp.where(candidates, xp.maximum(scores, xp.finfo(scores.dtype).min), -xp.inf)
    order = xp.argsort(-scores, axis=-1, stable=True)  # of equal scores the lowest position first
    rank = xp.argsort(order, axis=-1, stable=True)
    return candidates & (rank < count[..., None])


def reveal_count(schedule: str, left, begun, steps_left, keep):
    """How many positions `[B]` of each sequence a step reveals; NumPy or JAX.

    Args:
      schedule: of `SCHEDULES`.
      left: int `[B]`, masks that there are.
      begun: int `[B]`, masks that there were before the first step.
      steps_left: int, this step included.
      keep: share of `begun` left after this step ("cosine").
    """
    xp = namespace(left, begun, steps_left, keep)
    if schedule == "uniform":
        return -(-left // steps_left)
    kept = xp.floor(begun * keep + 1e-3).astype(left.dtype)  # rounding must not cost a whole one
    kept = xp.where(steps_left > 1, xp.maximum(xp.minimum(kept, left - 1), 1), 0)
    return xp.maximum(left - kept, 0)


class ConfidenceState(NamedTuple):
    """Scan state: tokens `[B, L]`, and the block int32 `[B, L]` of each position, -1 where given."""

    x: Any
    block: Any


class _Start(NamedTuple):
    vocab_size: int
    block_length: int | None

    def __call__(self, rng, start, tokens):
        masked = tokens == self.vocab_size
        number = jnp.cumsum(masked, axis=1, dtype=jnp.int32) - 1
        block = jnp.zeros_like(number) if self.block_length is None else number // self.block_length
        return ConfidenceState(tokens, jnp.where(masked, block, _GIVEN))


class _Step(NamedTuple):
    vocab_size: int
    order: str
    schedule: str | None  # None: inputs["count"] says
    greedy: bool
    noisy: bool
    threshold: bool
    revise: bool
    revise_given: bool

    def __call__(self, call, rng, state, inputs):
        tokens, process = state.x, inputs["process"]
        masked = tokens == self.vocab_size
        here = state.block == inputs["block"]
        candidates = masked & here
        count = self._count(candidates.sum(axis=1), here.sum(axis=1), inputs)
        revealed = (here | (state.block == _GIVEN) if self.revise_given else here) & ~masked
        needed = (count > 0).any()
        if self.revise:
            needed |= (inputs["revise"] > 0) & revealed.any()
        uniforms, places = self._draws(rng, tokens, inputs["draw"])

        def use(logits):
            check_logits(logits, tokens, self.vocab_size)
            wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            x = self._reveal(wide, tokens, candidates, count, uniforms, places, inputs)
            return self._rewrite(wide, x, revealed, inputs) if self.revise else x

        share = jnp.maximum(masked.sum(axis=1), 1) / tokens.shape[1]
        rate = jnp.minimum(share, process.mask_rate(jnp.ones_like(share)))
        t = process.t_of_mask_rate(rate)
        point = {"t": t, "alpha": 1.0 - rate, "mask_rate": rate}
        return state._replace(x=call.when(needed, tokens, point, use, tokens)), None

    def _count(self, left, begun, inputs):
        steps_left = inputs["steps_left"]
        if self.schedule is None:
            return jnp.where(steps_left > 1, jnp.minimum(inputs["count"], left), left)
        return reveal_count(self.schedule, left, begun, steps_left, inputs["keep"])

    def _draws(self, rng, tokens, draw):
        """Uniforms for the tokens and noise for the places, `[B, L]` or None where neither is random."""
        shape, places = tokens.shape[1:], None
        if self.greedy and not self.noisy and self.order != "random":
            return jnp.zeros(tokens.shape), None
        keys = rng()
        if self.order == "random":
            places = jax.vmap(lambda k: jax.random.uniform(k, shape))(fold_all(keys, 0))
        elif self.noisy:
            gumbel = lambda k: jax.random.gumbel(k, shape, mode="high")
            places = jax.vmap(gumbel)(fold_all(keys, 0))
        if self.greedy:
            return jnp.zeros(tokens.shape), places
        return draw.uniforms(fold_all(keys, 1), shape), places

    def _reveal(self, logits, tokens, candidates, count, uniforms, places, inputs):
        most = max(4, _CHUNK // self.vocab_size)
        drawn = None
        if self.order == "sampled":
            drawn = draw_where(uniforms, logits, candidates, inputs["draw"], tokens, most)
            scores = token_log_probs(logits, drawn)
        else:
            scores = places if self.order == "random" else order_scores(self.order, logits)
        sure = scores
        if self.noisy:
            scores = scores + inputs["noise"] * places
        chosen = select(scores, candidates, count)
        if self.threshold:
            if self.order not in _NOISY:
                sure = order_scores("confidence", logits)
            chosen |= candidates & (sure > jnp.log(inputs["threshold"]))
        if drawn is None:
            return draw_where(uniforms, logits, chosen, inputs["draw"], tokens, most)
        return jnp.where(chosen, drawn, tokens)

    def _rewrite(self, logits, x, revealed, inputs):
        """`x` with the likeliest tokens at the surest of the positions that were revealed before."""
        count = jnp.ceil(inputs["revise"] * revealed.sum(axis=1) - 1e-3).astype(jnp.int32)
        chosen = select(order_scores("confidence", logits), revealed, count)
        return jnp.where(chosen, logits.argmax(axis=-1).astype(x.dtype), x)


def _check(order, schedule, threshold, block_length, choice_temperature, length, revise):
    check_choice("order", order, ORDERS)
    if block_length is not None:
        if not isinstance(block_length, int | np.integer) or block_length < 1:
            raise ValueError(f"block_length must be a positive int or None, got {block_length!r}")
        if length is None:
            raise ValueError("block_length needs the sequence length: pass length")
        if not isinstance(schedule, str):
            raise ValueError("block_length needs schedule 'uniform' or 'cosine', not counts")
    if isinstance(schedule, str):
        check_choice("schedule", schedule, SCHEDULES)
    elif not all(isinstance(n, int | np.integer) and n >= 0 for n in schedule) or not len(schedule):
        raise ValueError(f"schedule must be a name or counts of at least 0, got {schedule!r}")
    if is_concrete(threshold) and not 0.0 < threshold < 1.0:
        raise ValueError(f"threshold must lie in (0, 1) or be None, got {threshold}")
    if is_concrete(choice_temperature) and choice_temperature < 0:
        raise ValueError(f"choice_temperature must be 0 or positive, got {choice_temperature}")
    if order not in _NOISY and not (is_concrete(choice_temperature) and choice_temperature == 0):
        raise ValueError(f"choice_temperature needs order {' or '.join(_NOISY)}, got {order!r}")
    if is_concrete(revise) and not 0.0 <= revise <= 1.0:
        raise ValueError(f"revise is a share in [0, 1] of the revealed tokens, got {revise}")


def _steps(num_steps, schedule, length, block_length, rewrites):
    """`(steps of each block, counts or None)`."""
    if not isinstance(schedule, str):
        if num_steps not in (None, len(schedule)):
            raise ValueError(f"schedule has {len(schedule)} counts, num_steps is {num_steps}")
        return [len(schedule)], np.array(schedule, np.int32)
    if num_steps is None:
        if length is None:
            raise ValueError("num_steps is by default the sequence length: pass length")
        num_steps = length
    if not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"num_steps must be a positive int, got {num_steps!r}")
    if length is not None and not rewrites:
        num_steps = min(num_steps, length)
    blocks = 1 if block_length is None else -(-length // block_length)
    if num_steps < blocks:
        raise ValueError(
            f"num_steps = {num_steps} is too few for {blocks} blocks of {block_length} in {length}"
        )
    return [num_steps // blocks + (i < num_steps % blocks) for i in range(blocks)], None


@register("sampler", "confidence", family="discrete", paper="2502.06768", grid=False, skips=True)
def confidence(
    process,
    num_steps: int | None = None,
    *,
    length: int | None = None,
    order: str = "confidence",
    schedule="uniform",
    block_length: int | None = None,
    threshold: float | None = None,
    choice_temperature: float = 0.0,
    revise: float = 0.0,
    revise_start: int = 0,
    revise_given: bool = False,
    **drawing,
) -> Sampler:
    """Reveals the positions that the order puts first (arXiv 2202.04200, 2502.09992, 2502.06768).

    Args:
      process: an `Absorbing` process.
      num_steps: network calls, default `length`: one position a step. More than `length` are cut to it
        unless tokens are revised. A step in which no sequence changes makes no call.
      length: sequence length, needed where `x_init` is a number of sequences. Tokens `[B, L]` as `x_init`
        are infilled; sequences may have different numbers of masks.
      order: "random", "left", "confidence", "margin", "entropy" or "sampled".
      schedule: how many a step: "uniform", "cosine", or the counts themselves (integers, one a step, the
        last step reveals what is left).
      block_length: reveal runs of so many masked positions one after the other, from left to right; the
        steps are spread evenly over them.
      threshold: also reveal every position whose likeliest (with "sampled": drawn) token has more than
        this probability (Fast-dLLM, arXiv 2505.22618); later steps then have nothing to do.
      choice_temperature: Gumbel noise of this size on the scores, falling linearly to 0 in the last step
        (MaskGIT; "confidence" and "sampled" only).
      revise: share of the tokens revealed earlier (in the current block), the surest of them, that each
        step overwrites by the likeliest token (ReDiff, arXiv 2510.19871: 1). Needs a network that was
        trained to predict revealed positions too (method "refine"). A prompt stays.
      revise_start: the first step, counted from 0, that revises.
      revise_given: tokens in `x_init` are a draft, to be revised like those revealed.
      drawing: temperature, nucleus, top_k, ..., see `categorical.build_draw`.
    Raises:
      ValueError: not an absorbing process, or an option that does not exist or fit.
    """
    check_absorbing(process)
    check_length(length)
    draw = build_draw(**drawing)
    _check(order, schedule, threshold, block_length, choice_temperature, length, revise)
    rewrites = not (is_concrete(revise) and revise == 0)
    if not isinstance(revise_start, int | np.integer) or revise_start < 0:
        raise ValueError(f"revise_start must be an int of at least 0, got {revise_start!r}")
    steps, counts = _steps(num_steps, schedule, length, block_length, rewrites)
    total = sum(steps)
    temperature = drawing.get("temperature", 1.0)
    greedy = is_concrete(temperature) and temperature == 0
    noisy = not (is_concrete(choice_temperature) and choice_temperature == 0)
    within = np.concatenate([np.arange(n) + 1 for n in steps]) / np.repeat(steps, steps)
    keep = np.where(within < 1, np.cos(0.5 * np.pi * within), 0.0)
    xs = {
        **_nominal(process, steps, within, keep if schedule == "cosine" else 1.0 - within, counts),
        "process": jax.tree.map(lambda v: np.full(total, v), process),
        "draw": jax.tree.map(lambda v: np.full(total, v), draw),
        "block": np.repeat(np.arange(len(steps), dtype=np.int32), steps),
        "steps_left": np.concatenate([np.arange(n, 0, -1, dtype=np.int32) for n in steps]),
        "keep": keep,
    }
    if counts is not None:
        xs["count"] = counts
    if noisy:
        xs["noise"] = choice_temperature * (1.0 - within)
    if threshold is not None:
        xs["threshold"] = np.full(total, threshold)
    if rewrites:
        xs["revise"] = np.where(np.arange(total) >= revise_start, revise, 0.0)
    return Sampler(
        init=_Start(process.vocab_size, None if block_length is None else int(block_length)),
        step=_Step(
            process.vocab_size,
            order,
            schedule if isinstance(schedule, str) else None,
            greedy,
            noisy,
            threshold is not None,
            rewrites,
            bool(revise_given),
        ),
        finish=result,
        xs=xs,
        start=(),
        nfe=total,
        prepare=MaskedPrepare(process.vocab_size, None if length is None else int(length)),
        stochastic=order == "random" or noisy or not greedy,
        name="confidence",
    )


def _nominal(process, steps, within, kept, counts):
    """`point` and `next` of a sequence that starts with masks alone, for reports and hooks."""
    blocks = len(steps)
    if counts is not None:
        kept = 1.0 - np.cumsum(counts) / max(counts.sum(), 1)
    number = np.repeat(np.arange(blocks), steps)
    after = (blocks - 1 - number + kept) / blocks
    rate = float(process.mask_rate(1.0)) * np.concatenate([[1.0], after])
    points = process.point(process.t_of_mask_rate(np.clip(rate, 0.0, 1.0)))
    points = {k: np.asarray(v) for k, v in points.items()}
    return {
        "point": {k: v[:-1] for k, v in points.items()},
        "next": {k: v[1:] for k, v in points.items()},
    }


@register("sampler", "maskgit", family="discrete", paper="2202.04200", grid=False, skips=True)
def maskgit(process, num_steps: int | None = 8, *, choice_temperature=4.5, **options) -> Sampler:
    """MaskGIT (arXiv 2202.04200): draws everywhere and keeps the likeliest, on the cosine schedule.

    `confidence` with order "sampled", schedule "cosine" and the annealed `choice_temperature` 4.5 of the
    authors' code; arguments and errors as there.
    """
    options = {"order": "sampled", "schedule": "cosine", **options}
    made = confidence(process, num_steps, choice_temperature=choice_temperature, **options)
    return dataclasses.replace(made, name="maskgit")


@register("sampler", "llada", family="discrete", paper="2502.09992", grid=False, skips=True)
def llada(process, num_steps: int | None = None, *, temperature=0.0, **options) -> Sampler:
    """LLaDA (arXiv 2502.09992): "low_confidence" remasking, temperature 0, blocks on request.

    `confidence` with order "sampled" and the uniform schedule; arguments and errors as there.
    """
    made = confidence(
        process, num_steps, temperature=temperature, **{"order": "sampled", **options}
    )
    return dataclasses.replace(made, name="llada")


@register("sampler", "top_k_margin", family="discrete", paper="2502.06768", grid=False, skips=True)
def top_k_margin(process, num_steps: int | None = None, **options) -> Sampler:
    """Top-k probability margin (Kim et al., arXiv 2502.06768): the clearest choice is revealed first.

    `confidence` with order "margin"; arguments and errors as there.
    """
    made = confidence(process, num_steps, **{"order": "margin", **options})
    return dataclasses.replace(made, name="top_k_margin")
