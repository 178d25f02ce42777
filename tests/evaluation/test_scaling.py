"""Power laws, on points that lie on one."""

import numpy as np
import pytest

from diffusion_jax import evaluation
from diffusion_jax.evaluation import scaling

C = np.geomspace(1e18, 1e21, 7)


def test_points_on_a_line_give_it_back():
    fit = scaling.fit_power_law(C, 40.0 * C**-0.063)
    assert fit.slope == pytest.approx(-0.063, rel=1e-9)
    assert np.exp(fit.intercept) == pytest.approx(40.0, rel=1e-7)
    assert fit.slope_error < 1e-12 and fit.points == 7
    np.testing.assert_allclose(fit.loss(C), 40.0 * C**-0.063, rtol=1e-9)
    np.testing.assert_allclose(fit.compute(fit.loss(C)), C, rtol=1e-9)


def test_the_error_of_the_slope_is_that_of_many_repetitions():
    rng = np.random.default_rng(0)
    noise = 0.02 * rng.standard_normal((2000, 7))
    fits = [scaling.fit_power_law(C, np.exp(3.0 - 0.05 * np.log(C) + e)) for e in noise]
    slopes = np.array([fit.slope for fit in fits])
    assert slopes.mean() == pytest.approx(-0.05, abs=4 * slopes.std() / 2000**0.5)
    claimed = np.sqrt(np.mean([fit.slope_error**2 for fit in fits]))
    assert claimed == pytest.approx(slopes.std(), rel=0.1)


def test_two_points_have_no_error():
    fit = scaling.fit_power_law([1.0, 100.0], [4.0, 1.0])
    assert fit.slope == pytest.approx(np.log(0.25) / np.log(100)) and np.isnan(fit.slope_error)


def test_the_ratio_of_slopes():
    a = scaling.PowerLaw(-0.06, 0.0, 0.003, 9)
    b = scaling.PowerLaw(-0.05, 0.0, 0.004, 9)
    ratio, error = scaling.slope_ratio(a, b)
    draws = np.random.default_rng(1).normal([-0.06, -0.05], [0.003, 0.004], (200_000, 2))
    assert ratio == pytest.approx(1.2)
    assert error == pytest.approx((draws[:, 0] / draws[:, 1]).std(), rel=0.1)


def test_a_curve_is_read_between_its_checkpoints():
    x = np.geomspace(1e9, 1e12, 4)
    got = scaling.loss_at(np.geomspace(1e9, 1e12, 11), x, 7.0 * x**-0.1)
    np.testing.assert_allclose(got, 7.0 * np.geomspace(1e9, 1e12, 11) ** -0.1, rtol=1e-12)
    assert np.isnan(scaling.loss_at([0.9e9, 1.1e12], x, x**-0.1)).all()
    assert np.isfinite(scaling.loss_at([1e12 * (1 + 1e-9)], x, x**-0.1)).all()


def test_the_vertex_of_a_parabola():
    sizes = np.array([1e5, 3e5, 1e6, 4e6])
    loss = 2.0 + 0.1 * (np.log(sizes) - np.log(5e5)) ** 2
    for order in (slice(None), slice(None, None, -1)):
        best = scaling.best_size(sizes[order], loss[order])
        assert best.params == pytest.approx(5e5) and best.loss == pytest.approx(2.0)
        assert best.inside


def test_the_best_size_at_an_end_is_said_to_be_there():
    best = scaling.best_size([1e5, 1e6, 1e7], [3.0, 2.0, 1.5])
    assert best == (1e7, 1.5, False)
    assert scaling.best_size([1e5, 1e6], [np.nan, 2.0]) == (1e6, 2.0, False)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: scaling.fit_power_law([1.0, 1.0], [2.0, 3.0]), "two values of compute"),
        (lambda: scaling.fit_power_law([1.0, 2.0], [2.0, -3.0]), "loss must be positive"),
        (lambda: scaling.fit_power_law([1.0, 2.0], [2.0]), "loss must be a vector"),
        (lambda: scaling.loss_at([1.0], [2.0, 1.0], [1.0, 1.0]), "must increase"),
        (lambda: scaling.best_size([1.0], [np.nan]), "no size has a loss"),
        (lambda: scaling.best_size([1.0, 1.0], [2.0, 2.0]), "sizes must differ"),
    ],
)
def test_what_cannot_be_fitted(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_the_names_are_public():
    assert evaluation.fit_power_law is scaling.fit_power_law
