"""Discrete processes over tokens 0..V-1: absorbing (masked) and uniform, with any masking schedule.

Each token is independently still clean with probability alpha(t), and otherwise the mask (id V) or a
uniform token. Facts used throughout (MDLM 2406.07524, MD4 2406.04329, RADD 2406.03736):
  (1) reverse step t -> s: a masked token is revealed with probability
      (alpha_s - alpha_t) / (1 - alpha_t), and then follows p(x0 | unmasked tokens)
  (2) negative ELBO in continuous time: integral of w(t) * (cross-entropy summed over masked tokens),
      w = -alpha' / (1 - alpha)
Schedules are those of `mask_schedules`, the steps of a token those of `token_kernels`; other chains are in
`ctmc` and `d3pm`.
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
from diffusion_jax.processes.token_kernels import (
    AbsorbingKernel,
    UniformKernel,
    one_hot,
)
from diffusion_jax.registry import get, register


def _bernoulli(keys, rate, shape):
    """True with probability `rate` (scalar or `[B]`); one key an example, shape `[B, ...]`."""
    uniforms = jax.vmap(lambda k: jax.random.uniform(k, shape[1:]))(keys)
    return uniforms < expand(jnp.asarray(rate), uniforms)


def check_vocab_size(process):
    """Raises ValueError unless `vocab_size` is an int of at least 2."""
    if not isinstance(process.vocab_size, int) or process.vocab_size < 2:
        raise ValueError(
            f"{type(process).__name__}: vocab_size = {process.vocab_size!r} must be an int of at least 2"
        )


def check_tokens(tokens, highest):
    """Raises ValueError unless `tokens` is an integer array `[B, L]`, in 0..highest where it can be seen."""
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


class DiscreteProcess:
    """What discrete processes share. Times are in [0, 1], one scalar or one an example.

    A subclass has
      `num_states`, the number of values a token of x_t can take (the V clean ones first), `corrupt` and
        `prior_of`;
      `kernel`, one of `token_kernels`, with the numbers of a step t -> s on the host, `reverse_row(t, s)`
        (s None: the clean data), `likelihood_row(t)`;
      in continuous time `rate_row(t, dt)` and `analytic_row(t, s)` (`s` None: the clean data), and for
        losses `rate(t)`, `rates_into(tokens)` and `log_score(log_probs, tokens, t)`.
    """

    t_max = 1.0
    default_grid = "uniform"

    def __post_init__(self):
        check_vocab_size(self)
        check_times(self)

    @property
    def sampling_range(self):
        return 1.0, 0.0

    def point(self, t):
        """The schedule at `t` as a dictionary."""
        _, t = as_time(t)
        return {"t": t}

    def prior(self, key, shape, index=None):
        """x_1: int32 tokens `[B, L]`; example i depends on `key` and `index[i]` (default i) alone."""
        index = jnp.arange(shape[0]) if index is None else index
        return self.prior_of(example_keys(key, index), shape[1])

    def reverse_probs(self, x0_probs, tokens, t, s):
        """`p(x_s | x_t)` of one reverse step t -> s, position by position.

        Where tokens hold evidence of themselves (all processes but the absorbing one) `x0_probs` must be
        the *leave-one-out* posterior p(x0^i | x_t without position i): plugging in p(x0^i | x_t) counts a
        token's own evidence twice and does not converge; see `scores.leave_one_out`.

        Args:
          x0_probs: `[..., V]`.
          tokens: int `[...]`, x_t.
          t, s: s < t, scalars or one an example.
        Returns:
          `[..., num_states]`.
        """
        return self.kernel.reverse(self.reverse_row(t, s), x0_probs, tokens)

    def likelihood(self, tokens, t, dtype=None):
        """q(x_t = tokens | x0 = v), `[..., V]`; of the absorbing process up to a factor."""
        dtype = dtype or (np.float64 if namespace(tokens, t) is np else jnp.float32)
        return self.kernel.likelihood(self.likelihood_row(t), tokens, dtype)

    def check_tokens(self, tokens, highest):
        """Raises ValueError unless `tokens` is an integer array `[B, L]`, in range where it can be seen."""
        check_tokens(tokens, highest)


class ScheduledProcess(DiscreteProcess):
    """A discrete process in continuous time whose clock is a masking schedule: sigma_bar = -log alpha."""

    def __post_init__(self):
        check_vocab_size(self)
        if isinstance(self.schedule, str):
            object.__setattr__(self, "schedule", get("schedule", self.schedule)())
        check_times(self)

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

    def sigma_bar(self, t):
        """Total noise `-log alpha(t)`."""
        return self.schedule.sigma_bar(t)

    def rate(self, t):
        """`d sigma_bar / dt = -alpha' / alpha`: what multiplies Q at time t."""
        with np.errstate(divide="ignore"):
            return self.schedule.mask_rate_slope(t) / self.alpha(t)

    def noise_between(self, s, t):
        """`sigma_bar(t) - sigma_bar(s)`; s None is the clean data."""
        return self.sigma_bar(t) - (0.0 if s is None else self.sigma_bar(s))

    def point(self, t):
        """The schedule at `t` as a dictionary `t, alpha, mask_rate`."""
        _, t = as_time(t)
        return {"t": t, "alpha": self.alpha(t), "mask_rate": self.mask_rate(t)}


@register("process", "absorbing", family="discrete", paper="2406.03736")
@pytree_dataclass
class Absorbing(ScheduledProcess):
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

    @property
    def kernel(self):
        return AbsorbingKernel(self.vocab_size)

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

    def reverse_row(self, t, s):
        """Numbers of a step t -> s; s None reveals everything."""
        xp, t = as_time(t)
        reveal = xp.ones_like(t) if s is None else self.reveal_probability(t, s)
        return {"reveal": reveal, "alpha_t": self.alpha(t), "rate_t": self.mask_rate(t)}

    def likelihood_row(self, t):
        """Nothing: a mask says the same of every token."""
        return {}

    def rate_row(self, t, dt):
        """Numbers of the reverse rates at t, times dt: `weight` for x0, `rate` for scores."""
        return {"weight": dt * self.weight(t), "rate": dt * self.rate(t)}

    def analytic_row(self, t, s):
        """Numbers of Tweedie's step."""
        noise = self.noise_between(s, t)
        return {"gain": namespace(noise).expm1(noise)}

    def rates_into(self, tokens, dtype=np.float32):
        """Q(v, token) for the V clean tokens, `[..., 1]` (all alike): 1 where the token is the mask."""
        return (tokens == self.mask_id)[..., None].astype(dtype)

    def log_score(self, log_probs, tokens, t):
        """log p_t(v) / p_t(mask), `[..., V]`: conditional times a scalar of t (RADD, 2406.03736)."""
        rate = self.mask_rate(t)
        xp = namespace(rate)
        return log_probs + expand(xp.log1p(-rate) - xp.log(rate), log_probs)


