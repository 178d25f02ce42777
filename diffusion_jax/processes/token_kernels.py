"""One reverse step of a token, from the numbers of the step: the kernels of discrete processes.

With z the present token x_t, f = q(x_s | x0) and the leave-one-out posterior x = p(x0 | the other tokens):
  (1) p(x_s = j | x_t) ~ q(z | x_s = j) sum_v x_v f(j | v)                     [reverse; D3PM, 2107.03006]
  (2) reverse rate z -> j:  Q(j, z) p_t(j) / p_t(z),  p_t(j) = sum_v x_v q(x_t = j | v)   [rates; 2205.14987]
  (3) with the scores s_j = p_t(j) / p_t(z) themselves: Q(j, z) s_j, and Tweedie's step
      p(x_s = j | x_t) = (exp(d Q)^-T s)_j exp(d Q)(j, z),  d the noise of the step   [SEDD, 2310.16834]
Q(i, j) is the rate from i to j: rows are where a token comes from. A kernel is hashable and holds sizes
alone; schedules enter through *rows*, dictionaries of numbers (matrices) computed on the host in float64,
so that samplers which differ in schedules share one program.
"""

from typing import NamedTuple

import jax.numpy as jnp

from diffusion_jax.numerics import expand, namespace


def one_hot(tokens, size, dtype):
    """`[..., size]`, NumPy or JAX as the tokens are."""
    xp = namespace(tokens)
    return (xp.arange(size) == tokens[..., None]).astype(dtype)


def normalised(joint):
    """`[..., S]` over its sum; zeros where everything is impossible."""
    xp = namespace(joint)
    total = joint.sum(axis=-1, keepdims=True)
    return xp.where(total > 0, joint / xp.where(total > 0, total, 1.0), 0.0)


def log_or_low(probs):
    """log, with a finite value for 0 whose gradient is 0."""
    xp = namespace(probs)
    tiny = xp.finfo(probs.dtype).tiny
    return xp.log(xp.where(probs > tiny, probs, tiny))


def _at(values, tokens):
    """`values[..., tokens]`, keeping a last axis of 1."""
    xp = namespace(values, tokens)
    return xp.take_along_axis(values, tokens[..., None].astype(int), axis=-1)


class AbsorbingKernel(NamedTuple):
    """Tokens 0..V-1 and the mask V, which they turn into and stay. Scores are those of the V tokens."""

    vocab_size: int

    @property
    def num_states(self):
        return self.vocab_size + 1

    def _steps(self, tokens, moves, stay):
        """`[..., V + 1]`: `moves [..., V]` and `stay [..., 1]` where masked, one-hot elsewhere."""
        xp = namespace(moves, tokens)
        stay = xp.broadcast_to(stay, (*moves.shape[:-1], 1))
        kept = one_hot(tokens, self.num_states, moves.dtype)
        masked = (tokens == self.vocab_size)[..., None]
        return xp.where(masked, xp.concatenate([moves, stay], axis=-1), kept)

    def reverse(self, row, x0_probs, tokens):
        """Step (1), `[..., V + 1]`. x0_probs `[..., V]`, or `[..., V + 1]` with mass on the mask."""
        reveal = expand(row["reveal"], x0_probs)
        clean = x0_probs[..., : self.vocab_size]
        if x0_probs.shape[-1] == self.vocab_size:
            return self._steps(tokens, reveal * clean, 1.0 - reveal)
        # a clean token that the network holds to be the mask cannot be revealed
        masked = x0_probs[..., self.vocab_size :]
        alpha_t = expand(row["alpha_t"], x0_probs)
        rate_t = expand(row["rate_t"], x0_probs)
        moves = reveal * rate_t * clean / (rate_t + alpha_t * masked)
        return self._steps(tokens, moves, 1.0 - moves.sum(axis=-1, keepdims=True))

    def likelihood(self, row, tokens, dtype=float):
        """q(x_t = tokens | x0 = v), up to a factor: `[..., V]`."""
        xp = namespace(tokens)
        same = one_hot(tokens, self.vocab_size, dtype)
        return xp.where((tokens == self.vocab_size)[..., None], xp.ones_like(same), same)

    def rates(self, row, x0_probs, tokens):
        """Step (2) times dt, `[..., V]`."""
        masked = (tokens == self.vocab_size)[..., None]
        return expand(row["weight"], x0_probs) * masked * x0_probs

    def score_rates(self, row, scores, tokens):
        """Step (3) times dt, `[..., V]`."""
        masked = (tokens == self.vocab_size)[..., None]
        return expand(row["rate"], scores) * masked * scores

    def analytic(self, row, scores, tokens):
        """Tweedie's step, `[..., V + 1]`; negative at the mask where the scores are too large."""
        moves = expand(row["gain"], scores) * scores
        return self._steps(tokens, moves, 1.0 - moves.sum(axis=-1, keepdims=True))


