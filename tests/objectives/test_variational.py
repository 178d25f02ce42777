"""The variational bound: the official program's terms, closed forms for Gaussian data, exact likelihoods."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit
from scipy.special import logsumexp, ndtr

from diffusion_jax import oracles
from diffusion_jax.objectives import bits_per_dim, variational_bound, variational_terms
from diffusion_jax.objectives.variational import (
    level_values,
    nearest_level,
    prior_nats,
    reconstruction_nats,
    variational_draws,
)
from diffusion_jax.processes import LinearLogSNR

PROCESS = LinearLogSNR()
OFFICIAL = (2 * np.arange(256) + 1) / 256 - 1


@pytest.mark.parametrize("steps", [0, 10])
def test_terms_of_the_official_program(steps, x64):
    """Its stand-in network makes eps_hat = sigma z."""
    g = golden("solvers_vdm")
    images = jnp.asarray(OFFICIAL[g["images"]])

    class Stub:
        def at(self, x, point):
            alpha, sigma = (point[n][:, None, None, None] for n in ("alpha", "sigma"))
            return (x - sigma * (sigma * x)) / alpha

        def __call__(self, x, t):
            raise AssertionError("a denoiser with `at` is called through it")

    t = (g["t0"] + jnp.arange(6) / 6) % 1.0
    terms = variational_terms(
        PROCESS.gamma,
        Stub(),
        images,
        t,
        jnp.asarray(g["eps_0"]),
        jnp.asarray(g["eps"]),
        levels=OFFICIAL,
        steps=steps,
    )
    named = zip(("recon", "klz", "diff"), terms)
    for name, value in named:
        np.testing.assert_allclose(value, g[f"T{steps}_loss_{name}"], rtol=1e-9, err_msg=name)
    bits = bits_per_dim(terms.total, images.shape[1:]).mean()
    np.testing.assert_allclose(bits, g[f"T{steps}_bpd"], rtol=1e-10)
    ends = PROCESS.sigma(np.array([0.0, 1.0])) ** 2
    np.testing.assert_allclose(ends, [g["T0_var_0"], g["T0_var_1"]], rtol=1e-12)


# Gaussian data: the exact denoiser makes the diffusion term a logarithm


def gaussian(variance, dims=2):
    """The exact denoiser of N(0, variance I), for any gamma: it reads the point."""
    return oracles.Gaussian(PROCESS, np.zeros(dims), variance * np.eye(dims))


def line(t):
    return -8.0 + 12.0 * t


def bent(t):
    """Other values between the same ends."""
    return -8.0 + 12.0 * (0.6 * t**3 + 0.4 * jnp.sin(0.5 * np.pi * t))


def snr_ends():
    return np.exp(8.0), np.exp(-4.0)


def diffusion(gamma, variance, steps, count, seed=0):
    """Draws of the diffusion term `[count]` at independent times, divided by the dimensions."""
    keys = jax.random.split(jax.random.key(seed), 4)
    x0 = jnp.sqrt(variance) * jax.random.normal(keys[0], (count, 2))
    eps = jax.random.normal(keys[1], x0.shape)
    t = jax.random.uniform(keys[2], (count,))

    @quick_jit
    def run(x0, t, eps):
        exact = gaussian(variance)
        return variational_terms(gamma, exact, x0, t, eps, eps, levels=17, steps=steps).diffusion

    return np.asarray(run(x0, t, eps), float) / 2


def within(values, exact, errors=4.0):
    return abs(values.mean() - exact) < errors * values.std() / np.sqrt(len(values))


@pytest.mark.parametrize("gamma", [line, bent])
@pytest.mark.parametrize("variance", [0.05, 1.0])
def test_diffusion_term_of_gaussian_data(gamma, variance):
    """1/2 log((1 + c snr_max) / (1 + c snr_min)) a dimension, whatever gamma is between its ends."""
    high, low = snr_ends()
    exact = 0.5 * np.log((1 + variance * high) / (1 + variance * low))
    draws = diffusion(gamma, variance, 0, 40_000)
    assert within(draws, exact)
    assert draws.std() / np.sqrt(len(draws)) < 0.02 * exact  # or the comparison would say little


def stepwise(gamma, variance, steps):
    """The exact T-step term a dimension: half the sum of snr differences times the posterior variance."""
    g = np.asarray(gamma(jnp.linspace(0.0, 1.0, steps + 1)), float)
    snr = np.exp(-g)
    return 0.5 * ((snr[:-1] - snr[1:]) * variance / (1 + variance * snr[1:])).sum()


@pytest.mark.parametrize("steps", [1, 4, 30])
def test_the_term_of_t_steps(steps):
    for gamma in (line, bent):
        assert within(diffusion(gamma, 0.4, steps, 20_000), stepwise(gamma, 0.4, steps))


def test_more_steps_bound_tighter():
    high, low = snr_ends()
    exact = 0.5 * np.log((1 + 0.4 * high) / (1 + 0.4 * low))
    sums = [stepwise(line, 0.4, n) for n in (1, 2, 4, 8, 64, 1000)]
    assert (np.diff(sums) < 0).all() and sums[-1] > exact
    assert sums[-1] == pytest.approx(exact, rel=0.01)
    # and the estimates follow on the same draws
    means = [diffusion(line, 0.4, n, 20_000).mean() for n in (1, 2, 4, 8, 64, 0)]
    assert (np.diff(means) < 0).all()


def test_the_gradient_of_gamma_between_its_ends_is_zero_in_expectation():
    """The bound moves with the ends and not with the shape: through zt, gamma' and the denoiser's point."""
    variance, high = 0.4, snr_ends()[0]

    def mean(shape, first):
        def gamma(t):
            return first + (4.0 - first) * (t + shape * t * (1 - t))

        keys = jax.random.split(jax.random.key(5), 3)
        x0 = jnp.sqrt(variance) * jax.random.normal(keys[0], (40_000, 2))
        eps = jax.random.normal(keys[1], x0.shape)
        t = (jnp.arange(40_000) + 0.5) / 40_000
        terms = variational_terms(gamma, gaussian(variance), x0, t, eps, eps, levels=17)
        return terms.diffusion.mean() / 2

    by_shape, by_end = quick_jit(jax.grad(mean, argnums=(0, 1)))(0.3, -8.0)
    exact = -0.5 * variance * high / (1 + variance * high)
    assert by_end == pytest.approx(exact, rel=0.03)
    assert abs(by_shape) < 0.03 * abs(exact) * 12.0  # a shape moves gamma by up to 12 / 4


# The whole bound against exact likelihoods


def discretised(levels, std):
    """Values on [-1, 1] and the probabilities of `N(0, std^2)` cut into their bins."""
    values = level_values(levels)
    cuts = 0.5 * (values[1:] + values[:-1]) / std
    edges = np.concatenate([[-np.inf], cuts, [np.inf]])
    return values, np.diff(ndtr(edges))


class DiscreteDenoiser:
    """E[x0 | x_t] for independent values with known probabilities."""

    def __init__(self, values, probabilities):
        self.values, self.log_p = jnp.asarray(values), jnp.log(jnp.asarray(probabilities))

    def at(self, x, point):
        alpha, sigma = (point[n][:, None, None] for n in ("alpha", "sigma"))
        logits = self.log_p - 0.5 * ((x[..., None] - alpha * self.values) / sigma) ** 2
        return (jax.nn.softmax(logits, axis=-1) * self.values).sum(axis=-1)

    def __call__(self, x, t):
        raise AssertionError("a denoiser with `at` is called through it")


def exact_gap(values, probabilities, gamma_0, gamma_1):
    """What the exact model's bound has above -log p(x) on average: two divergences, by quadrature.

    The decoder's softmax against the true posterior of the level given z_0, and the law of z_1 against
    the standard normal.
    """
    u, w = np.linspace(-9, 9, 4001), 18 / 4000
    normal = np.exp(-0.5 * u**2) / np.sqrt(2 * np.pi)
    y = values[:, None] + np.exp(0.5 * gamma_0) * u  # [level, noise]
    logits = -0.5 * ((y[..., None] - values) * np.exp(-0.5 * gamma_0)) ** 2
    decoder = logits - logsumexp(logits, axis=-1, keepdims=True)
    logits = logits + np.log(probabilities)
    posterior = logits - logsumexp(logits, axis=-1, keepdims=True)
    own = np.arange(len(values))[:, None], np.arange(len(u))[None], np.arange(len(values))[:, None]
    first = (probabilities[:, None] * w * normal * (posterior - decoder)[own]).sum()
    alpha, sigma = (1 / np.sqrt(1 + np.exp(s * gamma_1)) for s in (1, -1))
    law = np.exp(-0.5 * ((u[:, None] - alpha * values) / sigma) ** 2) @ probabilities
    law = law / (sigma * np.sqrt(2 * np.pi))
    last = (law * np.log(law / normal)).sum() * w
    return first + last


@pytest.mark.parametrize("gamma_0", [-7.8, -2.0])
def test_the_bound_of_the_exact_model_is_the_likelihood_and_its_gap(gamma_0, x64):
    """For a Gaussian cut into 17 levels, with its exact denoiser, against log of the bins' probabilities."""
    values, probabilities = discretised(17, 0.5)
    rng = np.random.default_rng(0)
    rows = np.repeat(np.arange(17), np.round(8000 * probabilities).astype(int))
    rows = rng.permutation(rows)[: len(rows) // 8 * 8]
    x0 = jnp.asarray(values[rows].reshape(-1, 8))
    gamma = lambda t: gamma_0 + (4.0 - gamma_0) * t
    exact = DiscreteDenoiser(values, probabilities)

    @quick_jit
    def run(key):
        return variational_bound(gamma, exact, key, x0, levels=17).total.mean() / 8

    means = np.array([run(jax.random.key(i)) for i in range(20)])
    gap = exact_gap(values, probabilities, gamma_0, 4.0)
    error = means.std() / np.sqrt(len(means))
    assert error < 0.02
    assert abs(means.mean() + np.log(probabilities)[rows].mean() - gap) < 4 * error
    assert gap < 0.002 if gamma_0 == -7.8 else gap > 0.05


def test_reconstruction_and_prior_by_definition(x64):
    values = level_values(9)
    rng = np.random.default_rng(1)
    x = rng.choice(values, (3, 5))
    eps = rng.standard_normal(x.shape)
    for gamma_0 in (-9.0, -3.0, 0.5):
        y = x + np.exp(0.5 * gamma_0) * eps
        logits = -0.5 * ((y[..., None] - values) * np.exp(-0.5 * gamma_0)) ** 2
        chosen = np.take_along_axis(logits, np.abs(x[..., None] - values).argmin(-1)[..., None], -1)
        exact = (logsumexp(logits, axis=-1) - chosen[..., 0]).sum(1)
        got = reconstruction_nats(gamma_0, jnp.asarray(x), jnp.asarray(eps), 9)
        np.testing.assert_allclose(got, exact, rtol=1e-9, atol=1e-12)
    # the Kullback-Leibler divergence as an integral
    gamma_1, mean = 1.0, 0.7
    alpha2, var = 1 / (1 + np.exp(gamma_1)), 1 / (1 + np.exp(-gamma_1))
    u = np.linspace(-12, 12, 20_001)
    q = np.exp(-0.5 * (u - np.sqrt(alpha2) * mean) ** 2 / var) / np.sqrt(2 * np.pi * var)
    log_ratio = -0.5 * (u - np.sqrt(alpha2) * mean) ** 2 / var - 0.5 * np.log(var) + 0.5 * u**2
    divergence = np.trapezoid(q * log_ratio, u)
    got = prior_nats(gamma_1, jnp.full((2, 3), mean))
    np.testing.assert_allclose(got, 3 * divergence, rtol=1e-8)


def test_float32_keeps_the_terms_at_the_clean_end():
    """At gamma_0 = -13.3 logits differ by a million; the terms keep their digits."""
    rng = np.random.default_rng(2)
    x = level_values(256)[rng.integers(0, 256, (4, 300))]
    eps = rng.standard_normal(x.shape)
    with jax.enable_x64(True):
        exact = np.asarray(reconstruction_nats(-13.3, jnp.asarray(x), jnp.asarray(eps), 256))
    single = (jnp.asarray(v, jnp.float32) for v in (x, eps))
    got = reconstruction_nats(jnp.float32(-13.3), *single, 256)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact, rtol=2e-3, atol=1e-3)


