"""Exact likelihoods of masked models on short sequences, by enumerating the sets of masked positions.

With S(M) the cross-entropy summed over a set M of masked positions, m = |M| and r the mask rate, every
bound of `objectives.masked` is a sum over the 2^L sets with a weight for each size m:
  (1) sum of (m - 1)! (L - m)! / L! S(M)               the continuous-time bound, all orders' mean
  (2) sum of S(M) times the integral of r^(m-1) (1 - r)^(L-m) over [r_low, r_high]    clipped times
  (3) sum of S(M) times the sum over T steps of u_k r_k^m (1 - r_k)^(L-m)             finite T
(1) is -log p(x0) for the exact conditionals, for every sequence. A network that sees the time has
another S at every rate: `time_bound`.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.objectives.token_cross_entropy import token_cross_entropy

_MAX_SETS = 2**16


def mask_sets(length: int) -> np.ndarray:
    """All sets of positions, bool `[2^L, L]`: bit L - 1 - i of a row's number is position i.

    Raises:
      ValueError: a length below 1, or more than 2^16 sets.
    """
    if length < 1 or 2**length > _MAX_SETS:
        most = int(math.log2(_MAX_SETS))
        raise ValueError(f"mask sets are enumerated for lengths 1 to {most}, got {length}")
    return np.array(list(itertools.product([False, True], repeat=length)))


def cross_entropies(process, denoise, tokens, *, t=0.5, batch_size: int = 4096) -> np.ndarray:
    """`-log p(x0_i | tokens outside M)` for every set M of masked positions.

    Args:
      process: an `Absorbing` process.
      denoise: `(x int [B, L], t) -> logits [B, L, V]`.
      tokens: int `[N, L]`, clean.
      t: the time that the network is told.
      batch_size: masked sequences at a time.
    Returns:
      float64 `[N, 2^L, L]` in the order of `mask_sets`, 0 at positions that are not masked.
    Raises:
      ValueError: tokens that are not clean integers, sequences too long to enumerate.
    """
    return _values(process, _compiled(denoise), tokens, t, batch_size)


def _compiled(denoise):
    return jax.jit(lambda point, x, clean: token_cross_entropy(denoise, x, point, clean))


def _values(process, found, tokens, t, batch_size=4096):
    tokens = np.asarray(tokens)
    process.check_tokens(tokens, process.vocab_size - 1)
    sets = mask_sets(tokens.shape[1])
    masked = np.broadcast_to(sets, (len(tokens), *sets.shape))
    clean = np.broadcast_to(tokens[:, None], masked.shape).reshape(-1, tokens.shape[1])
    x = np.where(masked.reshape(clean.shape), process.mask_id, clean)
    point = process.point(t)
    values = np.empty(clean.shape)
    size = min(batch_size, len(x))
    for begin in range(0, len(x), size):
        rows = np.minimum(np.arange(begin, begin + size), len(x) - 1)
        values[rows] = found(point, jnp.asarray(x[rows]), jnp.asarray(clean[rows]))
    return np.where(masked, values.reshape(masked.shape), 0.0)


def any_order_weights(length: int) -> np.ndarray:
    """(1) by the size of a set, `[L + 1]`: `(m - 1)! (L - m)! / L!`, 0 for the empty one."""
    sizes = range(1, length + 1)
    return np.array([0.0, *(1.0 / (m * math.comb(length, m)) for m in sizes)])


def rate_weights(length: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """(2) by the size of a set, `[L + 1]`: exact, since Gauss-Legendre is exact for polynomials.

    MDLM and RADD average over t in [d, 1], d = 1e-3, with rates (1 - d) t: `low = (1 - d) d`,
    `high = 1 - d`, and the mean divides by 1 - d. SMDM: `low = d`, `high = 1`, divided by 1 - d.
    """
    nodes, weights = np.polynomial.legendre.leggauss(length // 2 + 1)
    rate = (low + high) / 2 + (high - low) / 2 * nodes
    sizes = np.arange(1, length + 1)[:, None]
    terms = rate ** (sizes - 1) * (1.0 - rate) ** (length - sizes)
    return np.concatenate([[0.0], (high - low) / 2 * terms @ weights])


def time_weights(process, length: int, t) -> np.ndarray:
    """The integrand of the continuous-time bound at time t, by the size of a set: `[L + 1]`."""
    rate, sizes = float(process.mask_rate(t)), np.arange(length + 1)
    chance = rate**sizes * (1.0 - rate) ** (length - sizes)
    return np.where(sizes > 0, float(process.weight(t)) * chance, 0.0)


def step_weights(process, length: int, steps: int) -> np.ndarray:
    """(3) by the size of a set, `[L + 1]`: an even grid of `steps` steps."""
    t = np.arange(1, steps + 1) / steps
    rate, sizes = process.mask_rate(t)[:, None], np.arange(length + 1)
    reveal = process.reveal_probability(t, t - 1.0 / steps)
    terms = reveal[:, None] * rate**sizes * (1.0 - rate) ** (length - sizes)
    return np.where(sizes > 0, terms.sum(axis=0), 0.0)


def weighted_bound(values, weights) -> np.ndarray:
    """A bound in nats: `values [N, 2^L, L]` of `cross_entropies`, weights `[L + 1]` by size -> `[N]`."""
    sets = mask_sets(values.shape[-1])
    return values.sum(axis=-1) @ np.asarray(weights)[sets.sum(axis=1)]


def block_bound(values, block: int) -> np.ndarray:
    """The bound of block diffusion (arXiv 2503.09573): blocks left to right, any order within each.

    Later blocks are masked. Blocks of 1 are the left-to-right chain rule, one block of L is (1).

    Args:
      values: `[N, 2^L, L]` of `cross_entropies`.
      block: positions in a block; the last may be shorter.
    Returns:
      float64 `[N]`.
    Raises:
      ValueError: a block below 1.
    """
    if block < 1:
        raise ValueError(f"block must be positive, got {block}")
    length = values.shape[-1]
    sets, total = mask_sets(length), 0.0
    for begin in range(0, length, block):
        end = min(begin + block, length)
        rows = ~sets[:, :begin].any(axis=1) & sets[:, end:].all(axis=1)
        weights = any_order_weights(end - begin)[sets[rows, begin:end].sum(axis=1)]
        total = total + values[:, rows, begin:end].sum(axis=-1) @ weights
    return total


def count_variance(values) -> np.ndarray:
    """Variance of one draw of the loss by counts of masks (L / k, k uniform), `[N]`."""
    length = values.shape[-1]
    sizes = np.arange(1, length + 1)
    chance = np.array([1.0 / (length * math.comb(length, m)) for m in sizes])
    return _variance(values, chance, length / sizes)


def rate_variance(values, low: float) -> np.ndarray:
    """Variance of one draw of the loss with a uniform mask rate in [low, 1] and weight 1 / rate, `[N]`.

    A draw is S / r, as the official codes average it; its variance grows like log(1 / low).
    """
    length = values.shape[-1]
    nodes, weights = np.polynomial.legendre.leggauss(length + 60)
    log_rate = -np.log(low) * (nodes - 1.0) / 2
    rate, weights = np.exp(log_rate), -np.log(low) / 2 * weights / (1.0 - low)
    sizes = np.arange(1, length + 1)[:, None]
    density = rate * weights * rate**sizes * (1.0 - rate) ** (length - sizes)
    mean, square = ((density / rate**n).sum(axis=1) for n in (1, 2))
    return _moments(values, mean, square)


def _variance(values, chance, weight):
    return _moments(values, chance * weight, chance * weight**2)


def _moments(values, mean, square):
    """Variance from weights of S and of S^2 by size 1..L."""
    sizes = mask_sets(values.shape[-1]).sum(axis=1)
    summed = values.sum(axis=-1)
    mean, square = (np.concatenate([[0.0], w])[sizes] for w in (mean, square))
    return summed**2 @ square - (summed @ mean) ** 2


def time_bound(process, denoise, tokens, *, nodes: int = 64, t_min: float = 0.0) -> np.ndarray:
    """The continuous-time bound of a network that sees the time, float64 `[N]`.

    Gauss-Legendre over the mask rate with `nodes` nodes; (1) costs one evaluation of all sets, this as
    many as there are nodes. Arguments as `cross_entropies`; times run from `t_min` to 1.
    """
    low, high = float(process.mask_rate(t_min)), float(process.mask_rate(1.0))
    positions, weights = np.polynomial.legendre.leggauss(nodes)
    length, total = np.asarray(tokens).shape[1], 0.0
    sizes, found = np.arange(length + 1), _compiled(denoise)
    for node, weight in zip(positions, weights):
        rate = (low + high) / 2 + (high - low) / 2 * node
        chance = rate ** (sizes - 1.0) * (1.0 - rate) ** (length - sizes)
        values = _values(process, found, tokens, float(process.t_of_mask_rate(rate)))
        total += (
            (high - low) / 2 * weight * weighted_bound(values, np.where(sizes > 0, chance, 0.0))
        )
    return total
