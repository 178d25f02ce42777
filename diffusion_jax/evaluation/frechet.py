"""Frechet distance between Gaussians fitted to features (Heusel et al., arXiv 1706.08500).

With means m_a, m_b and covariances A, B:
  (1) d = |m_a - m_b|^2 + tr A + tr B - 2 tr (A^(1/2) B A^(1/2))^(1/2)       [Dowson & Landau 1982]
  (2) tr (A^(1/2) B A^(1/2))^(1/2) = sum of the singular values of A^(1/2) B^(1/2)

(2) is what is computed. Both roots are symmetric and come from `eigh`, so nothing complex or
negative appears, rank-deficient covariances are no special case, and since no product is squared a
singular value is accurate to eps rather than to sqrt(eps).

What the number is not:
- It is squared (the 2-Wasserstein distance is its root) and has the unit of the squared features;
  only distances in the *same* feature space, with the same number of images, compare.
- The estimate from n samples is biased upwards, to leading order by c / n where c depends on the
  model itself (Chong & Forsyth, arXiv 1911.07023): two models can swap places as n grows. Two sets
  drawn from one distribution do not give 0; hence the floor row of a table must have the n of the
  other rows. `frechet_extrapolated` removes the leading term of the fake side.
- Only two moments are seen. `kernel.kernel_distance` sees more, and is unbiased.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Sufficient statistics of a Gaussian, float64.

    Attributes:
      count: number of vectors.
      mean: [D].
      scatter: [D, D], the sum of the outer products of the centred vectors.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """[D, D], the unbiased estimate (divided by count - 1)."""
        if self.count < 2:
            raise ValueError(f"a covariance needs 2 vectors or more, got {self.count}")
        return self.scatter / (self.count - 1)


def check_features(features, name: str = "features") -> np.ndarray:
    """Features as float64 [N, D].

    Raises:
      ValueError: not two-dimensional, empty, or not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be a non-empty [N, D] array, got shape {features.shape}")
    bad = np.count_nonzero(~np.isfinite(features).all(axis=1))
    if bad:
        raise ValueError(f"{name}: {bad} of {len(features)} rows hold NaN or infinity")
    return features


