"""Discrete processes over tokens 0..V-1: absorbing (masked) and uniform, with any masking schedule.

Each token is independently still clean with probability alpha(t), and otherwise the mask (id V) or a
uniform token. Facts used throughout (MDLM 2406.07524, MD4 2406.04329, RADD 2406.03736):
  (1) reverse step t -> s: a masked token is revealed with probability
      (alpha_s - alpha_t) / (1 - alpha_t), and then follows p(x0 | unmasked tokens)
  (2) negative ELBO in continuous time: integral of w(t) * (cross-entropy summed over masked tokens),
      w = -alpha' / (1 - alpha)
Schedules are those of `mask_schedules`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import (
    as_time,
    check_times,
    example_keys,
    expand,
    fold_all,
    namespace,
    pytree_dataclass,
    static,
)
from diffusion_jax.processes.mask_schedules import LinearSchedule, MaskSchedule
from diffusion_jax.registry import get, register


def _bernoulli(keys, rate, shape):
    """True with probability `rate` (scalar or `[B]`); one key an example, shape `[B, ...]`."""
    uniforms = jax.vmap(lambda k: jax.random.uniform(k, shape[1:]))(keys)
    return uniforms < expand(jnp.asarray(rate), uniforms)


class DiscreteProcess:
    """What discrete processes share: the schedule and its time range.

    A subclass has `num_states`, the number of values a token of x_t can take (clean ones first),
    `corrupt`, `prior_of` and `reverse_probs`.
    """

    t_max = 1.0

    def __post_init__(self):
        if not isinstance(self.vocab_size, int) or self.vocab_size < 2:
            raise ValueError(
                f"{type(self).__name__}: vocab_size = {self.vocab_size!r} must be an int of at least 2"
            )
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", get("schedule", self.schedule)())
        check_times(self)

    @property
    def sampling_range(self):
        return 1.0, 0.0

    default_grid = "uniform"

    def alpha(self, t):
        """Probability that a token is still clean."""
        return self.schedule.alpha(t)

    def mask_rate(self, t):
        """`1 - alpha(t)`: probability that a token has been replaced."""
        return self.schedule.mask_rate(t)

    def weight(self, t):
        """`-alpha' / (1 - alpha)`."""
        return self.schedule.weight(t)

    def t_of_mask_rate(self, rate):
        """Inverse of `mask_rate`."""
        return self.schedule.t_of_mask_rate(rate)

    def reveal_probability(self, t, s):
        """`(alpha_s - alpha_t) / (1 - alpha_t)` for s < t: chance that a masked token is revealed."""
        rate_t, rate_s = self.mask_rate(t), self.mask_rate(s)
        return (rate_t - rate_s) / rate_t

    def point(self, t):
        """The schedule at `t` as a dictionary `t, alpha, mask_rate`."""
        _, t = as_time(t)
        return {"t": t, "alpha": self.alpha(t), "mask_rate": self.mask_rate(t)}

    def prior(self, key, shape, index=None):
        """x_1: int32 tokens `[B, L]`; example i depends on `key` and `index[i]` (default i) alone."""
        index = jnp.arange(shape[0]) if index is None else index
        return self.prior_of(example_keys(key, index), shape[1])

    def check_tokens(self, tokens, highest):
        """Raises ValueError unless `tokens` is an integer array `[B, L]`, in range where it can be seen."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f"tokens must be an integer array [B, L]; got shape {tuple(tokens.shape)}, "
                f"dtype {tokens.dtype}"
            )
        if not isinstance(tokens, jax.core.Tracer) and tokens.size:
            values = np.asarray(tokens)  # on the host: known values stay known inside a trace
            low, high = int(values.min()), int(values.max())
            if low < 0 or high > highest:
                raise ValueError(f"tokens must lie in 0..{highest}; got {low}..{high}")


