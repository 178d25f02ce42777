"""Bayesian flows as processes: the papers' formulas in their own clock, updates, moments, starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.processes import ContinuousBFN, DiscreteBFN
from diffusion_jax.samplers.build import family_of


def test_continuous_flow_in_the_papers_clock():
    """gamma = 1 - v^s, variance gamma (1 - gamma); BFN-Solver's drift and diffusion."""
    for v in (1e-6, 1e-3):
        process, s = ContinuousBFN(v), np.linspace(0.01, 1.0, 30)
        gamma, t = 1 - v**s, 1 - s
        np.testing.assert_allclose(process.alpha(t), gamma, rtol=1e-12)
        np.testing.assert_allclose(process.sigma(t), np.sqrt(gamma * (1 - gamma)), rtol=1e-9)
        np.testing.assert_allclose(process.log_snr(t), np.log(v**-s - 1), rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(process.drift(t), np.log(v) * (1 - gamma) / gamma, rtol=1e-9)
        np.testing.assert_allclose(
            process.diffusion_squared(t), -np.log(v) * (1 - gamma), rtol=1e-9
        )
        assert process.sampling_range == (0.99, 0.0)
        assert process.sigma(0.0) == pytest.approx(np.sqrt(v * (1 - v)))


def test_the_ends_of_the_continuous_flow():
    process = ContinuousBFN()
    point = process.point(1.0)
    assert point["alpha"] == point["sigma"] == 0.0
    assert process.lam(1.0) == -np.inf and process.noise_level(1.0) == np.inf
    for t in (1e-5, 0.3, 1 - 1e-5):
        assert np.isfinite(list(process.point(t).values())).all()
        device = process.point(jnp.float32(t))
        assert all(np.isfinite(v) for v in device.values())
    lam = np.array([-8.0, 0.0, 6.0])
    np.testing.assert_allclose(process.lam(process.t_of_lam(lam)), lam, rtol=1e-9, atol=1e-9)


def test_the_flow_is_what_observations_leave_behind():
    """mu after observations y_i ~ N(x, 1 / a_i) from a unit prior: precision 1 + sum a = v^-s."""
    process, n = ContinuousBFN(1e-3), 12
    step = np.arange(1, n + 1)
    accuracy = 1e-3 ** (-step / n) * (1 - 1e-3 ** (1 / n))
    for i in (1, 5, 12):
        precision = 1 + accuracy[:i].sum()
        mean = accuracy[:i].sum() / precision  # of mu, for x = 1
        variance = accuracy[:i].sum() / precision**2
        np.testing.assert_allclose(process.alpha(1 - i / n), mean, rtol=1e-10)
        np.testing.assert_allclose(process.sigma(1 - i / n) ** 2, variance, rtol=1e-10)


def test_priors_have_the_moments_of_the_start():
    for process, mean, std in (
        (ContinuousBFN(1e-3, 0.05), 0.0, 0.0),
        (ContinuousBFN(1e-3, 0.05, data_mean=0.4, data_std=0.7), 0.4, 0.7),
    ):
        draws = np.asarray(process.prior(jax.random.key(0), (20_000, 2)))
        g = 1 - 1e-3**0.05
        variance = g * (1 - g) + (g * std) ** 2
        assert draws.dtype == np.float32
        error = 4 * np.sqrt(variance / draws.size)
        np.testing.assert_allclose(draws.mean(), g * mean, atol=error)
        np.testing.assert_allclose(draws.var(), variance, rtol=4 * np.sqrt(2 / draws.size))
    nothing = ContinuousBFN(eta=0.0).prior(jax.random.key(0), (3, 2))
    np.testing.assert_array_equal(nothing, 0.0)


def test_discrete_flow_has_the_stated_moments():
    process, t = DiscreteBFN(4, beta1=1.5), 0.4
    tokens = np.tile([[2, 0]], (40_000, 1))
    eps = np.random.default_rng(0).standard_normal((40_000, 2, 4))
    z = process.corrupt(tokens, eps, t)
    beta = 1.5 * 0.36
    assert process.beta(t) == pytest.approx(beta)
    mean = beta * (4 * np.eye(4)[[2, 0]] - 1)
    error = 4 * np.sqrt(4 * beta / len(z))
    np.testing.assert_allclose(z.mean(0), mean, atol=error)
    np.testing.assert_allclose(z.var(0), 4 * beta, rtol=4 * np.sqrt(2 / len(z)))
    batch = process.corrupt(tokens[:3], eps[:3], np.array([0.0, 0.4, 1.0]))
    np.testing.assert_allclose(batch[1], z[1])
    np.testing.assert_array_equal(batch[2], 0.0)  # nothing is known at t = 1


def test_observations_add_up_to_the_discrete_flow():
    """Accuracies beta1 (2 i - 1) / n^2 sum to beta; z is the log-likelihood of all y together."""
    process, n = DiscreteBFN(3, beta1=2.0), 8
    accuracy = 2.0 * (2 * np.arange(1, n + 1) - 1) / n**2
    np.testing.assert_allclose(np.cumsum(accuracy), process.beta(1 - np.arange(1, n + 1) / n))
    slope = (process.beta(0.3 + 1e-6) - process.beta(0.3 - 1e-6)) / 2e-6
    assert process.dbeta(0.3) == pytest.approx(slope, rel=1e-6)
    rng = np.random.default_rng(1)
    z = process.corrupt(np.array([[1]]), rng.standard_normal((1, 1, 3)), 0.2)[0, 0]
    beta, log_density = process.beta(0.2), []
    for k in range(3):
        mean = beta * (3 * np.eye(3)[k] - 1)
        log_density.append(-((z - mean) ** 2).sum() / (2 * 3 * beta))
    posterior = np.exp(log_density - np.max(log_density))
    softmax = np.exp(z - z.max())
    np.testing.assert_allclose(posterior / posterior.sum(), softmax / softmax.sum(), rtol=1e-9)


def test_discrete_prior():
    process = DiscreteBFN(5, beta1=2.0, eta=0.1)
    z = process.prior(jax.random.key(0), (3_000, 2))
    assert z.shape == (3_000, 2, 5)
    np.testing.assert_allclose(np.var(z), 5 * 2.0 * 0.01, rtol=4 * np.sqrt(2 / z.size))
    some = process.prior(jax.random.key(0), (2, 2), index=np.array([7, 3]))
    np.testing.assert_array_equal(some, z[np.array([7, 3])])
    assert family_of(process) == "bayesian_flow" and family_of(ContinuousBFN()) == "gaussian"


@pytest.mark.parametrize(
    "make, words",
    (
        (
            lambda: ContinuousBFN(min_variance=1.0),
            "min_variance = 1.0 must lie between 0.0 and 1.0",
        ),
        (lambda: ContinuousBFN(eta=1.0), r"eta = 1.0 must lie in \[0, 1\)"),
        (lambda: ContinuousBFN(t_min=0.5, t_max=0.4), "t_min = 0.5"),
        (lambda: DiscreteBFN(1), "vocab_size = 1 must be an int of at least 2"),
        (lambda: DiscreteBFN(4, beta1=0.0), "beta1 = 0.0"),
        (lambda: DiscreteBFN(4, eta=-0.1), "eta = -0.1"),
        (lambda: DiscreteBFN(4).check_tokens(np.zeros((2, 3))), "integer array"),
        (lambda: DiscreteBFN(4).check_tokens(np.full((2, 3), 4)), r"must lie in 0..3; got 4..4"),
    ),
)
def test_bad_values_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
