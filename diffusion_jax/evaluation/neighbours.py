"""What nearest neighbours say: precision, recall and copies of the training set.

Precision and recall as in Kynkaanniemi et al. (arXiv 1904.06991): a set is the union of the balls
around its points that reach to each point's k-th neighbour within the set. Precision is the share
of fakes inside the real balls (quality), recall the share of reals inside the fake balls
(coverage).
"""

from collections.abc import Iterator

import numpy as np

from diffusion_jax.evaluation.frechet import check_features

_ROWS = 1024


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Blocks [<= 1024, M] of squared distances from the rows of x to all rows of y."""
    # Centring keeps the expanded square from cancelling when all points share a large offset.
    centre = y.mean(axis=0)
    x, y = x - centre, y - centre
    y_norms = (y * y).sum(axis=1)
    for start in range(0, len(x), _ROWS):
        rows = x[start : start + _ROWS]
        squares = (rows * rows).sum(axis=1)[:, None] + y_norms - 2.0 * rows @ y.T
        yield np.maximum(squares, 0.0)


def _radii(points: np.ndarray, k: int) -> np.ndarray:
    # Index k, not k - 1: the nearest point of the set to each of its points is the point itself.
    blocks = _squared_distances(points, points)
    return np.concatenate([np.partition(block, k, axis=1)[:, k] for block in blocks])


def _inside(points: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> float:
    blocks = _squared_distances(points, centres)
    return float(np.concatenate([(block <= radii).any(axis=1) for block in blocks]).mean())


def precision_recall(real, fake, *, k: int = 3) -> tuple[float, float]:
    """Precision and recall, both in [0, 1], of features [N, D] and [M, D].

    Both depend on N, M and k: compare sets of equal size only. Cost O((N + M)^2 D).

    Raises:
      ValueError: dimensions differ, k is not in 1 .. min(N, M) - 1, or values are not finite.
    """
    real, fake = check_features(real, "real"), check_features(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"feature dimensions differ: {real.shape[1]} and {fake.shape[1]}")
    if not 1 <= k < min(len(real), len(fake)):
        raise ValueError(f"k must be in 1 .. {min(len(real), len(fake)) - 1}, got {k}")
    precision = _inside(fake, real, _radii(real, k))
    recall = _inside(real, fake, _radii(fake, k))
    return precision, recall


def nearest_distance(images, reference) -> np.ndarray:
    """Root-mean-square pixel distance of each image to its nearest reference image.

    Held-out real images give the value to expect; a sampler that copies its training set gives far
    less.

    Args:
      images: [B, ...], any real dtype.
      reference: [N, ...], same trailing shape.

    Returns:
      float64 [B].

    Raises:
      ValueError: shapes that do not match, or values that are not finite.
    """
    images, reference = np.asarray(images), np.asarray(reference)
    if images.ndim < 2 or images.shape[1:] != reference.shape[1:]:
        raise ValueError(f"image shapes differ: {images.shape} and {reference.shape}")
    images = check_features(images.reshape(len(images), -1), "images")
    reference = check_features(reference.reshape(len(reference), -1), "reference")
    nearest = [block.min(axis=1) for block in _squared_distances(images, reference)]
    return np.sqrt(np.concatenate(nearest) / images.shape[1])