@register("process", "absorbing", family="discrete", paper="2406.03736")
@pytree_dataclass
class Absorbing(DiscreteProcess):
    """Masked diffusion: a token turns into the mask (id `vocab_size`) and stays it.

    Args:
      vocab_size: number of clean tokens V; token ids 0..V-1, mask id V.
      schedule: a `MaskSchedule` or the name of one.
      t_min: lower end of the times drawn in training (the loss weight grows like 1/t).
    """

    vocab_size: int = static()
    schedule: MaskSchedule | str = LinearSchedule()
    t_min: float = 1e-3

    @property
    def mask_id(self):
        return self.vocab_size

    @property
    def num_states(self):
        return self.vocab_size + 1

    def prior_of(self, keys, length):
        """x_1, one key an example `[B]`: int32 `[B, length]`, all masks."""
        return jnp.full((keys.shape[0], length), self.mask_id, jnp.int32)

    def corrupt(self, keys, tokens, t):
        """A draw of `q(x_t | x0)`: each token is masked with probability `mask_rate(t)`.

        Args:
          keys: one key an example, `[B]`.
          tokens: int `[B, L]`.
          t: scalar or `[B]`.
        Returns:
          int tokens `[B, L]`, some of them `mask_id`.
        """
        hit = _bernoulli(keys, self.mask_rate(t), tokens.shape)
        return jnp.where(hit, jnp.asarray(self.mask_id, tokens.dtype), tokens)

    def reverse_probs(self, x0_probs, tokens, t, s):
        """`p(x_s | x_t)` of one reverse step t -> s, position by position.

        Args:
          x0_probs: `[..., V]`, p(x0 | unmasked tokens).
          tokens: int `[...]`, x_t.
          t, s: scalars, s < t.
        Returns:
          `[..., V + 1]`, the mask class last; one-hot where x_t is not masked.
        """
        xp = namespace(x0_probs, tokens)
        reveal = self.reveal_probability(t, s)
        masked = xp.concatenate(
            [reveal * x0_probs, xp.broadcast_to(1.0 - reveal, (*x0_probs.shape[:-1], 1))], axis=-1
        )
        kept = xp.eye(self.vocab_size + 1, dtype=x0_probs.dtype)[tokens]
        return xp.where((tokens == self.mask_id)[..., None], masked, kept)


@register("process", "uniform", family="discrete", paper="2107.03006")
@pytree_dataclass
class Uniform(DiscreteProcess):
    """Uniform diffusion: a replaced token is drawn uniformly from all V (D3PM, arXiv 2107.03006).

    Args:
      vocab_size: number of tokens V.
      schedule: a `MaskSchedule` or the name of one; `mask_rate` is the chance of replacement.
      t_min: lower end of the times drawn in training.
    """

    vocab_size: int = static()
    schedule: MaskSchedule | str = LinearSchedule()
    t_min: float = 1e-3

    def corrupt(self, keys, tokens, t):
        """A draw of `q(x_t | x0)`: with probability `mask_rate(t)` a token is drawn anew.

        Arguments as `Absorbing.corrupt`; returns int tokens `[B, L]`.
        """
        hit = _bernoulli(fold_all(keys, 0), self.mask_rate(t), tokens.shape)
        fresh = jax.vmap(lambda k: jax.random.randint(k, tokens.shape[1:], 0, self.vocab_size))(
            fold_all(keys, 1)
        )
        return jnp.where(hit, fresh.astype(tokens.dtype), tokens)

    @property
    def num_states(self):
        return self.vocab_size

    def prior_of(self, keys, length):
        """x_1, one key an example `[B]`: int32 `[B, length]`, uniform."""
        draw = lambda k: jax.random.randint(k, (length,), 0, self.vocab_size, jnp.int32)
        return jax.vmap(draw)(keys)

    def _transition(self, xp, ratio, probs):
        """`probs [..., V]` after keeping a token with probability `ratio`."""
        return ratio * probs + (1.0 - ratio) / self.vocab_size * probs.sum(axis=-1, keepdims=True)

    def reverse_probs(self, x0_probs, tokens, t, s):
        """`p(x_s | x_t)` of one reverse step, from the *leave-one-out* posterior.

        `x0_probs` must be p(x0^i | x_t without position i): plugging in p(x0^i | x_t) counts the
        token's own evidence twice and does not converge. Arguments as `Absorbing.reverse_probs`;
        returns `[..., V]`.
        """
        xp = namespace(x0_probs, tokens)
        alpha_t, alpha_s = self.alpha(t), self.alpha(s)
        seen = xp.eye(self.vocab_size, dtype=x0_probs.dtype)[tokens]
        # q(x_s | x_t, x0) ~ q(x_t | x_s) q(x_s | x0), averaged over x0 and normalised
        joint = self._transition(xp, alpha_t / alpha_s, seen) * self._transition(
            xp, alpha_s, x0_probs
        )
        return joint / joint.sum(axis=-1, keepdims=True)
