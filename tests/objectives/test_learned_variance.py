"""Learned variances of the reverse step: their range, the loss that teaches them, the sampler that uses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from quick_jit import quick_jit

from diffusion_jax import objectives, registry, samplers
from diffusion_jax.denoisers import Denoiser
from diffusion_jax.guidance import clip, guide
from diffusion_jax.processes import VP, discrete_vp
from diffusion_jax.processes.reverse_step import interpolated_log_variance, reverse_step

CHAIN = discrete_vp()
RNG = np.random.default_rng(0)


def moments(t, s):
    """Mean weights and variance of q(x_s | x_t, x0) from the joint law of x_s and x_t given x0."""
    (a, b), (u, v) = ((float(CHAIN.alpha(n)), float(CHAIN.sigma(n))) for n in (s, t))
    covariance = u / a * b**2  # x_t = (u / a) x_s + what is added
    weight = covariance / v**2
    return weight, a - weight * u, b**2 - weight * covariance, v**2 - (u / a * b) ** 2


@pytest.mark.parametrize("n", [2, 17, 500, 1000])
def test_reverse_step_is_the_conditional_of_a_joint_gaussian(n):
    t, s = n / 1000, (n - 1) / 1000
    step = reverse_step(CHAIN, t, s)
    got = step.x, step.x0, np.exp(step.log_small), np.exp(step.log_large)
    np.testing.assert_allclose(got, moments(t, s), rtol=1e-7)
    traced = reverse_step(CHAIN, jnp.float32(t), jnp.float32(s))
    np.testing.assert_allclose(np.exp(traced.log_small), np.exp(step.log_small), rtol=2e-3)


def test_the_large_end_is_beta():
    betas = np.linspace(1e-4, 0.02, 1000)
    large = [np.exp(reverse_step(CHAIN, (n + 1) / 1000, n / 1000).log_large) for n in range(1000)]
    np.testing.assert_allclose(large, betas, rtol=1e-9)
    assert reverse_step(CHAIN, 0.001, 0.0).log_small == -np.inf


def test_outputs_within_one_stay_between_the_ends():
    v = np.linspace(-1.0, 1.0, 9)
    step = reverse_step(CHAIN, 0.5, 0.499)
    log_variance = interpolated_log_variance(step.log_small, step.log_large, v)
    assert log_variance[0] == step.log_small and log_variance[-1] == step.log_large
    assert (np.diff(log_variance) > 0).all()


def test_bound_is_the_divergence_of_two_gaussians():
    t, s, v = 0.2, 0.199, 0.3
    x, x0, _small, large = moments(t, s)
    small = _small
    variance = np.exp(0.5 * (1 + v) * np.log(large) + 0.5 * (1 - v) * np.log(small))
    data, guess, xt = 0.4, 0.1, -0.7
    p = scipy.stats.norm(x * xt + x0 * guess, variance**0.5)
    q = scipy.stats.norm(x * xt + x0 * data, small**0.5)
    span = q.mean() + 12 * q.std() * np.array([-1, 1])
    nats, _ = scipy.integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - p.logpdf(z)), *span)
    full = lambda value: jnp.full((1, 2, 2, 1), value, jnp.float32)
    got = objectives.variance_bound(
        CHAIN, full(data), full(xt), full(guess), full(v), jnp.array([t], jnp.float32), 1000
    )
    assert got[0] == pytest.approx(nats / np.log(2), rel=5e-3)


def test_first_step_is_the_likelihood_of_a_level():
    data, guess, v, levels = np.array([-1.0, 0.2, 1.0]), np.array([-0.9, 0.21, 0.95]), 0.0, 11
    variance = np.exp(
        0.5 * reverse_step(CHAIN, 0.002, 0.001).log_small
        + 0.5 * reverse_step(CHAIN, 0.001, 0.0).log_large
    )
    low, high = np.array([-np.inf, 0.1, 0.9]), np.array([-0.9, 0.3, np.inf])
    law = scipy.stats.norm(guess, variance**0.5)
    bits = -np.log2(np.maximum(law.cdf(high) - law.cdf(low), 1e-12)).mean()
    row = lambda a: jnp.asarray(a, jnp.float32)[None]
    t = jnp.array([0.001], jnp.float32)
    got = objectives.variance_bound(
        CHAIN, row(data), row(guess), row(guess), row(np.full(3, v)), t, 1000, levels
    )
    assert got[0] == pytest.approx(bits, rel=1e-2)


def network(x, t):
    """A prediction and a v that depend on x, with twice the channels."""
    t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])[:, None]
    return jnp.concatenate([0.5 * jnp.tanh(x) + 0.1 * t, jnp.sin(x)], axis=-1)


def test_loss_is_the_plain_one_and_the_bound_of_the_variance_alone():
    x0, key = RNG.standard_normal((16, 3)).astype(np.float32), jax.random.key(0)

    def losses(weights):
        scaled = lambda x, t: network(x, t) * jnp.repeat(weights, 3)
        with_v = Denoiser(scaled, CHAIN, "eps", learned_variance=True)
        return objectives.learned_variance_denoising(CHAIN, with_v, key, x0)

    def plain(weight):
        first = lambda x, t: network(x, t)[:, :3] * weight
        denoise = Denoiser(first, CHAIN, "eps")
        return objectives.denoising(CHAIN, denoise, key, x0, times="labels")[0].mean()

    (value, aux), slope = quick_jit(
        jax.value_and_grad(lambda w: (losses(w)[0].mean(), losses(w)[1]), has_aux=True)
    )(jnp.ones(2))
    simple, simple_slope = quick_jit(jax.value_and_grad(plain))(1.0)
    labels = 1000 * np.asarray(aux["t"])
    np.testing.assert_allclose(labels, np.round(labels), atol=1e-3)
    assert value == pytest.approx(float(simple + aux["vlb"].mean()), rel=1e-4)
    assert slope[0] == pytest.approx(float(simple_slope), rel=1e-3)
    assert abs(slope[1]) > 1e-5


def test_the_variance_is_learnt_where_the_mean_is_given():
    """Standard normal data and their own denoiser: the best variance is that of p(x_s | x_t)."""
    x0 = RNG.standard_normal((4096, 1)).astype(np.float32)
    t = jnp.full(4096, 0.3, jnp.float32)
    exact = lambda x: CHAIN.alpha(0.3) * x
    xt = CHAIN.corrupt(x0, RNG.standard_normal(x0.shape).astype(np.float32), t)
    grid = np.linspace(-1.0, 1.0, 41)
    bound = quick_jit(
        lambda v: objectives.variance_bound(CHAIN, x0, xt, exact(xt), v, t, 1000).mean()
    )
    best = grid[np.argmin([bound(jnp.full_like(x0, v)) for v in grid])]
    # x_s and x_t are jointly normal with unit variances: the conditional variance is beta itself
    assert best == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("v, variance", [(-1.0, "small"), (1.0, "large")])
def test_at_the_ends_of_the_range_the_sampler_is_the_fixed_one(v, variance):
    def fixed(x, t):
        return jnp.concatenate([0.5 * jnp.tanh(x), jnp.full_like(x, v)], axis=-1)

    denoise = Denoiser(fixed, CHAIN, "eps", learned_variance=True)
    x, key = jax.random.normal(jax.random.key(1), (4, 3)), jax.random.key(2)
    options = dict(num_steps=5, grid="respaced")
    learned = samplers.ddpm(CHAIN, variance="learned", **options)
    assert learned.nfe == 5 and learned.stochastic
    got = samplers.sample(learned, denoise, key, x)
    expected = samplers.sample(samplers.ddpm(CHAIN, variance=variance, **options), denoise, key, x)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_guidance_takes_the_variance_of_the_conditional_model():
    told = Denoiser(network, CHAIN, "eps", learned_variance=True)
    other = Denoiser(lambda x, t: -network(x, t), CHAIN, "eps", learned_variance=True)
    x, point = RNG.standard_normal((2, 3)).astype(np.float32), CHAIN.point(0.5)
    x0, v = clip(guide(told, other, 1.5)).moments(x, point)
    np.testing.assert_allclose(v, np.sin(x), rtol=1e-5)
    np.testing.assert_allclose(x0, clip(guide(told, other, 1.5)).at(x, point), rtol=1e-6)
    part = guide(told, other, 1.5, 2).at(x, point)
    np.testing.assert_allclose(part[:, 2], told.at(x, point)[:, 2], rtol=1e-6)
    np.testing.assert_allclose(part[:, :2], guide(told, other, 1.5).at(x, point)[:, :2], rtol=1e-6)


def test_errors():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="6 output channels, got 3"):
        Denoiser(lambda x, t: x, CHAIN, "eps", learned_variance=True)(x, 0.5)
    with pytest.raises(ValueError, match="no learned variance"):
        learned = samplers.ddpm(CHAIN, 3, variance="learned")
        samplers.sample(learned, Denoiser(lambda x, t: x, CHAIN), jax.random.key(0), x)
    with pytest.raises(ValueError, match="channels must be a positive int or None, got 0"):
        guide(network, network, 1.5, 0)
    with pytest.raises(ValueError, match="4 channels cannot be guided: there are 3"):
        guide(lambda x, t: x, lambda x, t: -x, 1.5, 4)(x, 0.5)
    with pytest.raises(ValueError, match="'labels' need a list of noise levels"):
        registry.get("times", "labels")(VP(), jax.random.key(0), jnp.arange(2), 2)
