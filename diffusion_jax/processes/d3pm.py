"""Discrete-time chains on tokens: D3PM (arXiv 2107.03006) and mask-and-replace (VQ-Diffusion, 2111.14822).

T steps, at times t = k / T: q(x_k | x_{k-1}) is row x_{k-1} of Q_k, and Qbar_k = Q_1 ... Q_k. Kernels of
`d3pm`:
  absorbing          beta_k = 1 / (T - k + 1) to the last of K states, which stays
  uniform            (1 - beta) I + beta / K, cosine: 1 - beta_k = f(k) / f(k - 1), beta at most 0.999,
                     f(k) = cos((k / T + s) / (1 + s) pi / 2), s = 0.008
  gaussian           Q_ij ~ exp(-4 (i - j)^2 / ((K - 1)^2 beta)) off the diagonal, normalised over all
                     distances -(K - 1)..K - 1; the diagonal takes what is left; beta linear
  nearest_neighbour  exp(beta_k (K - 1)^2 / 16 G), G with rate 1 to each neighbour
These are matrices: T K^2 numbers twice (Q and Qbar), 524 MB in float32 at K = 256, T = 1000, computed once in
float64 and cast once. `mask_replace`, and `Absorbing` and `Uniform` at times k / T, need none and take any
vocabulary.

Deviation from the public code: the gaussian's distances are integers at every K (there, they are those of
linspace(0, 255, K): the same at K = 256).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import as_time, expand, namespace, pytree_dataclass, static
from diffusion_jax.processes.discrete import DiscreteProcess, check_vocab_size
from diffusion_jax.processes.matrix_process import (
    MatrixProcess,
    check_prior,
    draw_rows,
    on_host,
)
from diffusion_jax.processes.token_kernels import normalised, one_hot
from diffusion_jax.registry import check_choice, register


def absorbing_matrices(num_states: int, num_steps: int) -> np.ndarray:
    """Q_1 ... Q_T, `[T, K, K]`, into state K - 1 (D3PM, appendix A.2.2)."""
    beta = 1.0 / (num_steps - np.arange(num_steps))
    q = (1.0 - beta)[:, None, None] * np.eye(num_states)
    q[:, :, -1] += beta[:, None]
    return q


def uniform_matrices(num_states: int, num_steps: int, offset: float = 0.008) -> np.ndarray:
    """Q_1 ... Q_T, `[T, K, K]`, cosine (D3PM, appendix A.2.1; arXiv 2102.05379)."""
    k = np.arange(num_steps + 1) / num_steps
    f = np.cos((k + offset) / (1.0 + offset) * 0.5 * np.pi)
    beta = np.minimum(1.0 - f[1:] / f[:-1], 0.999)[:, None, None]
    return (1.0 - beta) * np.eye(num_states) + beta / num_states


def _linear(num_steps, beta_min, beta_max):
    return np.linspace(beta_min, beta_max, num_steps)


def gaussian_matrices(
    num_states: int, num_steps: int, beta_min: float = 1e-4, beta_max: float = 0.02
) -> np.ndarray:
    """Q_1 ... Q_T, `[T, K, K]`, discretised Gaussian (D3PM, appendix A.2.3)."""
    distance = np.arange(num_states)
    beta = _linear(num_steps, beta_min, beta_max)[:, None]
    weight = np.exp(-4.0 * distance**2 / ((num_states - 1) ** 2 * beta))  # [T, K]
    weight /= 2.0 * weight.sum(axis=1, keepdims=True) - weight[:, :1]
    apart = np.abs(distance[:, None] - distance[None, :])
    q = weight[:, apart] * (1.0 - np.eye(num_states))
    return q + np.eye(num_states) * (1.0 - q.sum(axis=2))[:, None]


def nearest_neighbour_matrices(
    num_states: int, num_steps: int, beta_min: float = 1e-4, beta_max: float = 0.02
) -> np.ndarray:
    """Q_1 ... Q_T, `[T, K, K]`: exp(beta (K - 1)^2 / 16 G), G the random walk between neighbours.

    Its variance in a step is about that of `gaussian_matrices` at the same beta.
    """
    off = np.diag(np.ones(num_states - 1), 1)
    walk = off + off.T
    values, vectors = np.linalg.eigh(walk - np.diag(walk.sum(axis=1)))
    beta = _linear(num_steps, beta_min, beta_max) * (num_states - 1) ** 2 / 16.0
    grown = np.exp(beta[:, None] * values)
    return np.maximum((vectors * grown[:, None]) @ vectors.T, 0.0)


_NAMED = {
    "absorbing": absorbing_matrices,
    "uniform": uniform_matrices,
    "gaussian": gaussian_matrices,
    "nearest_neighbour": nearest_neighbour_matrices,
}


class FiniteTime:
    """Times k / T: what a chain of `num_train_steps` T steps adds to a process."""

    default_grid = "entries"

    @property
    def intervals(self):
        """Number of times, for the grid "entries"."""
        return self.num_train_steps + 1

    def _index(self, t):
        """k of times t, an int of the same shape."""
        xp, t = as_time(t)
        return xp.round(t * self.num_train_steps).astype(np.int32)


@pytree_dataclass
class D3PM(FiniteTime, MatrixProcess):
    """A chain of T steps given by matrices; made by `d3pm`.

    Attributes:
      vocab_size: clean tokens V, the first of the S states.
      num_train_steps: T.
      steps: Q_k, `[T, S, S]`.
      cumulative: Qbar_k for k = 0..T, `[T + 1, S, S]`.
      prior_probs: law of x_T, `[S]`.
      t_min: lower end of the times drawn in training.
    """

    vocab_size: int = static()
    num_train_steps: int = static()
    steps: np.ndarray
    cumulative: np.ndarray
    prior_probs: np.ndarray
    t_min: float = 0.0

    def __post_init__(self):
        pass  # `d3pm` has checked; a pytree is rebuilt with whatever leaves it is given

    def matrix(self, t, s=None):
        """The product of the steps from s (None: the data) to t, `[S, S]`."""
        last, first = int(self._index(t)), 0 if s is None else int(self._index(s))
        if first == 0:
            return np.asarray(self.cumulative[last])
        product = np.asarray(self.steps[first], np.float64)
        for k in range(first + 1, last):
            product = product @ self.steps[k]
        return product if last > first else np.eye(self.num_states)

    def reverse_row(self, t, s):
        """Matrices of a step t -> s; traced times must be neighbours, s = t - 1 / T."""
        if on_host(t, s) and np.ndim(t) == 0:
            return super().reverse_row(t, s)
        k = self._index(t)
        forward = jnp.asarray(self.cumulative)[k - 1]
        return {"forward": forward, "step": jnp.asarray(self.steps)[k - 1]}

    def likelihood_row(self, t):
        """The matrix of `q(x_t | x0)`, one or one an example."""
        if on_host(t) and np.ndim(t) == 0:
            return super().likelihood_row(t)
        return {"seen": jnp.asarray(self.cumulative)[self._index(t)]}

    def rows(self, tokens, t):
        """q(x_t | x0 = tokens), `[..., S]`; tokens `[B, L]`, t scalar or `[B]`."""
        k = self._index(t)
        cumulative = jnp.asarray(self.cumulative)
        return cumulative[k][tokens] if k.ndim == 0 else cumulative[k[:, None], tokens]

    def forward_probs(self, x0_probs, t):
        """q(x_t), `[..., S]`, of x0 with probabilities `[..., V]`."""
        seen = self.likelihood_row(t)["seen"]
        return x0_probs @ seen[..., : x0_probs.shape[-1], :]


@register("process", "d3pm", family="discrete", paper="2107.03006")
def d3pm(
    vocab_size: int,
    kernel="uniform",
    num_steps: int = 1000,
    *,
    prior=None,
    dtype: str = "float32",
    **options,
) -> D3PM:
    """A chain of T steps with any transition matrices.

    Args:
      vocab_size: clean tokens V.
      kernel: "absorbing" (V + 1 states), "uniform", "gaussian", "nearest_neighbour" (V states, ordered),
        or matrices `[T, S, S]`, S >= V, whose rows sum to 1.
      num_steps: T.
      prior: law of x_T, `[S]`; default the mean row of Qbar_T.
      dtype: of the stored matrices, which are computed in float64.
      options: of the named kernel (`offset`; `beta_min`, `beta_max`).
    Raises:
      ValueError: an unknown kernel, matrices that are not stochastic, fewer states than tokens.
    """
    if isinstance(kernel, str):
        check_choice("kernel", kernel, _NAMED)
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"d3pm: num_steps = {num_steps!r} must be a positive int")
        size = vocab_size + (kernel == "absorbing")
        steps = _NAMED[kernel](size, num_steps, **options)
    else:
        steps = np.asarray(kernel, np.float64)
        if steps.ndim != 3 or steps.shape[1] != steps.shape[2]:
            raise ValueError(f"transition matrices must have shape [T, S, S], got {steps.shape}")
        if steps.min() < 0 or np.abs(steps.sum(axis=2) - 1.0).max() > 1e-8:
            worst = np.abs(steps.sum(axis=2) - 1.0).max()
            raise ValueError(
                "rows of transition matrices must be probabilities: smallest entry "
                f"{steps.min():.3g}, sums off 1 by up to {worst:.3g}"
            )
    size = steps.shape[1]
    if size < vocab_size:
        raise ValueError(f"matrices have {size} states for vocab_size = {vocab_size} tokens")
    cumulative = np.empty((len(steps) + 1, size, size), dtype)
    cumulative[0] = product = np.eye(size)
    for k, step in enumerate(steps):
        product = product @ step
        cumulative[k + 1] = product
    prior = product[:vocab_size].mean(axis=0) if prior is None else check_prior("d3pm", prior, size)
    made = D3PM(vocab_size, len(steps), steps.astype(dtype), cumulative, prior)
    check_vocab_size(made)
    return made


class MaskReplaceKernel(NamedTuple):
    """A token is kept, replaced by a uniform one, or turned into the mask V, which stays."""

    vocab_size: int

    @property
    def num_states(self):
        return self.vocab_size + 1

    def _forward(self, row, x0_probs):
        keep, replace, mask = (expand(row[f"{n}_s"], x0_probs) for n in ("keep", "replace", "mask"))
        total = x0_probs.sum(axis=-1, keepdims=True)
        clean = keep * x0_probs + replace * total
        return namespace(clean).concatenate([clean, mask * total], axis=-1)

    def _column(self, keep, replace, mask, tokens, like):
        """q(tokens | state before), `[..., V + 1]`."""
        xp = namespace(like, tokens, keep)
        keep, replace, mask = (expand(v, like) for v in (keep, replace, mask))
        clean = keep * one_hot(tokens, self.vocab_size, like.dtype) + replace
        masked = (tokens == self.vocab_size)[..., None]
        column = xp.where(masked, mask, clean)
        return xp.concatenate([column, masked.astype(like.dtype)], axis=-1)

    def reverse(self, row, x0_probs, tokens):
        """`p(x_s | x_t)` from leave-one-out posteriors `[..., V]`: `[..., V + 1]`."""
        steps = (row[n] for n in ("keep", "replace", "mask"))
        column = self._column(*steps, tokens, x0_probs)
        return normalised(column * self._forward(row, x0_probs))

    def likelihood(self, row, tokens, dtype=float):
        """q(x_t = tokens | x0 = v), `[..., V]`."""
        like = one_hot(tokens, self.vocab_size, dtype)
        return self._column(*(row[n] for n in ("keep", "replace", "mask")), tokens, like)[..., :-1]


def _left(keep, mask, vocab_size):
    """`(keep, what is left over for each token, mask)`."""
    return keep, np.maximum(1.0 - keep - mask, 0.0) / vocab_size, mask


@pytree_dataclass
class MaskReplace(FiniteTime, DiscreteProcess):
    """Mask-and-replace diffusion; made by `mask_replace`.

    Attributes:
      vocab_size: clean tokens V; the mask is V.
      num_train_steps: T.
      cumulative: for k = 0..T the probabilities that x_k is x0's own token (beside chance), each single
        token by replacement, the mask: `[T + 1, 3]`, float64.
      steps: the same of one step, k = 1..T, `[T, 3]`.
      t_min: lower end of the times drawn in training.
    """

    vocab_size: int = static()
    num_train_steps: int = static()
    cumulative: np.ndarray
    steps: np.ndarray
    t_min: float = 0.0

    def __post_init__(self):
        pass  # `mask_replace` has checked; a pytree is rebuilt with whatever leaves it is given

    @property
    def mask_id(self):
        return self.vocab_size

    @property
    def num_states(self):
        return self.vocab_size + 1

    @property
    def kernel(self):
        return MaskReplaceKernel(self.vocab_size)

    @property
    def prior_probs(self):
        """Law of x_T, `[V + 1]`: the mask, and what is left spread evenly over the tokens."""
        masked = self.cumulative[-1, 2]
        even = np.full(self.vocab_size, (1.0 - masked) / self.vocab_size)
        return np.append(even, masked)

    def prior_of(self, keys, length):
        """x_T, one key an example `[B]`: int32 `[B, length]`, all but all masks."""
        probs = jnp.asarray(self.prior_probs, jnp.float32)
        return draw_rows(keys, jnp.broadcast_to(probs, (keys.shape[0], length, *probs.shape)))

    def corrupt(self, keys, tokens, t):
        """A draw of `q(x_t | x0)`, int `[B, L]` in 0..V; arguments as `Absorbing.corrupt`."""
        keep, replace, mask = (
            jnp.asarray(expand(jnp.atleast_1d(v), tokens[..., None]), jnp.float32)
            for v in self._cumulative(t)
        )
        same = one_hot(tokens, self.vocab_size, jnp.float32)
        probs = jnp.concatenate(
            [keep * same + replace, jnp.broadcast_to(mask, (*tokens.shape, 1))], axis=-1
        )
        return draw_rows(keys, probs).astype(tokens.dtype)

    def _cumulative(self, t):
        """(kept, replaced by each token, masked) by time t."""
        return self._entries(self.cumulative, self._index(t))

    def _entries(self, table, k):
        host = isinstance(k, np.ndarray | np.generic)
        return tuple((table if host else jnp.asarray(table))[k, n] for n in range(3))

    def step_probs(self, t, s):
        """(kept, replaced by each token, masked) between s and t; traced times must be neighbours."""
        if not on_host(t, s):
            return self._entries(self.steps, self._index(t) - 1)
        keep_t, _, mask_t = self._cumulative(t)
        keep_s, _, mask_s = self._cumulative(s)
        return _left(keep_t / keep_s, 1.0 - (1.0 - mask_t) / (1.0 - mask_s), self.vocab_size)

    def reverse_row(self, t, s):
        """Numbers of a step t -> s; s None is the clean data. Traced times must be neighbours."""
        s = np.zeros(np.shape(t)) if s is None else s
        names = ("keep", "replace", "mask")
        row = dict(zip(names, self.step_probs(t, s)))
        return row | {f"{n}_s": v for n, v in zip(names, self._cumulative(s))}

    def likelihood_row(self, t):
        """Numbers of `q(x_t | x0)`."""
        return dict(zip(("keep", "replace", "mask"), self._cumulative(t)))


@register("process", "mask_replace", family="discrete", paper="2111.14822")
def mask_replace(
    vocab_size: int,
    num_steps: int = 100,
    *,
    keep_ends: tuple[float, float] = (0.99999, 9e-6),
    mask_ends: tuple[float, float] = (9e-6, 0.99999),
) -> MaskReplace:
    """Mask-and-replace diffusion with VQ-Diffusion's linear schedule (arXiv 2111.14822, section 4.1).

    Args:
      vocab_size: clean tokens V; the mask is V.
      num_steps: T.
      keep_ends: probability that x_k is still x0, at k = 1 and k = T, linear between.
      mask_ends: probability that x_k is the mask, likewise.
    Raises:
      ValueError: no positive number of steps, probabilities outside [0, 1], a keep probability that does
        not fall or a mask probability that does not rise, more than 1 in sum.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"mask_replace: num_steps = {num_steps!r} must be a positive int")
    keep = np.append(1.0, np.linspace(*keep_ends, num_steps))
    mask = np.append(0.0, np.linspace(*mask_ends, num_steps))
    if (np.diff(keep) > 0).any() or (np.diff(mask) < 0).any():
        raise ValueError("mask_replace: keep must fall and mask must rise with the step")
    if min(keep.min(), mask.min()) < 0 or (keep + mask).max() > 1.0 + 1e-12 or keep.min() == 0:
        raise ValueError(
            f"mask_replace: keep_ends = {keep_ends} and mask_ends = {mask_ends} must be positive "
            "probabilities of sum at most 1"
        )
    # the chance of a replacement in a step is what the two leave over; it must not be negative
    step_keep, step_mask = keep[1:] / keep[:-1], 1.0 - (1.0 - mask[1:]) / (1.0 - mask[:-1])
    if (1.0 - step_keep - step_mask).min() < -1e-12:
        raise ValueError("mask_replace: a step would replace with a negative probability")
    made = MaskReplace(
        vocab_size,
        num_steps,
        np.stack(_left(keep, mask, vocab_size), axis=1),
        np.stack(_left(step_keep, step_mask, vocab_size), axis=1),
    )
    check_vocab_size(made)
    return made
