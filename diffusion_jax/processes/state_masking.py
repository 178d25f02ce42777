"""Masking whose schedule depends on the token: GenMD4's forward process (arXiv 2406.04329, section 5).

A token v is still clean at time t with probability
  (1) alpha_v(t) = 1 - (1 - eps) t^w_v
so tokens of a large power w are masked late, and by the reverse process revealed early. The powers can be
learnt. That a position is masked then says something about its token: the network's law mu of a masked
token depends on t, and a step t -> s of the reverse process is
  (2) p(x_s = v | masked) = mu_v (alpha_v(s) - alpha_v(t)) / (1 - alpha_v(t)) = mu_v (1 - (s / t)^w_v)
With equal powers this is `Absorbing` with the polynomial schedule, but for eps at the start.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import as_time, expand, namespace, pytree_dataclass, static
from diffusion_jax.processes.discrete import DiscreteProcess
from diffusion_jax.registry import register


@register("process", "state_masking", family="discrete", paper="2406.04329")
@pytree_dataclass
class StateMasking(DiscreteProcess):
    """Masked diffusion where every token has its own polynomial schedule.

    Args:
      vocab_size: number of clean tokens V; token ids 0..V-1, mask id V.
      powers: w, one number for all or `[V]`, positive; may be traced.
      eps: share of the tokens that is still clean at t = 1.
      t_min: lower end of the times drawn in training.
    Raises:
      ValueError: powers of another shape or not positive, eps outside [0, 0.01].
    """

    vocab_size: int = static()
    powers: Any = 1.0
    eps: float = 1e-4
    t_min: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        shape = getattr(self.powers, "shape", ())
        if isinstance(self.powers, list | tuple):
            object.__setattr__(self, "powers", np.asarray(self.powers, np.float64))
            shape = self.powers.shape
        if isinstance(self.powers, int | float | np.ndarray) and shape in ((), (self.vocab_size,)):
            if not (np.asarray(self.powers) > 0).all():
                raise ValueError(f"StateMasking: powers must be positive, got {self.powers}")
        elif isinstance(self.powers, np.ndarray):
            raise ValueError(
                f"StateMasking: powers must be a number or {self.vocab_size} of them, got shape {shape}"
            )
        if isinstance(self.eps, float) and not 0.0 <= self.eps <= 0.01:
            raise ValueError(f"StateMasking: eps = {self.eps} must lie in [0, 0.01]")

    @property
    def mask_id(self):
        return self.vocab_size

    @property
    def num_states(self):
        return self.vocab_size + 1

    @property
    def kernel(self):
        """Refused: the kernels of `token_kernels` have one reveal rate for all tokens."""
        raise ValueError(
            "every token of a StateMasking process has a schedule of its own: its sampler is "
            "state_masked_ancestral"
        )

    def all_powers(self):
        """The powers, `[V]`."""
        return namespace(self.powers).broadcast_to(self.powers, (self.vocab_size,))

    def powers_of(self, tokens):
        """The powers of clean tokens int `[...]`; of the mask id, those of the last token."""
        powers = self.all_powers()
        xp = namespace(powers, tokens)
        return xp.asarray(powers)[xp.minimum(tokens, self.vocab_size - 1)]

    def log_mask_rates(self, tokens, t):
        """`log(1 - alpha_v(t))` of clean tokens int `[B, L]`, t scalar or `[B]`."""
        xp, t = as_time(t, tokens, *jax.tree.leaves(self))
        with np.errstate(divide="ignore"):
            return np.log1p(-self.eps) + self.powers_of(tokens) * expand(xp.log(t), tokens)

    def alphas(self, tokens, t):
        """`alpha_v(t)` of clean tokens int `[B, L]`, t scalar or `[B]`."""
        logs = self.log_mask_rates(tokens, t)
        return -namespace(logs).expm1(logs)

    def prior_of(self, keys, length):
        """x_1, one key an example `[B]`: int32 `[B, length]`, all masks."""
        return jnp.full((keys.shape[0], length), self.mask_id, jnp.int32)

    def corrupt(self, keys, tokens, t):
        """A draw of `q(x_t | x0)`: keys `[B]`, tokens int `[B, L]`, t scalar or `[B]` -> int `[B, L]`."""
        rate = jnp.exp(self.log_mask_rates(tokens, jnp.asarray(t)))
        uniform = jax.vmap(lambda k: jax.random.uniform(k, tokens.shape[1:]))(keys)
        return jnp.where(uniform < rate, jnp.asarray(self.mask_id, tokens.dtype), tokens)

    def log_prob(self, x, tokens, t):
        """`log q(x_t | x0)` of masked sequences x whose unmasked tokens are x0's, `[B]`."""
        logs = self.log_mask_rates(tokens, t)
        xp = namespace(logs, x)
        kept = xp.log(-xp.expm1(logs))
        return xp.where(x == self.mask_id, logs, kept).sum(axis=-1)

    def log_stay(self, t, s):
        """`log (1 - alpha_v(s)) / (1 - alpha_v(t)) = w_v log(s / t)`, `[V]`: masked at t, still at s < t.

        -inf at s = 0.
        """
        xp, ratio = as_time(s / t, *jax.tree.leaves(self))
        with np.errstate(divide="ignore"):
            return self.all_powers() * xp.log(ratio)
