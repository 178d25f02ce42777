"""Learned schedules: gamma(t) = -log_snr, increasing, from parameters (VDM, arXiv 2107.00630, app. H).

  scalar    gamma(t) = b + |w| t
  monotone  h(t) = l1(t) + l3(2 sigmoid(l2(2 t - 1)) - 1) / n, all weights by their absolute value,
            n the width of the hidden layer

`ends` says what gamma(0) and gamma(1) are. "fixed": always gamma_min and gamma_max; "learned": two
parameters of their own (the paper's form); in both, h gives the shape between,
(h(t) - h(0)) / (h(1) - h(0)). "free": gamma = h, so that ends and shape move together, as in the
official code: the ends do not stay where the config put them.

Deviation: where the shape alone counts, l1 starts with slope 1 instead of gamma_max - gamma_min. The
shape is the same, and the network soon outweighs the line.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import constant, normal

from diffusion_jax.registry import check_choice

ENDS = ("fixed", "learned", "free")


class ScalarLogSNR(nn.Module):
    """`b + |w| t`: a line whose two ends are learned. t float [...] -> gamma [...], elementwise.

    Args:
      gamma_min, gamma_max: the ends at initialisation.
    """

    gamma_min: float = -13.3
    gamma_max: float = 5.0

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        b = self.param("b", constant(self.gamma_min), (), jnp.float32)
        w = self.param("w", constant(self.gamma_max - self.gamma_min), (), jnp.float32)
        return b + jnp.abs(w) * t


class MonotoneLogSNR(nn.Module):
    """A line plus a monotone network with one hidden layer. t float [...] -> gamma [...], elementwise.

    The parameters `first_gamma` and `last_gamma` are there with ends "learned" only.

    Args:
      gamma_min, gamma_max: the ends at initialisation ("free": up to the network's first values).
      features: width of the hidden layer.
      ends: "fixed", "learned" or "free".
      hidden_scale: deviation of the hidden layer's first weights and biases, large for a shape that
        can soon bend anywhere; None for weights of deviation 1 and no biases.
    """

    gamma_min: float = -13.3
    gamma_max: float = 5.0
    features: int = 1024
    ends: str = "fixed"
    hidden_scale: float | None = None

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        """Raises ValueError for unknown `ends`, or features below 1."""
        check_choice("ends", self.ends, ENDS)
        if self.features < 1:
            raise ValueError(f"features must be positive, got {self.features}")
        free, n = self.ends == "free", self.features
        first_slope = self.gamma_max - self.gamma_min if free else 1.0
        slope = self.param("line_slope", constant(first_slope), (), jnp.float32)
        s = self.hidden_scale
        w2 = self.param("hidden_weight", normal(1.0 if s is None else s), (n,), jnp.float32)
        b2 = self.param("hidden_bias", normal(s or 0.0), (n,), jnp.float32)
        w3 = self.param("output_weight", normal(n**-0.5), (n,), jnp.float32)

        def h(t):
            hidden = jnp.tanh(0.5 * ((2.0 * t[..., None] - 1.0) * jnp.abs(w2) + b2))
            return jnp.abs(slope) * t + hidden @ jnp.abs(w3) / n

        if free:
            return self.param("line_bias", constant(self.gamma_min), (), jnp.float32) + h(t)
        low, high = jnp.float32(self.gamma_min), jnp.float32(self.gamma_max)
        if self.ends == "learned":
            low = self.param("first_gamma", constant(self.gamma_min), (), jnp.float32)
            high = self.param("last_gamma", constant(self.gamma_max), (), jnp.float32)
        first, last = h(jnp.zeros((), t.dtype)), h(jnp.ones((), t.dtype))
        return low + (high - low) * (h(t) - first) / (last - first)
