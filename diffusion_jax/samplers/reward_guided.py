"""Reward-guided ancestral sampling (RGAS) of DiDi-Instruct (arXiv 2509.25035).

A reward says, token by token, how much a partly masked sequence looks like data: the log-odds of the
discriminator that a student was distilled with. While little is revealed it bends the logits,
  (1) logits + h clip(d reward / d log p, -1, 1),
the reward being its mean over masked positions at the expected next state, each masked position the mixture
of the mask and the tokens it may become. Later M candidates for the next state are drawn, and
  (2) one of them is taken with probability proportional to exp(sum of log-odds over its masked positions).

Equivalences: h = 0 and M = 1 is `masked_ancestral`, bit for bit.
Deviations: the candidates of a step reveal the same positions, so that their sums are over the same masks; in
the last step, which leaves none, the first is taken.
Cost beside the network's calls: see `reward_calls`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import fold_all
from diffusion_jax.registry import register
from diffusion_jax.samplers.categorical import Draw, draw_tokens, draw_where
from diffusion_jax.samplers.masked_ancestral import masked_ancestral
from diffusion_jax.samplers.scan import Sampler
from diffusion_jax.samplers.token_states import check_logits


class GuidedState(NamedTuple):
    """Scan state: tokens `[B, L]`, the plan of `masked_ancestral`, and the reward that rides along."""

    x: Any
    plan: Any
    reward: Any


class _Start(NamedTuple):
    base: Callable

    def __call__(self, rng, start, tokens):
        return GuidedState(tokens, self.base(rng, start["plan"], tokens), start["reward"])


class _Step(NamedTuple):
    vocab_size: int
    guided: bool
    candidates: int

    def __call__(self, call, rng, state, inputs):
        x, plan, draw = state.x, state.plan, inputs["draw"]
        masked = x == self.vocab_size
        reveal = masked & (plan.step <= inputs["number"])
        logits = call(x, inputs["point"])
        check_logits(logits, x, self.vocab_size)
        bent = logits
        if self.guided:
            bend = lambda v: v + inputs["strength"] * self._slope(state, v, masked, inputs)
            wide = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            bent = jax.lax.cond(inputs["strength"] > 0, bend, lambda v: v, wide)
        most = -(-x.shape[1] // (plan.points["t"].shape[0] - 1))
        drawn = draw_where(plan.uniform, bent, reveal, draw, x, most)
        if self.candidates > 1:
            choose = lambda first: self._choose(rng(), state, bent, reveal, first, inputs, most)
            drawn = jax.lax.cond(inputs["late"], choose, lambda first: first, drawn)
        plan = plan._replace(x=drawn, at=jnp.full_like(plan.at, inputs["number"]))
        return GuidedState(drawn, plan, state.reward), logits

    def _slope(self, state, logits, masked, inputs):
        """Eq. (1): the clipped slope of the reward in the log-probabilities."""
        x, s = state.x, inputs["next"]["t"]
        seen = jax.nn.one_hot(x, self.vocab_size + 1, dtype=logits.dtype)
        open_ = masked[..., None].astype(logits.dtype)
        still = 1.0 - inputs["reveal"]

        def reward(log_p):
            becomes = inputs["reveal"] * jnp.exp(log_p)
            mixed = jnp.concatenate([becomes, jnp.full_like(becomes[..., :1], still)], axis=-1)
            state_after = jnp.where(masked[..., None], mixed, seen)
            odds = state.reward(state_after, jnp.full(x.shape[:1], s))
            # examples are independent: the slope of the sum is each one's own
            return (jnp.where(masked, odds, 0.0).sum(1) / jnp.maximum(masked.sum(1), 1)).sum()

        slope = jax.grad(reward)(jax.nn.log_softmax(logits, axis=-1))
        return jnp.clip(slope, -inputs["limit"], inputs["limit"]) * open_

    def _choose(self, keys, state, logits, reveal, first, inputs, most):
        """Eq. (2): one of the candidates, of which `first` is one."""
        shape, draw = first.shape[1:], inputs["draw"]
        options = [first]
        for m in range(1, self.candidates):
            uniforms = draw.uniforms(fold_all(keys, m), shape)
            options.append(draw_where(uniforms, logits, reveal, draw, state.x, most))
        options = jnp.stack(options)
        t = jnp.full(first.shape[:1], inputs["next"]["t"])
        odds = jax.lax.map(lambda x: state.reward(x, t), options)
        left = options == self.vocab_size
        totals = jnp.where(left, odds, 0.0).sum(axis=2).T  # [B, M]
        uniforms = jax.vmap(jax.random.uniform)(fold_all(keys, 0))
        picked = draw_tokens(uniforms, totals, Draw())
        picked = jnp.where(left[0].any(axis=1), picked, 0)
        return jnp.take_along_axis(options, picked[None, :, None], axis=0)[0]


def _result(state):
    return state.x


@register("sampler", "reward_guided", family="discrete", paper="2509.25035")
def reward_guided(
    process,
    num_steps: int | None = None,
    *,
    reward: Callable,
    strength: float | tuple[float, float] = (30.0, 40.0),
    candidates: int = 4,
    switch: float = 0.5,
    limit: float = 1.0,
    length: int | None = None,
    grid=None,
    t_start=None,
    t_end=None,
    **drawing,
) -> Sampler:
    """Ancestral sampling under a reward (RGAS, arXiv 2509.25035).

    `nfe` counts the calls of the network; those of the reward are `reward_calls`.

    Args:
      process: an `Absorbing` process.
      num_steps: steps N, default 64.
      reward: `(x, t [B]) -> [B, L]`, a pytree such as `didi_instruct`'s `Critic.log_odds`: x int `[B, L]`
        or weights of the V + 1 tokens `[B, L, V + 1]`. One that knows conditions of each example serves
        that batch alone.
      strength: h, or its first and last value in the guided part; 0: no guidance.
      candidates: M of the later part; 1: no selection.
      switch: the share of the steps that is guided; the rest selects.
      limit: what the slope is clipped to.
      length, grid, t_start, t_end, drawing: as for `masked_ancestral`.
    Raises:
      ValueError: as `masked_ancestral`; a reward that cannot be called, a number out of range.
    """
    if not callable(reward):
        raise ValueError(
            f"reward must be callable as (x, t) -> [B, L], got {type(reward).__name__}"
        )
    if not isinstance(candidates, int) or candidates < 1:
        raise ValueError(f"candidates must be an int of at least 1, got {candidates!r}")
    if not 0.0 <= switch <= 1.0:
        raise ValueError(f"switch must lie in [0, 1], got {switch}")
    low, high = strength if isinstance(strength, tuple | list) else (strength, strength)
    if low < 0 or high < 0 or limit <= 0:
        raise ValueError(
            f"strength must not be negative and limit be positive, got {strength}, {limit}"
        )
    base = masked_ancestral(
        process, num_steps, length=length, grid=grid, t_start=t_start, t_end=t_end, **drawing
    )
    early = round(switch * base.nfe)
    h = np.zeros(base.nfe)
    h[:early] = np.linspace(low, high, early)
    guided = bool((h > 0).any())
    xs = {
        **base.xs,
        "strength": h,
        "late": np.arange(base.nfe) >= early,
        "limit": np.full(base.nfe, float(limit)),
    }
    return dataclasses.replace(
        base,
        init=_Start(base.init),
        step=_Step(process.vocab_size, guided, candidates),
        finish=_result,
        xs=xs,
        start={"plan": base.start, "reward": jax.tree_util.Partial(reward)},
        name="reward_guided",
    )


class RewardCalls(NamedTuple):
    """What a run of `reward_guided` costs beside the network's calls.

    Attributes:
      slopes: evaluations of the reward with their gradient.
      values: evaluations without, M in each selecting step.
    """

    slopes: int
    values: int


def reward_calls(sampler: Sampler) -> RewardCalls:
    """The calls of the reward in one run. Raises ValueError for another sampler."""
    if not isinstance(sampler.step, _Step):
        raise ValueError(f"sampler {sampler.name!r} has no reward")
    late = int(np.sum(sampler.xs["late"]))
    values = late * sampler.step.candidates if sampler.step.candidates > 1 else 0
    slopes = int(np.sum(np.asarray(sampler.xs["strength"]) > 0)) if sampler.step.guided else 0
    return RewardCalls(slopes, values)
