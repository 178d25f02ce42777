"""The checkerboard: its points lie where its density says."""

import numpy as np
import pytest

from diffusion_jax.data.points import checkerboard, checkerboard_density


def test_density_integrates_to_one_and_is_that_of_the_points():
    edges = np.linspace(-5.0, 5.0, 101)
    middle = 0.5 * (edges[1:] + edges[:-1])
    grid = np.stack(np.meshgrid(middle, middle, indexing="ij"), axis=-1).reshape(-1, 2)
    density = checkerboard_density(grid)
    assert density.sum() * 0.01 == pytest.approx(1.0, rel=1e-12)
    points = checkerboard("train", 40_000).take(np.arange(40_000))["points"]
    assert points.dtype == np.float32 and (checkerboard_density(points) > 0).all()
    counts, *_ = np.histogram2d(*points.T, bins=[np.arange(-4, 5, 2.0)] * 2)
    np.testing.assert_allclose(counts[counts > 0], 40_000 / 8, atol=5 * np.sqrt(40_000 / 8))
    assert (counts > 0).sum() == 8


def test_splits_are_independent_and_fixed():
    train, test, both = (checkerboard(s, 50, 20) for s in ("train", "test", "all"))
    rows = both.take(np.arange(70))["points"]
    np.testing.assert_array_equal(rows[:50], train.take(np.arange(50))["points"])
    np.testing.assert_array_equal(rows[50:], test.take(np.arange(20))["points"])
    assert not np.isin(rows[50:], rows[:50]).any()
    assert (checkerboard(train_count=50, seed=1).take([0])["points"] != rows[:1]).any()
    with pytest.raises(ValueError, match="must be positive"):
        checkerboard(test_count=0)
