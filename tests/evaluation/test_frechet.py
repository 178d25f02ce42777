"""The Frechet distance against closed forms, scipy's matrix root and the statistics' own laws."""

import numpy as np
import pytest

from diffusion_jax.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_extrapolated,
    gaussian_distance,
    merge,
    moments,
    psd_sqrt,
    stream_moments,
)


def random_covariance(rng, size, rank=None):
    factor = rng.normal(size=(size, rank or 2 * size))
    return factor @ factor.T / size


def random_rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def test_equal_gaussians_have_distance_zero():
    rng = np.random.default_rng(0)
    mean, covariance = rng.normal(size=20), random_covariance(rng, 20)
    assert gaussian_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-12)


def test_one_dimension():
    got = gaussian_distance([1.5], [[4.0]], [-0.5], [[0.25]])
    assert got == pytest.approx(2.0**2 + (2.0 - 0.5) ** 2)


def test_commuting_covariances():
    rng = np.random.default_rng(1)
    basis = random_rotation(rng, 12)
    a, b = rng.uniform(0.01, 9, 12), rng.uniform(0.01, 9, 12)
    shift = rng.normal(size=12)
    got = gaussian_distance(shift, basis * a @ basis.T, np.zeros(12), basis * b @ basis.T)
    assert got == pytest.approx(np.sum(shift**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2))


def test_spectra_over_twelve_decades_lose_nothing():
    rng = np.random.default_rng(2)
    basis = random_rotation(rng, 13)
    a, b = np.logspace(-12, 0, 13), np.logspace(0, -12, 13)
    got = gaussian_distance(np.zeros(13), basis * a @ basis.T, np.zeros(13), basis * b @ basis.T)
    assert got == pytest.approx(np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-8)


@pytest.mark.parametrize("size", [1, 3, 17, 64])
def test_agrees_with_scipy(size):
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(size)
    mean_a, mean_b = rng.normal(size=(2, size))
    a, b = random_covariance(rng, size), random_covariance(rng, size)
    coupling = np.trace(linalg.sqrtm(a @ b)).real
    expected = np.sum((mean_a - mean_b) ** 2) + np.trace(a) + np.trace(b) - 2 * coupling
    assert gaussian_distance(mean_a, a, mean_b, b) == pytest.approx(expected, rel=1e-9)


def test_rank_one_covariances():
    u, v = np.array([3.0, 0.0, 4.0]), np.array([1.0, 2.0, -1.0])
    got = gaussian_distance(np.zeros(3), np.outer(u, u), np.zeros(3), np.outer(v, v))
    assert got == pytest.approx(u @ u + v @ v - 2 * abs(u @ v))


def test_disjoint_ranges_couple_not_at_all():
    a, b = np.diag([1.0, 2.0, 0.0, 0.0]), np.diag([0.0, 0.0, 3.0, 5.0])
    assert gaussian_distance(np.zeros(4), a, np.zeros(4), b) == pytest.approx(11.0)


def test_rotation_shift_scale_and_order():
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(80, 6)), rng.normal(size=(90, 6)) * np.arange(1, 7) + 0.3
    rotation, shift = random_rotation(rng, 6), rng.normal(size=6) * 100
    base = frechet_distance(moments(a), moments(b))
    moved = frechet_distance(moments(a @ rotation + shift), moments(b @ rotation + shift))
    assert moved == pytest.approx(base, rel=1e-9)
    assert frechet_distance(moments(3 * a), moments(3 * b)) == pytest.approx(9 * base)
    assert frechet_distance(moments(b), moments(a)) == pytest.approx(base)


def test_square_root_squares_back_and_is_symmetric():
    matrix = random_covariance(np.random.default_rng(4), 9, rank=4)
    root = psd_sqrt(matrix)
    np.testing.assert_allclose(root @ root, matrix, atol=1e-12)
    np.testing.assert_array_equal(np.abs(root - root.T) < 1e-14, True)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [50], [7, 99]])
def test_streaming_equals_one_batch(cuts):
    rng = np.random.default_rng(5)
    features = rng.normal(size=(100, 5)) * [1, 10, 0.1, 1, 1] + 1e4
    whole, parts = moments(features), stream_moments(iter(np.split(features, cuts)))
    assert parts.count == 100
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(parts.covariance, whole.covariance, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.covariance, np.cov(features.T), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(whole.mean, features.mean(0))


def test_statistics_of_float32_features_are_float64():
    # float32 sums would lose the spread of 1e-2 around 1e3 altogether.
    rng = np.random.default_rng(6)
    features = (1e3 + 1e-2 * rng.normal(size=(4000, 2))).astype(np.float32)
    got = moments(features)
    assert got.mean.dtype == got.scatter.dtype == np.float64
    np.testing.assert_allclose(np.diag(got.covariance), 1e-4, rtol=0.1)


def test_bias_falls_like_one_over_n_and_extrapolation_removes_it():
    rng = np.random.default_rng(7)
    size, true = 8, 0.5**2
    real = Moments(10**6, np.zeros(size), np.eye(size) * (10**6 - 1))
    mean = np.zeros(size)
    mean[0] = 0.5
    plain, longer, extrapolated = [], [], []
    for _ in range(40):
        fake = rng.normal(size=(400, size)) + mean
        plain.append(frechet_distance(real, moments(fake[:100])) - true)
        longer.append(frechet_distance(real, moments(fake)) - true)
        extrapolated.append(frechet_extrapolated(real, fake[:100], repeats=4) - true)
    assert np.mean(plain) > 0.1
    assert np.mean(plain) / np.mean(longer) == pytest.approx(4, rel=0.3)
    assert abs(np.mean(extrapolated)) < 0.25 * np.mean(plain)


def test_too_few_vectors_are_refused_unless_allowed():
    rng = np.random.default_rng(8)
    few, many = moments(rng.normal(size=(8, 8))), moments(rng.normal(size=(9, 8)))
    with pytest.raises(ValueError, match=r"8 fake vectors .* 8 features.* at least 9"):
        frechet_distance(many, few)
    with pytest.raises(ValueError, match="8 real vectors"):
        frechet_distance(few, many)
    assert np.isfinite(frechet_distance(many, few, allow_singular=True))
    with pytest.raises(ValueError, match="needs 18 vectors or more, got 17"):
        frechet_extrapolated(many, rng.normal(size=(17, 8)))


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="1 of 3 rows hold NaN"):
        moments([[1.0], [np.nan], [2.0]])
    with pytest.raises(ValueError, match=r"\[N, D\] array, got shape \(3,\)"):
        moments(np.zeros(3))
    with pytest.raises(ValueError, match="dimensions differ: 2 and 3"):
        merge(moments(np.zeros((4, 2))), moments(np.zeros((4, 3))))
    with pytest.raises(ValueError, match="no batch"):
        stream_moments([])
    with pytest.raises(ValueError, match="symmetric"):
        psd_sqrt([[1.0, 0.5], [0.0, 1.0]])
    with pytest.raises(ValueError, match="eigenvalue -1"):
        psd_sqrt([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(ValueError, match="expected shapes"):
        gaussian_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2))
    with pytest.raises(ValueError, match="2 vectors or more"):
        _ = moments(np.zeros((1, 2))).covariance
