import numpy as np
import pytest

from diffusion_jax.evaluation import kernel


def by_loops(x, y):
    def k(a, b):
        return (np.dot(a, b) / len(a) + 1.0) ** 3

    within = [
        np.mean([k(s[i], s[j]) for i in range(len(s)) for j in range(len(s)) if i != j])
        for s in (x, y)
    ]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_equals_the_definition_in_loops(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(11, 3)), 0.5 + rng.normal(size=(7, 3))
    expected = by_loops(x, y)
    assert kernel.kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(kernel, "_ROWS", 4)
    assert kernel.kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_mean_is_zero_for_one_distribution_whatever_the_size():
    rng = np.random.default_rng(1)
    for size in (5, 40):
        values = [
            kernel.kernel_distance(rng.normal(size=(size, 4)), rng.normal(size=(2 * size, 4)))
            for _ in range(600)
        ]
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values)) < 4 * error
        assert min(values) < 0


def test_point_masses_in_closed_form():
    # All pairs equal: k(a, a) + k(b, b) - 2 k(a, b) with D = 2.
    a, b = np.array([[1.0, 2.0]] * 3), np.array([[0.0, -1.0]] * 4)
    expected = (5 / 2 + 1) ** 3 + (1 / 2 + 1) ** 3 - 2 * (-2 / 2 + 1) ** 3
    assert kernel.kernel_distance(a, b) == pytest.approx(expected)


def test_sees_what_two_moments_do_not():
    # 2 with probability 1/5, else -1/2: mean 0, variance 1, third moment 3/2. Of the cubic kernel
    # only the third moments differ from a normal: (3/2)^2 / D^3 per coordinate.
    rng = np.random.default_rng(2)
    size, dimension = 3000, 3
    skewed = np.where(rng.random((size, dimension)) < 0.2, 2.0, -0.5)
    normal = rng.normal(size=(size, dimension))
    expected = dimension * 1.5**2 / dimension**3
    assert kernel.kernel_distance(normal, skewed) == pytest.approx(expected, rel=0.25)
    assert abs(kernel.kernel_distance(normal, rng.normal(size=(size, dimension)))) < 0.03


def test_subsets_give_mean_and_spread():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(300, 2)), rng.normal(size=(200, 2)) + 1
    mean, deviation = kernel.kernel_distance_subsets(x, y, subset_size=50, subsets=40)
    assert mean == pytest.approx(kernel.kernel_distance(x, y), abs=4 * deviation / np.sqrt(40))
    assert deviation > 0
    all_of_it = kernel.kernel_distance_subsets(x[:200], y, subset_size=200, subsets=3)
    assert all_of_it[0] == pytest.approx(kernel.kernel_distance(x[:200], y))
    assert all_of_it[1] == pytest.approx(0, abs=1e-9)


def test_refusals():
    x = np.zeros((4, 2))
    with pytest.raises(ValueError, match="dimensions differ: 2 and 3"):
        kernel.kernel_distance(x, np.zeros((4, 3)))
    with pytest.raises(ValueError, match="2 vectors or more of each, got 4 and 1"):
        kernel.kernel_distance(x, np.zeros((1, 2)))
    with pytest.raises(ValueError, match="subset_size <= 4"):
        kernel.kernel_distance_subsets(x, x, subset_size=5)