@register("process", "uniform", family="discrete", paper="2107.03006")
@pytree_dataclass
class Uniform(ScheduledProcess):
    """Uniform diffusion: a replaced token is drawn uniformly from all V (D3PM, arXiv 2107.03006).

    Args:
      vocab_size: number of tokens V.
      schedule: a `MaskSchedule` or the name of one; `mask_rate` is the chance of replacement.
      t_min: lower end of the times drawn in training.
    """

    vocab_size: int = static()
    schedule: MaskSchedule | str = LinearSchedule()
    t_min: float = 1e-3

    @property
    def num_states(self):
        return self.vocab_size

    @property
    def kernel(self):
        return UniformKernel(self.vocab_size)

    def prior_of(self, keys, length):
        """x_1, one key an example `[B]`: int32 `[B, length]`, uniform."""
        draw = lambda k: jax.random.randint(k, (length,), 0, self.vocab_size, jnp.int32)
        return jax.vmap(draw)(keys)

    def corrupt(self, keys, tokens, t):
        """A draw of `q(x_t | x0)`: with probability `mask_rate(t)` a token is drawn anew.

        Arguments as `Absorbing.corrupt`; returns int tokens `[B, L]`.
        """
        hit = _bernoulli(fold_all(keys, 0), self.mask_rate(t), tokens.shape)
        fresh = jax.vmap(lambda k: jax.random.randint(k, tokens.shape[1:], 0, self.vocab_size))(
            fold_all(keys, 1)
        )
        return jnp.where(hit, fresh.astype(tokens.dtype), tokens)

    def reverse_row(self, t, s):
        """Numbers of a step t -> s; s None is the clean data."""
        alpha_t = self.alpha(t)
        alpha_s = namespace(alpha_t).ones_like(alpha_t) if s is None else self.alpha(s)
        return {"keep": alpha_t / alpha_s, "alpha_s": alpha_s}

    def likelihood_row(self, t):
        """Numbers of `q(x_t | x0)`."""
        return {"alpha": self.alpha(t)}

    def rate_row(self, t, dt):
        """Numbers of the reverse rates at t, times dt."""
        return {"alpha": self.alpha(t), "rate": dt * self.rate(t)}

    def analytic_row(self, t, s):
        """Numbers of Tweedie's step."""
        noise = self.noise_between(s, t)
        return {"decay": namespace(noise).exp(-noise)}

    def rates_into(self, tokens, dtype=np.float32):
        """Q(v, token), `[..., V]`: 1/V, and 0 at the token itself."""
        return (1 - one_hot(tokens, self.vocab_size, dtype)) / self.vocab_size

    def log_score(self, log_probs, tokens, t):
        """log p_t(v) / p_t(token), `[..., V]`, from log leave-one-out posteriors."""
        rate = expand(self.mask_rate(t), log_probs)
        xp = namespace(log_probs, rate)
        marginal = xp.log((1.0 - rate) * xp.exp(log_probs) + rate / self.vocab_size)
        here = xp.take_along_axis(marginal, tokens[..., None].astype(int), axis=-1)
        return marginal - here