def moments(features) -> Moments:
    """Statistics of a batch of features [N, D] of any real dtype. Raises ValueError (see above)."""
    features = check_features(features)
    mean = features.mean(axis=0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merge(a: Moments, b: Moments) -> Moments:
    """Statistics of the union of two sets (Chan, Golub & LeVeque 1979).

    Raises:
      ValueError: the feature dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"feature dimensions differ: {a.mean.size} and {b.mean.size}")
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    scatter = a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count)
    return Moments(count, mean, scatter)


def stream_moments(batches: Iterable) -> Moments:
    """Statistics of features that come in batches [n_i, D]; memory is that of one batch.

    Raises:
      ValueError: no batch at all, or a batch as in `moments`.
    """
    total = None
    for batch in batches:
        part = moments(batch)
        total = part if total is None else merge(total, part)
    if total is None:
        raise ValueError("no batch of features was given")
    return total


def psd_sqrt(matrix, *, tolerance: float = 1e-8) -> np.ndarray:
    """Symmetric square root of a symmetric positive semi-definite matrix [D, D], float64.

    Eigenvalues within rounding of zero are taken as zero; `tolerance` is that of negative ones,
    relative to the largest entry.

    Raises:
      ValueError: not square, not finite, not symmetric, or with an eigenvalue that is negative
        beyond rounding.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"a covariance must be a square matrix, got shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise ValueError("a covariance must be finite, got NaN or infinity")
    scale = np.abs(matrix).max(initial=0.0)
    if np.abs(matrix - matrix.T).max(initial=0.0) > 1e-8 * scale:
        raise ValueError("a covariance must be symmetric")
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    rounding = len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    if values[0] < -tolerance * scale:
        raise ValueError(f"a covariance must be positive, got the eigenvalue {values[0]:.3g}")
    roots = np.sqrt(np.where(values > rounding, values, 0.0))
    return (vectors * roots) @ vectors.T


def gaussian_distance(
    mean_a, covariance_a, mean_b, covariance_b, *, tolerance: float = 1e-8
) -> float:
    """Squared Frechet distance (1) between N(mean_a, covariance_a) and N(mean_b, covariance_b).

    Args:
      mean_a, mean_b: [D].
      covariance_a, covariance_b: [D, D], symmetric, of any rank.
      tolerance: of their eigenvalues, see `psd_sqrt`; wider for matrices that were kept in float32.

    Raises:
      ValueError: shapes that do not match, or a matrix that `psd_sqrt` refuses.
    """
    mean_a, mean_b = np.asarray(mean_a, np.float64), np.asarray(mean_b, np.float64)
    shapes = [np.shape(m) for m in (mean_a, covariance_a, mean_b, covariance_b)]
    size = mean_a.size
    if shapes != [(size,), (size, size), (size,), (size, size)]:
        raise ValueError(f"expected shapes [D], [D, D], [D], [D, D], got {shapes}")
    root_a, root_b = (psd_sqrt(c, tolerance=tolerance) for c in (covariance_a, covariance_b))
    coupling = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    spread = np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * coupling
    return float(np.sum((mean_a - mean_b) ** 2) + max(spread, 0.0))


def frechet_distance(real: Moments, fake: Moments, *, allow_singular: bool = False) -> float:
    """Frechet distance between two fitted Gaussians; see the module's text for its bias.

    Args:
      real, fake: statistics of features of the same dimension D.
      allow_singular: accept count <= D, where the fitted covariance has no full rank and the bias
        is of the size of the answer.

    Raises:
      ValueError: dimensions differ, or count <= D without `allow_singular`.
    """
    size = real.mean.size
    if fake.mean.size != size:
        raise ValueError(f"feature dimensions differ: {size} and {fake.mean.size}")
    for name, part in (("real", real), ("fake", fake)):
        if part.count <= size and not allow_singular:
            raise ValueError(
                f"{part.count} {name} vectors cannot determine a covariance of {size} features; "
                f"give at least {size + 1}, or pass allow_singular=True and distrust the number"
            )
    return gaussian_distance(real.mean, real.covariance, fake.mean, fake.covariance)


def frechet_extrapolated(
    real: Moments, features, *, seed: int = 0, sizes: int = 5, repeats: int = 5
) -> float:
    """Frechet distance with the leading bias of the fake side removed (arXiv 1911.07023, sec. 4).

    Distances of random subsets of n/2 to n features are fitted by a line in 1/n, whose value at
    1/n = 0 is returned. The bias of `real` stays; the variance is larger than that of
    `frechet_distance`, and a set as good as real data may come out slightly negative.

    Args:
      real: statistics of the real features.
      features: [N, D] fake features, N >= 2 (D + 1).
      seed: of the subsets.
      sizes: number of subset sizes, at least 2.
      repeats: subsets per size.

    Raises:
      ValueError: too few features, or sizes < 2.
    """
    features = check_features(features)
    total, size = features.shape
    if sizes < 2 or repeats < 1:
        raise ValueError(f"need sizes >= 2 and repeats >= 1, got {sizes} and {repeats}")
    if total < 2 * (size + 1):
        raise ValueError(f"extrapolation needs {2 * (size + 1)} vectors or more, got {total}")
    rng = np.random.default_rng(seed)
    inverse, distances = [], []
    for fraction in np.linspace(2.0, 1.0, sizes):
        count = round(total / fraction)
        draws = 1 if count == total else repeats
        subsets = (rng.permutation(total)[:count] for _ in range(draws))
        values = [frechet_distance(real, moments(features[rows])) for rows in subsets]
        inverse.append(1.0 / count)
        distances.append(np.mean(values))
    return float(np.polyfit(inverse, distances, 1)[1])
