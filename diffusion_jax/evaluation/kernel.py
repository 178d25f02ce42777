"""Kernel distance: unbiased squared MMD of features, cubic kernel (Binkowski et al., arXiv 1801.01401).

  k(x, y) = (x . y / D + 1)^3
  d = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)

Unlike the Frechet distance its expectation does not depend on the number of samples, and is exactly
0 for two sets of one distribution: an estimate may be negative, and that is no error.
"""

import numpy as np

from diffusion_jax.evaluation.frechet import check_features

_ROWS = 1024


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    blocks = (x[start : start + _ROWS] @ y.T for start in range(0, len(x), _ROWS))
    return float(sum(((block / x.shape[1] + 1.0) ** 3).sum() for block in blocks))


def _diagonal_sum(x: np.ndarray) -> float:
    return float((((x * x).sum(axis=1) / x.shape[1] + 1.0) ** 3).sum())


def _check_pair(real, fake) -> tuple[np.ndarray, np.ndarray]:
    real, fake = check_features(real, "real"), check_features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature dimensions differ: {real.shape[1]} and {fake.shape[1]}")
    if min(len(real), len(fake)) < 2:
        raise ValueError(f"need 2 vectors or more of each, got {len(real)} and {len(fake)}")
    return real, fake


def kernel_distance(real, fake) -> float:
    """Unbiased squared maximum mean discrepancy between features [N, D] and [M, D], in float64.

    Cost O(N M D); memory 1,024 rows of the kernel matrix.

    Raises:
      ValueError: dimensions differ, fewer than two vectors, or values that are not finite.
    """
    real, fake = _check_pair(real, fake)
    n, m = len(real), len(fake)
    within_real = (_kernel_sum(real, real) - _diagonal_sum(real)) / (n * (n - 1))
    within_fake = (_kernel_sum(fake, fake) - _diagonal_sum(fake)) / (m * (m - 1))
    return within_real + within_fake - 2.0 * _kernel_sum(real, fake) / (n * m)


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
