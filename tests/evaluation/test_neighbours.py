import numpy as np
import pytest

from diffusion_jax.evaluation import neighbours


def by_loops(real, fake, k):
    def radius(points, i):
        return sorted(np.linalg.norm(points - points[i], axis=1))[k]

    def inside(points, centres):
        reach = [radius(centres, i) for i in range(len(centres))]
        hits = [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, reach)) for p in points]
        return np.mean(hits)

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_equal_the_definition(k, monkeypatch):
    rng = np.random.default_rng(k)
    real, fake = rng.normal(size=(40, 2)), 0.8 * rng.normal(size=(30, 2)) + 1.2
    expected = by_loops(real, fake, k)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    monkeypatch.setattr(neighbours, "_ROWS", 16)
    assert neighbours.precision_recall(real, fake, k=k) == pytest.approx(expected)


def test_two_failures_are_told_apart():
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + 50])
    one_mode = rng.normal(size=(400, 2))
    precision, recall = neighbours.precision_recall(real, one_mode)
    assert precision > 0.9 and recall < 0.6
    spread = rng.uniform(-60, 110, size=(400, 2))
    precision, recall = neighbours.precision_recall(real, spread)
    assert precision < 0.2 and recall > 0.8


def test_nearest_distance():
    reference = np.zeros((2, 2, 2, 1))
    reference[1] = 1.0
    images = np.stack([np.full((2, 2, 1), v) for v in (0.25, 0.75, 1.0, -2.0)])
    got = neighbours.nearest_distance(images, reference)
    np.testing.assert_allclose(got, [0.25, 0.25, 0.0, 2.0], atol=1e-7)


def test_a_large_common_offset_cancels_nothing():
    rng = np.random.default_rng(1)
    reference, images = rng.normal(size=(50, 4)), rng.normal(size=(20, 4))
    expected = np.sqrt(((images[:, None] - reference) ** 2).mean(-1)).min(1)
    got = neighbours.nearest_distance(images + 1e5, reference + 1e5)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"k must be in 1 \.\. 3, got 4"):
        neighbours.precision_recall(np.zeros((4, 2)), np.zeros((9, 2)), k=4)
    with pytest.raises(ValueError, match="dimensions differ"):
        neighbours.precision_recall(np.zeros((9, 3)), np.zeros((9, 2)))
    with pytest.raises(ValueError, match="image shapes differ"):
        neighbours.nearest_distance(np.zeros((4, 2, 2)), np.zeros((4, 2, 3)))