class UniformKernel(NamedTuple):
    """Tokens 0..V-1, replaced by a uniform one; Q is 1/V off the diagonal. No V x V matrix anywhere."""

    vocab_size: int

    @property
    def num_states(self):
        return self.vocab_size

    def _spread(self, keep, probs):
        """`probs [..., V]` after keeping a token with probability `keep`."""
        total = probs.sum(axis=-1, keepdims=True)
        return keep * probs + (1.0 - keep) / self.vocab_size * total

    def reverse(self, row, x0_probs, tokens):
        """Step (1), `[..., V]`."""
        keep, alpha_s = (expand(row[name], x0_probs) for name in ("keep", "alpha_s"))
        seen = one_hot(tokens, self.vocab_size, x0_probs.dtype)
        return normalised(self._spread(keep, seen) * self._spread(alpha_s, x0_probs))

    def likelihood(self, row, tokens, dtype=float):
        """q(x_t = tokens | x0 = v), `[..., V]`."""
        same = one_hot(tokens, self.vocab_size, dtype)
        return self._spread(expand(row["alpha"], same), same)

    def _others(self, tokens, dtype):
        return (1.0 - one_hot(tokens, self.vocab_size, dtype)) / self.vocab_size

    def rates(self, row, x0_probs, tokens):
        """Step (2) times dt, `[..., V]`, 0 at the token itself."""
        marginal = self._spread(expand(row["alpha"], x0_probs), x0_probs)
        ratio = marginal / _at(marginal, tokens)
        return self.score_rates(row, ratio, tokens)

    def score_rates(self, row, scores, tokens):
        """Step (3) times dt, `[..., V]`, 0 at the token itself."""
        return expand(row["rate"], scores) * self._others(tokens, scores.dtype) * scores

    def analytic(self, row, scores, tokens):
        """Tweedie's step, `[..., V]`; may be negative where the scores are none of a distribution."""
        keep = expand(row["decay"], scores)
        total = scores.sum(axis=-1, keepdims=True)
        before = (scores - (1.0 - keep) / self.vocab_size * total) / keep
        seen = one_hot(tokens, self.vocab_size, scores.dtype)
        return before * self._spread(keep, seen)


class MatrixKernel(NamedTuple):
    """Any transition matrices over S states, of which the first V are clean; rows hold the matrices."""

    vocab_size: int
    num_states: int

    def _columns(self, matrix, tokens):
        """`matrix[:, tokens]` as `[..., S]`; one matrix, or one an example."""
        xp = namespace(matrix, tokens)
        turned = xp.swapaxes(matrix, -1, -2)
        if turned.ndim == 2:
            return turned[tokens]
        return turned[xp.arange(turned.shape[0])[:, None], tokens]

    def reverse(self, row, x0_probs, tokens):
        """Step (1), `[..., S]`. x0_probs `[..., V]`, or `[..., S]`."""
        forward = row["forward"][..., : x0_probs.shape[-1], :]
        joint = self._columns(row["step"], tokens) * (x0_probs @ forward)
        return normalised(joint)

    def likelihood(self, row, tokens, dtype=float):
        """q(x_t = tokens | x0 = v), `[..., V]`."""
        return self._columns(row["seen"], tokens)[..., : self.vocab_size].astype(dtype)

    def rates(self, row, x0_probs, tokens):
        """Step (2) times dt, `[..., S]`, 0 at the token itself."""
        marginal = x0_probs @ row["seen"][..., : x0_probs.shape[-1], :]
        here = _at(marginal, tokens)
        xp = namespace(here)
        ratio = marginal / xp.maximum(here, xp.finfo(here.dtype).tiny)
        return self.score_rates(row, ratio, tokens)

    def score_rates(self, row, scores, tokens):
        """Step (3) times dt, `[..., S]`, 0 at the token itself."""
        return self._columns(row["rates"], tokens) * scores

    def analytic(self, row, scores, tokens):
        """Tweedie's step, `[..., S]`."""
        return (scores @ row["inverse"]) * self._columns(row["step"], tokens)


def scores_of(kernel, log_score, tokens):
    """Scores `[..., W]` from a network's log-scores: exp, and 1 at the present token where it has one."""
    wide = log_score.astype(jnp.promote_types(log_score.dtype, jnp.float32))
    if isinstance(kernel, AbsorbingKernel):
        return jnp.exp(wide)
    here = one_hot(tokens, kernel.num_states, bool)
    return jnp.where(here, 1.0, jnp.exp(wide))
