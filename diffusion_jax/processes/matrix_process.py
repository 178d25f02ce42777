"""What chains given by matrices share: corruption, prior and one reverse step.

Memory: matrices of S x S; a loss handles `[B, L, S]` and one matrix an example, `[B, S, S]`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import is_concrete, namespace
from diffusion_jax.processes.discrete import DiscreteProcess
from diffusion_jax.processes.token_kernels import MatrixKernel, one_hot


def draw_rows(keys, probs):
    """Tokens int32 `[B, L]` of probabilities `[B, L, S]` by inverse distribution function."""
    uniform = jax.vmap(lambda k: jax.random.uniform(k, probs.shape[1:-1], probs.dtype))(keys)
    cumulative = jnp.cumsum(probs, axis=-1)
    top = cumulative[..., -1:]
    target = jnp.minimum(uniform[..., None] * top, jnp.nextafter(top, jnp.zeros_like(top)))
    return (cumulative <= target).sum(axis=-1, dtype=jnp.int32)


def check_prior(name, prior, size):
    """A prior as float64 `[S]`.

    Raises:
      ValueError: another shape, negative entries, a sum other than 1.
    """
    prior = np.asarray(prior, np.float64)
    if prior.shape != (size,) or prior.min() < 0 or not np.isclose(prior.sum(), 1.0):
        raise ValueError(f"{name}: prior must be {size} probabilities, got {prior!r}")
    return prior


def on_host(*times):
    """Whether all times are plain numbers or NumPy arrays, so that matrices are computed in float64."""
    return all(t is None or is_concrete(t) or isinstance(t, np.ndarray) for t in times)


class MatrixProcess(DiscreteProcess):
    """A discrete process given by matrices; row i of a matrix says where state i goes.

    A subclass gives `matrix(t, s=None)`, `[S, S]` on the host in float64, from time s (None: the clean
    data) to t; `rows(tokens, t)`, the rows `[..., S]` of x0's matrix, and `forward_probs`; and has a field
    `prior_probs [S]`.
    """

    @property
    def num_states(self):
        return self.prior_probs.shape[-1]

    @property
    def kernel(self):
        return MatrixKernel(self.vocab_size, self.num_states)

    def prior_of(self, keys, length):
        """x_1, one key an example `[B]`: int32 `[B, length]`."""
        probs = jnp.asarray(self.prior_probs, jnp.float32)
        return draw_rows(keys, jnp.broadcast_to(probs, (keys.shape[0], length, *probs.shape)))

    def corrupt(self, keys, tokens, t):
        """A draw of `q(x_t | x0)`.

        Args:
          keys: one key an example, `[B]`.
          tokens: int `[B, L]`.
          t: scalar or `[B]`.
        Returns:
          int tokens `[B, L]` in 0..S-1.
        """
        return draw_rows(keys, jnp.asarray(self.rows(tokens, t))).astype(tokens.dtype)

    def reverse_row(self, t, s):
        """Matrices of a step t -> s; s None is the clean data."""
        start = np.eye(self.num_states) if s is None else self.matrix(s)
        return {"forward": start, "step": self.matrix(t, s)}

    def likelihood_row(self, t):
        """The matrix of `q(x_t | x0)`."""
        return {"seen": self.matrix(t)}

    def padded(self, probs):
        """Probabilities `[..., V]` of clean tokens as `[..., S]`."""
        missing = self.num_states - probs.shape[-1]
        if not missing:
            return probs
        return namespace(probs).pad(probs, [(0, 0)] * (probs.ndim - 1) + [(0, missing)])

    def _one_hot(self, tokens, dtype):
        return one_hot(tokens, self.num_states, dtype)
