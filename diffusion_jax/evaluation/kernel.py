"""Kernel distance: unbiased squared MMD of features, cubic kernel (Binkowski et al., arXiv 1801.01401).

  k(x, y) = (x . y / D + 1)^3
  d = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Unlike the Frechet distance its expectation does not depend on the number of samples, and is exactly
0 for two sets of one distribution: an estimate may be negative, and that is no error. The kernels, and
the same estimate as a loss, are those of `objectives.mmd`.
"""

import numpy as np

from diffusion_jax.evaluation.frechet import check_features
from diffusion_jax.objectives.mmd import Kernel, diagonal, gram, polynomial

_ROWS = 1024


def _kernel_sum(kernel: Kernel, x: np.ndarray, y: np.ndarray) -> float:
    starts = range(0, len(x), _ROWS)
    return float(sum(gram(kernel, x[start : start + _ROWS], y).sum() for start in starts))


def _within(kernel: Kernel, x: np.ndarray) -> float:
    """Mean of the kernel over the pairs of two different vectors of a set."""
    n = len(x)
    return (_kernel_sum(kernel, x, x) - float(diagonal(kernel, x).sum())) / (n * (n - 1))


def _check_pair(real, fake) -> tuple[np.ndarray, np.ndarray]:
    real, fake = check_features(real, "real"), check_features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature dimensions differ: {real.shape[1]} and {fake.shape[1]}")
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"need 2 vectors or more of each, got {len(real)} and {len(fake)}")
    return real, fake


def kernel_distance(real, fake, *, kernel: Kernel | None = None) -> float:
    """Unbiased squared maximum mean discrepancy between features [N, D] and [M, D], in float64.

    Cost O(N M D); memory 1,024 rows of the kernel matrix.

    Args:
      real, fake: [N, D] and [M, D].
      kernel: one of `objectives.mmd`; default the cubic one.

    Raises:
      ValueError: dimensions differ, fewer than two vectors, or values that are not finite.
    """
    real, fake = _check_pair(real, fake)
    kernel = polynomial() if kernel is None else kernel
    if kernel.translation_invariant:
        centre = real.mean(axis=0)
        real, fake = real - centre, fake - centre
    across = _kernel_sum(kernel, real, fake) / (len(real) * len(fake))
    return _within(kernel, real) + _within(kernel, fake) - 2.0 * across


def kernel_distance_subsets(
    real, fake, *, subset_size: int, subsets: int = 20, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of `kernel_distance` over random subsets of both sides.

    Args:
      real, fake: [N, D] and [M, D].
      subset_size: vectors per subset, 2 to min(N, M); drawn without replacement.
      subsets: how many.
      seed: of the draws.

    Raises:
      ValueError: an impossible subset size, or as in `kernel_distance`.
    """
    real, fake = _check_pair(real, fake)
    if not 2 <= subset_size <= min(len(real), len(fake)) or subsets < 2:
        raise ValueError(
            f"need 2 <= subset_size <= {min(len(real), len(fake))} and subsets >= 2, "
            f"got {subset_size} and {subsets}"
        )
    rng = np.random.default_rng(seed)
    values = [
        kernel_distance(
            real[rng.permutation(len(real))[:subset_size]],
            fake[rng.permutation(len(fake))[:subset_size]],
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values, ddof=1))
