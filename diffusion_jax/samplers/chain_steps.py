"""The steps of the samplers of discrete chains: from a network's output to a draw of every token.

Every token moves by itself, from probabilities over the S states (see `processes.token_kernels`), and is drawn
by the inverse distribution function of one uniform.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.processes import scores
from diffusion_jax.processes.discrete import check_tokens
from diffusion_jax.processes.matrix_process import draw_rows
from diffusion_jax.processes.token_kernels import (
    MatrixKernel,
    UniformKernel,
    log_or_low,
    normalised,
    one_hot,
    scores_of,
)
from diffusion_jax.samplers.categorical import filtered_log_probs, inverse_cdf
from diffusion_jax.samplers.token_states import check_logits

HUGE = 1e9  # stands for an infinite rate


class Prompt(NamedTuple):
    """x_init that keeps some tokens.

    Attributes:
      tokens: int `[B, L]`, clean where given; elsewhere they do not matter.
      given: bool `[B, L]`.
    """

    tokens: Any
    given: Any


class ChainState(NamedTuple):
    """Scan state: tokens `[B, L]`, and the prompt they are held to, or None."""

    x: Any
    prompt: Prompt | None = None


class ChainPrepare(NamedTuple):
    """`Sampler.prepare`: a number of sequences, tokens `[B, L]` to start from, or a `Prompt`."""

    num_states: int
    length: int | None

    def __call__(self, x_init):
        if isinstance(x_init, int | np.integer) and not isinstance(x_init, bool):
            if self.length is None:
                raise ValueError(
                    "the number of sequences alone does not say their length: pass length"
                )
            if x_init < 1:
                raise ValueError(f"the number of sequences must be positive, got {x_init}")
            return jnp.full((int(x_init), self.length), -1, jnp.int32)  # -1: from the prior
        if isinstance(x_init, Prompt):
            tokens, given = (jnp.asarray(v) for v in x_init)
            if given.dtype != bool or given.shape != tokens.shape:
                raise ValueError(
                    f"Prompt.given must be bool of shape {tokens.shape}, got {given.dtype} "
                    f"{given.shape}"
                )
            with jax.ensure_compile_time_eval():  # known values stay known inside a trace
                self._check(jnp.where(given, tokens, 0))
            return Prompt(tokens, given)
        tokens = jnp.asarray(x_init)
        self._check(tokens)
        return tokens

    def _check(self, tokens):
        check_tokens(tokens, self.num_states - 1)
        if self.length is not None and tokens.shape[1] != self.length:
            raise ValueError(
                f"tokens have length {tokens.shape[1]}, the sampler was built for {self.length}"
            )


def _held(prompt, x):
    return x if prompt is None else jnp.where(prompt.given, prompt.tokens.astype(x.dtype), x)


class ChainInit(NamedTuple):
    """`Sampler.init`: what is not known yet comes from the prior."""

    kernel: Any

    def __call__(self, rng, start, x):
        prompt = x if isinstance(x, Prompt) else None
        tokens = x if prompt is None else jnp.where(x.given, x.tokens, -1)
        noise = self._prior(rng(), start, tokens.shape[1]).astype(tokens.dtype)
        return ChainState(jnp.where(tokens < 0, noise, tokens), prompt)

    def _prior(self, keys, start, length):
        if isinstance(self.kernel, UniformKernel):
            draw = lambda k: jax.random.randint(k, (length,), 0, self.kernel.num_states, jnp.int32)
            return jax.vmap(draw)(keys)
        if start != ():
            prior = jnp.asarray(start["prior"], jnp.float32)
            return draw_rows(keys, jnp.broadcast_to(prior, (keys.shape[0], length, *prior.shape)))
        return jnp.full((keys.shape[0], length), self.kernel.vocab_size, jnp.int32)


def _leap(kernel, jumps, tokens, poisson):
    """Probabilities `[..., S]` of a step with frozen rates; `jumps [..., W]` are rates times dt."""
    missing = kernel.num_states - jumps.shape[-1]
    jumps = jnp.pad(jnp.minimum(jumps, HUGE), [(0, 0)] * (jumps.ndim - 1) + [(0, missing)])
    total = jumps.sum(axis=-1, keepdims=True)
    if poisson:
        jumps = jumps * (-jnp.expm1(-total) / jnp.maximum(total, jnp.finfo(jumps.dtype).tiny))
        stay = jnp.exp(-total)
    else:
        stay = jnp.maximum(1.0 - total, 0.0)
    return jumps + stay * one_hot(tokens, kernel.num_states, jumps.dtype)


@dataclasses.dataclass(frozen=True)
class PosteriorStep:
    """`Sampler.step` for networks of posteriors; `rule` is "ancestral", "euler" or "tau_leaping"."""

    kernel: Any
    rule: str
    parameterization: str
    filters: bool
    last_step: str

    def log_probs(self, logits, tokens, inputs):
        """Log leave-one-out posteriors `[B, L, V]`."""
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        if self.filters:
            logits = filtered_log_probs(logits, inputs["draw"])
        if self.parameterization == "posterior":
            seen = self.kernel.likelihood(inputs["seen"], tokens, logits.dtype)
            return scores.divided(logits, seen)
        return scores.log_softmax(logits)

    def probs(self, logits, tokens, inputs):
        """p(x_s | x_t), `[B, L, S]` up to a factor."""
        kernel, x0 = self.kernel, jnp.exp(self.log_probs(logits, tokens, inputs))
        if self.rule == "ancestral":
            probs = kernel.reverse(inputs["reverse"], x0, tokens)
        else:
            probs = _leap(
                kernel, kernel.rates(inputs["rates"], x0, tokens), tokens, self.rule != "euler"
            )
            if kernel.num_states > kernel.vocab_size:  # no mask may be left over
                probs = jnp.where(
                    inputs["last"], kernel.reverse(inputs["reverse"], x0, tokens), probs
                )
        if self.last_step == "network":
            missing = [(0, 0)] * (x0.ndim - 1) + [(0, kernel.num_states - kernel.vocab_size)]
            direct = jnp.pad(jax.nn.softmax(logits.astype(x0.dtype)), missing)
            probs = jnp.where(inputs["last"], direct, probs)
        return probs

    def __call__(self, call, rng, state, inputs):
        output = call(state.x, inputs["point"])
        probs = self.guided(output, state.x, inputs)
        return _finished(probs, state, inputs, rng), output

    def guided(self, output, tokens, inputs):
        """`probs` of plain logits, or of what `guidance.discrete` makes of them."""
        if isinstance(output, scores.GuidedLogits):
            c, u = (
                log_or_low(normalised(self.guided(v, tokens, inputs)))
                for v in (output.conditional, output.unconditional)
            )
            mixed = u + output.weight * (c - u)
            return jnp.exp(mixed - mixed.max(axis=-1, keepdims=True))
        if isinstance(output, scores.SteeredLogits):
            probs = self.guided(output.logits, tokens, inputs)
            steered = log_or_low(probs) + output.shift
            return jnp.where(probs > 0, jnp.exp(steered - steered.max(axis=-1, keepdims=True)), 0.0)
        check_logits(output, tokens, self.kernel.vocab_size)
        return self.probs(output, tokens, inputs)


def _finished(probs, state, inputs, rng):
    """The state after a draw from weights `[B, L, S]`, which need not sum to 1."""
    uniforms = inputs["draw"].uniforms(rng(), state.x.shape[1:])
    drawn = inverse_cdf(jnp.maximum(probs, 0.0).astype(uniforms.dtype), uniforms)
    return state._replace(x=_held(state.prompt, drawn.astype(state.x.dtype)))


@dataclasses.dataclass(frozen=True)
class ScoreStep:
    """`Sampler.step` for score networks; `rule` is "euler" or "analytic"; the last call may denoise."""

    kernel: Any
    rule: str
    filters: bool
    denoise: bool

    def probs(self, log_score, tokens, inputs):
        """p(x_s | x_t), `[B, L, S]` up to a factor."""
        kernel = self.kernel
        ratios = scores_of(kernel, log_score, tokens)
        probs = None
        if self.rule == "analytic" or self.denoise:
            probs = kernel.analytic(inputs["analytic"], ratios, tokens)
            noise = jnp.arange(kernel.num_states) >= kernel.vocab_size
            if self.denoise and kernel.num_states > kernel.vocab_size:
                probs = jnp.where(inputs["last"] & noise, 0.0, probs)
        if self.rule == "euler":
            jumps = kernel.score_rates(inputs["rates"], ratios, tokens)
            euler = _leap(kernel, jumps, tokens, poisson=False)
            probs = jnp.where(inputs["last"], probs, euler) if self.denoise else euler
        probs = jnp.maximum(probs, 0.0)
        return self._filtered(probs, tokens, inputs) if self.filters else probs

    def _filtered(self, probs, tokens, inputs):
        """The same chance to stay; temperature, nucleus and top-k act on where a token goes if not."""
        here = one_hot(tokens, self.kernel.num_states, bool)
        moves = jnp.where(here, 0.0, probs)
        total = moves.sum(axis=-1, keepdims=True)
        log_moves = jnp.where(moves > 0, log_or_low(moves), -jnp.inf)
        log_moves = jnp.where(total > 0, log_moves, 0.0)
        moved = jnp.exp(filtered_log_probs(log_moves, inputs["draw"]))
        return jnp.where(here, probs, 0.0) + total * moved

    def __call__(self, call, rng, state, inputs):
        output = call(state.x, inputs["point"])
        matrix = isinstance(self.kernel, MatrixKernel)
        width = self.kernel.num_states if matrix else self.kernel.vocab_size
        check_logits(output, state.x, width)
        probs = self.probs(output, state.x, inputs)
        return _finished(probs, state, inputs, rng), output
