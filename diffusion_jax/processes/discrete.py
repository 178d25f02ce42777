"""Discrete processes over tokens 0..V-1: absorbing (masked) and uniform, with any masking schedule.

Each token is independently still clean with probability alpha(t), and otherwise the mask (id V) or a
uniform token. Facts used throughout (MDLM 2406.07524, MD4 2406.04329, RADD 2406.03736):
  (1) reverse step t -> s: a masked token is revealed with probability
      (alpha_s - alpha_t) / (1 - alpha_t), and then follows p(x0 | unmasked tokens)
  (2) negative ELBO in continuous time: integral of w(t) * (cross-entropy summed over masked tokens),
      w = -alpha' / (1 - alpha)
Schedules are written by their mask rate 1 - alpha, which is what must be accurate near t = 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import (
    as_time,
    check_times,
    expand,
    fold_all,
    is_concrete,
    namespace,
    pytree_dataclass,
    static,
)
from diffusion_jax.registry import get, register


class MaskSchedule:
    """What the schedules share; a subclass gives `_rate(xp, t)`, `_rate_slope` and `_t_of_rate`.

    The base mask rate m(t) runs from 0 to 1; `eps_start` and `eps_end` pull it away from the ends:
    `mask_rate = eps_start + (1 - eps_start - eps_end) m(t)`.
    """

    eps_start: float
    eps_end: float

    def __post_init__(self):
        for name in ("eps_start", "eps_end"):
            value = getattr(self, name)
            if is_concrete(value) and not 0.0 <= value < 0.5:
                raise ValueError(f"{type(self).__name__}: {name} = {value} must be in [0, 0.5)")

    def _span(self):
        return 1.0 - self.eps_start - self.eps_end

    def mask_rate(self, t):
        """`1 - alpha(t)`, the shape of `t`."""
        xp, t = as_time(t, *jax.tree.leaves(self))
        return self.eps_start + self._span() * self._rate(xp, t)

    def mask_rate_slope(self, t):
        """`-d alpha / dt`."""
        xp, t = as_time(t, *jax.tree.leaves(self))
        return self._span() * self._rate_slope(xp, t)

    def t_of_mask_rate(self, rate):
        """Inverse of `mask_rate`, clipped to [0, 1]."""
        xp, rate = as_time(rate, *jax.tree.leaves(self))
        base = xp.clip((rate - self.eps_start) / self._span(), 0.0, 1.0)
        return xp.clip(self._t_of_rate(xp, base), 0.0, 1.0)

    def alpha(self, t):
        """Probability that a token is still clean."""
        return 1.0 - self.mask_rate(t)

    def sigma_bar(self, t):
        """Total noise `-log alpha` of SEDD, RADD and MDLM."""
        rate = self.mask_rate(t)
        with np.errstate(divide="ignore"):
            return -namespace(rate).log1p(-rate)

    def weight(self, t):
        """`-alpha' / (1 - alpha)`, the weight of the continuous-time bound."""
        with np.errstate(divide="ignore"):
            return self.mask_rate_slope(t) / self.mask_rate(t)


@register("schedule", "linear", family="discrete", paper="2406.07524")
@pytree_dataclass
class LinearSchedule(MaskSchedule):
    """alpha = 1 - t: RADD's lambda, MDLM's log-linear noise (eps_end = 1e-3), MD4's linear (both 1e-4)."""

    eps_start: float = 0.0
    eps_end: float = 0.0

    def _rate(self, xp, t):
        return t

    def _rate_slope(self, xp, t):
        return xp.ones_like(t)

    def _t_of_rate(self, xp, rate):
        return rate


@register("schedule", "cosine", family="discrete", paper="2406.04329")
@pytree_dataclass
class CosineSchedule(MaskSchedule):
    """alpha = 1 - cos(pi/2 (1 - t)) (MaskGIT, MD4)."""

    eps_start: float = 0.0
    eps_end: float = 0.0

    def _rate(self, xp, t):
        return xp.sin(0.5 * np.pi * t)

    def _rate_slope(self, xp, t):
        return 0.5 * np.pi * xp.cos(0.5 * np.pi * t)

    def _t_of_rate(self, xp, rate):
        return 2.0 / np.pi * xp.arcsin(rate)


@register("schedule", "cosine_alpha", family="discrete", paper="2406.07524")
@pytree_dataclass
class CosineAlphaSchedule(MaskSchedule):
    """alpha = cos(pi/2 t): MDLM's cosine noise (eps_end = 1e-3)."""

    eps_start: float = 0.0
    eps_end: float = 0.0

    def _rate(self, xp, t):
        return 2.0 * xp.sin(0.25 * np.pi * t) ** 2

    def _rate_slope(self, xp, t):
        return 0.5 * np.pi * xp.sin(0.5 * np.pi * t)

    def _t_of_rate(self, xp, rate):
        return 4.0 / np.pi * xp.arcsin(xp.sqrt(0.5 * rate))


@register("schedule", "polynomial", family="discrete", paper="2406.04329")
@pytree_dataclass
class PolynomialSchedule(MaskSchedule):
    """alpha = 1 - t^power (MD4)."""

    power: float = 3.0
    eps_start: float = 0.0
    eps_end: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if is_concrete(self.power) and self.power <= 0:
            raise ValueError(f"PolynomialSchedule: power = {self.power} must be positive")

    def _rate(self, xp, t):
        return t**self.power

    def _rate_slope(self, xp, t):
        return self.power * t ** (self.power - 1.0)

    def _t_of_rate(self, xp, rate):
        return rate ** (1.0 / self.power)


@register("schedule", "geometric", family="discrete", paper="2310.16834")
@pytree_dataclass
class GeometricSchedule(MaskSchedule):
    """alpha = exp(-sigma_min^(1-t) sigma_max^t) (SEDD). The ends are as far out as sigma says."""

    sigma_min: float = 1e-4
    sigma_max: float = 20.0
    eps_start = 0.0
    eps_end = 0.0

    def __post_init__(self):
        if is_concrete(self.sigma_min, self.sigma_max) and not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"GeometricSchedule: sigma_min = {self.sigma_min} must lie between 0 and "
                f"sigma_max = {self.sigma_max}"
            )

    def _total(self, xp, t):
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def sigma_bar(self, t):
        """`-log alpha`, without the detour over a mask rate that rounds to 1."""
        return self._total(*as_time(t, *jax.tree.leaves(self)))

    def _rate(self, xp, t):
        return -xp.expm1(-self._total(xp, t))

    def _rate_slope(self, xp, t):
        total = self._total(xp, t)
        return total * xp.log(self.sigma_max / self.sigma_min) * xp.exp(-total)

    def _t_of_rate(self, xp, rate):
        with np.errstate(divide="ignore"):
            total = -xp.log1p(-rate)
            return xp.log(total / self.sigma_min) / xp.log(self.sigma_max / self.sigma_min)


def _bernoulli(keys, rate, shape):
    """True with probability `rate` (scalar or `[B]`); one key an example, shape `[B, ...]`."""
    uniforms = jax.vmap(lambda k: jax.random.uniform(k, shape[1:]))(keys)
    return uniforms < expand(jnp.asarray(rate), uniforms)


class DiscreteProcess:
    """What absorbing and uniform processes share: the schedule and its time range."""

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
