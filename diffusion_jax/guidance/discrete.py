"""Guidance of discrete diffusion in the step itself (Schiff et al., arXiv 2412.10193).

  (1) D-CFG: p(x_s | x_t)  ~  p_c(x_s | x_t)^w p_u(x_s | x_t)^(1 - w), token by token          [eq. 16]
  (2) D-CBG: p(x_s | x_t)  ~  p(x_s^i = v | x_t) p(y | x_t with v at i)^w, token by token     [eq. 14]
The samplers of `samplers.ctmc` for networks of posteriors take both. For an absorbing process the paper
applies (1) to p(x0 | x_t) instead: that is `transforms.guide` on log-probabilities.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.guidance.transforms import _inner, _Transform
from diffusion_jax.numerics import expand, pytree_dataclass, static
from diffusion_jax.processes.scores import GuidedLogits, SteeredLogits
from diffusion_jax.processes.token_kernels import one_hot
from diffusion_jax.registry import check_choice


@pytree_dataclass
class guide_steps(_Transform):
    """Classifier-free guidance of the step (1): w = 1 is the conditional model, 0 the unconditional one.

    Costs two network calls a step.

    Args:
      conditional, unconditional: denoisers.
      weight: w.
    """

    conditional: Any
    unconditional: Any
    weight: float

    def at(self, x, point):
        """`GuidedLogits`."""
        return GuidedLogits(
            _inner(self.conditional, x, point), _inner(self.unconditional, x, point), self.weight
        )


@pytree_dataclass
class steer(_Transform):
    """Classifier guidance of the step (2).

    Args:
      denoise: a denoiser.
      classifier: `(x, t) -> log p(y | x_t) [B]`, of tokens int `[B, L]`, or for "first_order" of one-hot
        rows float `[B, L, S]`.
      weight: w.
      num_states: S, the values a token can take.
      change: "exact" asks the classifier about every token at every position (L S calls, S at a time);
        "first_order" takes its gradient (one call).
    Raises:
      ValueError: another `change`.
    """

    denoise: Any
    classifier: Callable
    weight: float
    num_states: int = static()
    change: str = static("exact")

    def __post_init__(self):
        check_choice("change", self.change, ("exact", "first_order"))

    def _exact(self, x, t):
        def at_position(i):
            def with_value(v):
                return self.classifier(x.at[:, i].set(v), t)

            return jax.vmap(with_value)(jnp.arange(self.num_states, dtype=x.dtype))  # [S, B]

        changed = jax.lax.map(at_position, jnp.arange(x.shape[1]))  # [L, S, B]
        return jnp.moveaxis(changed, 2, 0) - expand(self.classifier(x, t), x[..., None])

    def _first_order(self, x, t):
        rows = one_hot(x, self.num_states, jnp.float32)
        slope = jax.grad(lambda rows: self.classifier(rows, t).sum())(rows)
        return slope - (slope * rows).sum(axis=-1, keepdims=True)

    def at(self, x, point):
        """`SteeredLogits`."""
        t = point["t"]
        shift = self._exact(x, t) if self.change == "exact" else self._first_order(x, t)
        return SteeredLogits(_inner(self.denoise, x, point), self.weight * shift)