# Draws and mistakes


def test_draws_belong_to_the_examples_of_the_global_batch():
    x0, key = jnp.zeros((8, 3)), jax.random.key(0)
    index = jnp.arange(8)
    t, eps_0, eps = variational_draws(key, x0, index, 8)
    np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 8, atol=1e-6)
    part = variational_draws(key, x0[:3], index[2:5], 8)
    for whole, some in zip((t, eps_0, eps), part):
        np.testing.assert_allclose(some, whole[2:5], rtol=1e-6)
    assert (eps != eps_0).all() and len(np.unique(eps)) == eps.size


def test_levels():
    np.testing.assert_allclose(level_values(3), [-1, 0, 1])
    x = jnp.asarray([-3.0, -0.51, -0.49, 0.2, 0.6, 2.0])
    np.testing.assert_allclose(nearest_level(x, 3), [-1, -1, 0, 0, 1, 1])
    pixels = np.arange(256) / 127.5 - 1
    np.testing.assert_allclose(level_values(256), pixels, atol=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"levels": 1}, "got 1"),
        ({"levels": [0.0, 0.0]}, "levels must increase"),
        ({"steps": -1}, "got -1"),
        ({"t": jnp.zeros(3)}, r"t has shape \(3,\)"),
        ({"eps": jnp.zeros((4, 2))}, r"eps has shape \(4, 2\)"),
        ({"denoise": lambda x, t: x[:, :1]}, "denoise returned shape"),
    ],
)
def test_mistakes_are_named(changes, words):
    arguments = {"gamma": line, "denoise": lambda x, t: x, "x0": jnp.zeros((4, 3))}
    arguments |= {"t": jnp.full(4, 0.5), "eps_0": jnp.zeros((4, 3)), "eps": jnp.zeros((4, 3))}
    arguments |= {"levels": 17} | changes
    given = [arguments.pop(n) for n in ("gamma", "denoise", "x0", "t", "eps_0", "eps")]
    with pytest.raises(ValueError, match=words):
        variational_terms(*given, **arguments)
