"""Exact models against numbers from elsewhere: the goldens, autodiff, brute-force conditioning, SciPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit
from scipy.integrate import solve_ivp

from diffusion_jax import oracles, registry
from diffusion_jax.processes import (
    EDM,
    VE,
    VP,
    BrownianBridge,
    Cosine,
    RectifiedFlow,
    VEBridge,
    VPBridge,
)

denoise = quick_jit(lambda oracle, x, t: oracle(x, t))
score = quick_jit(lambda oracle, x, t: oracle.score(x, t))
sample = quick_jit(lambda oracle, key, num: oracle.sample(key, num), static_argnums=2)
log_prob = quick_jit(lambda oracle, x, t: oracle.log_prob(x, t))

MEAN = np.array([0.4, -1.1])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])


def mixture(process):
    g = golden("processes_gaussian")
    return oracles.GaussianMixture(process, g["mix_w"], g["mix_means"], g["mix_covs"])


# Mixture


def test_mixture_at_the_golden_probes(x64):
    g = golden("processes_gaussian")
    oracle = mixture(VP())
    t, x = jnp.asarray(g["mix_probe_t"]), jnp.asarray(g["mix_probe_xt"])
    alpha, sigma = g["mix_probe_alpha"], g["mix_probe_sigma"]
    np.testing.assert_allclose(VP().alpha(t), alpha, rtol=1e-12)
    np.testing.assert_allclose(VP().sigma(t), sigma, rtol=1e-12)
    x0 = denoise(oracle, x, t)
    np.testing.assert_allclose(x0, g["mix_probe_x0"], atol=1e-9)
    np.testing.assert_allclose(score(oracle, x, t), g["mix_probe_score"], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(log_prob(oracle, x, t), g["mix_probe_logp"], atol=1e-9)
    eps = (x - alpha[:, None] * x0) / sigma[:, None]
    np.testing.assert_allclose(eps, g["mix_probe_eps"], atol=1e-8)


def test_mixture_under_edm_at_the_golden_probes(x64):
    g = golden("processes_gaussian")
    x, t = jnp.asarray(g["mix_probe_edm_x"]), jnp.asarray(g["mix_probe_edm_sigma"]) / 80.0
    np.testing.assert_allclose(denoise(mixture(EDM()), x, t), g["mix_probe_edm_D"], atol=1e-9)


@pytest.mark.parametrize("process", [VE(), RectifiedFlow()], ids=lambda p: type(p).__name__)
def test_mixture_score_is_the_gradient_of_its_log_density(process, x64):
    oracle = mixture(process)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 2)) * process.sigma(0.5))
    t = jnp.linspace(0.05, 0.95, 6)
    gradient = quick_jit(jax.grad(lambda x: oracle.log_prob(x, t).sum()))(x)
    np.testing.assert_allclose(score(oracle, x, t), gradient, rtol=1e-9, atol=1e-12)
    # Tweedie: x0_hat = (x + sigma^2 score) / alpha
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    np.testing.assert_allclose(denoise(oracle, x, t), (x + sigma**2 * gradient) / alpha, atol=1e-9)


def test_mixture_density_integrates_to_one(x64):
    axis = np.linspace(-7.0, 7.0, 141)
    grid = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2))
    oracle = mixture(VP())
    for t in (0.2, 0.7):
        mass = np.exp(log_prob(oracle, grid, t)).sum() * (axis[1] - axis[0]) ** 2
        assert mass == pytest.approx(1.0, abs=1e-6)


def test_mixture_takes_a_point_scalar_and_batched_times_alike():
    oracle, process = mixture(VP()), VP()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 2)), jnp.float32)
    by_scalar = denoise(oracle, x, 0.3)
    assert by_scalar.dtype == jnp.float32
    by_example = denoise(oracle, x, jnp.full(5, 0.3))
    np.testing.assert_allclose(by_example, by_scalar, rtol=1e-4, atol=1e-6)
    by_point = quick_jit(lambda x: oracle.at(x, process.point(0.3)))(x)
    np.testing.assert_allclose(by_point, by_scalar, rtol=1e-4, atol=1e-6)


def test_mixture_samples_follow_its_law():
    g = golden("processes_gaussian")
    draws = np.asarray(sample(mixture(VP()), jax.random.key(0), 40_000))
    mean = g["mix_w"] @ g["mix_means"]
    centred = g["mix_means"] - mean
    within = np.einsum("k,kij->ij", g["mix_w"], g["mix_covs"])
    cov = within + np.einsum("k,ki,kj->ij", g["mix_w"], centred, centred)
    np.testing.assert_allclose(draws.mean(0), mean, atol=4 * np.sqrt(cov.max() / 40_000))
    np.testing.assert_allclose(np.cov(draws.T), cov, atol=4 * np.sqrt(2 / 40_000) * cov.max())


def test_samples_of_a_singular_covariance():
    flat = oracles.Gaussian(VP(), [1.0, 2.0], [[1.0, 1.0], [1.0, 1.0]])
    draws = np.asarray(sample(flat, jax.random.key(0), 4000))
    np.testing.assert_allclose(draws[:, 0] - 1.0, draws[:, 1] - 2.0, atol=1e-5)
    assert draws.var(0) == pytest.approx([1.0, 1.0], rel=4 * np.sqrt(2 / 4000))
    point = oracles.Gaussian(VP(), [1.0, 2.0], np.zeros((2, 2)))
    drawn = sample(point, jax.random.key(0), 4000)
    np.testing.assert_array_equal(drawn, [[1.0, 2.0]] * 4000)
    np.testing.assert_allclose(denoise(point, jnp.ones((3, 2)), 0.5), [[1.0, 2.0]] * 3, rtol=1e-6)


# One Gaussian


def test_gaussian_denoiser_is_linear_regression(x64):
    process = Cosine()
    x = np.random.default_rng(2).standard_normal((7, 2))
    for t in (0.01, 0.5, 0.99):
        alpha, sigma = process.alpha(t), process.sigma(t)
        # Cov(x0, x_t) Cov(x_t)^-1
        gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
        exact = MEAN + (x - alpha * MEAN) @ gain.T
        got = denoise(oracles.Gaussian(process, MEAN, COVARIANCE), jnp.asarray(x), t)
        np.testing.assert_allclose(got, exact, atol=1e-12)


@pytest.mark.parametrize("name", registry.names("process", family="gaussian"))
def test_gaussian_flow_solves_the_probability_flow_ode(name):
    process = registry.get("process", name)()
    start, end = 0.9 * process.t_max, max(0.02, process.t_min)
    x = np.random.default_rng(3).standard_normal((3, 2)) * process.sigma(start)

    def velocity(t, flat):
        alpha, sigma = process.alpha(t), process.sigma(t)
        total = alpha**2 * COVARIANCE + sigma**2 * np.eye(2)
        score = -(flat.reshape(3, 2) - alpha * MEAN) @ np.linalg.inv(total)
        g2 = process.diffusion_squared(t)
        return (process.drift(t) * flat.reshape(3, 2) - 0.5 * g2 * score).ravel()

    # where the rate jumps from label to label, each stretch between two labels is smooth
    labels = getattr(process, "num_train_steps", 0)
    between = [t for t in np.arange(labels, 0, -1) / max(labels, 1) if end < t < start]
    solved = x.ravel()
    for a, b in itertools.pairwise([start, *between, end]):
        inside = (a - 1e-9, b + 1e-9) if labels else (a, b)
        solved = solve_ivp(velocity, inside, solved, "DOP853", rtol=1e-9, atol=1e-10).y[:, -1]
    got = oracles.gaussian_flow(process, MEAN, COVARIANCE, x, start, end)
    np.testing.assert_allclose(got, solved.reshape(3, 2), atol=2e-7 if not labels else 1e-5)
    back = oracles.gaussian_flow(process, MEAN, COVARIANCE, got, end, start)
    np.testing.assert_allclose(back, x, rtol=1e-9)


# Bridges

JOINT_MEAN = np.array([0.3, -0.2, -0.4, 0.25])  # of (x0, x1)
ROOT = np.random.default_rng(4).standard_normal((4, 4)) * 0.5
JOINT = ROOT @ ROOT.T + 0.05 * np.eye(4)


def gaussian_bridge(process, source):
    return oracles.GaussianBridge(
        process, source, JOINT_MEAN[:2], JOINT_MEAN[2:], JOINT[:2, :2], JOINT[:2, 2:], JOINT[2:, 2:]
    )


@pytest.mark.parametrize(
    "process", [VPBridge(), VEBridge(), BrownianBridge(1.3)], ids=lambda p: type(p).__name__
)
def test_gaussian_bridge_is_brute_force_conditioning(process, x64):
    """Condition the joint Gaussian of (x0, x1, x_t) on (x1, x_t); one time an example."""
    rng = np.random.default_rng(5)
    source, x = rng.standard_normal((2, 5, 2))
    times = np.array([process.t_min, 0.2, 0.5, 0.7, 0.999])
    exact = []
    for i, t in enumerate(times):
        a, b, c = process.a(t), process.b(t), process.c(t)
        build = np.block([[np.eye(4)], [b * np.eye(2), a * np.eye(2)]])  # (x0, x1) -> (x0, x1, x_t)
        mean, cov = build @ JOINT_MEAN, build @ JOINT @ build.T
        cov[4:, 4:] += c**2 * np.eye(2)
        given = np.concatenate([source[i], x[i]]) - mean[2:]
        exact.append(mean[:2] + cov[:2, 2:] @ np.linalg.solve(cov[2:, 2:], given))
    oracle = gaussian_bridge(process, jnp.asarray(source))
    np.testing.assert_allclose(
        denoise(oracle, jnp.asarray(x), jnp.asarray(times)), exact, atol=1e-7
    )
    np.testing.assert_allclose(denoise(oracle, jnp.asarray(x), 0.5)[2], exact[2], atol=1e-9)


def test_gaussian_bridge_starts_from_the_conditional_mean():
    source = np.random.default_rng(6).standard_normal((3, 2))
    oracle = gaussian_bridge(VPBridge(), source)
    gain = JOINT[:2, 2:] @ np.linalg.inv(JOINT[2:, 2:])
    mean = JOINT_MEAN[:2] + (source - JOINT_MEAN[2:]) @ gain.T
    np.testing.assert_allclose(denoise(oracle, source, 1.0), mean, atol=2e-5)
    got_mean, got_covariance = oracle.conditional()
    np.testing.assert_allclose(got_mean, mean, atol=2e-5)
    exact = JOINT[:2, :2] - gain @ JOINT[2:, :2]
    np.testing.assert_allclose(got_covariance, exact, atol=2e-5)


def test_gaussian_bridge_flow_solves_its_ode(x64):
    """dx/dt = f x - g^2 (score / 2 - h), with the score of the conditioned law."""
    process = VPBridge()
    source = np.random.default_rng(7).standard_normal((2, 2))
    x = source + 0.2
    oracle = gaussian_bridge(process, source)
    mean, covariance = (np.asarray(v) for v in oracle.conditional())

    def velocity(t, flat):
        state = flat.reshape(2, 2)
        a, b, c, alpha = process.a(t), process.b(t), process.c(t), process.alpha(t)
        law = b**2 * covariance + c**2 * np.eye(2)
        score = -(state - a * source - b * mean) @ np.linalg.inv(law)
        pull = -(state - alpha / process.alpha_T() * source) / (alpha**2 * process.rho_bar2(t))
        drift = process.drift(t) * state - process.diffusion_squared(t) * (0.5 * score - pull)
        return drift.ravel()

    solved = solve_ivp(velocity, (0.9, 0.05), x.ravel(), "DOP853", rtol=1e-10, atol=1e-12)
    got = oracle.flow(jnp.asarray(x), 0.9, 0.05)
    np.testing.assert_allclose(got, solved.y[:, -1].reshape(2, 2), atol=1e-7)


# Tokens


def test_token_table_has_the_golden_conditionals():
    g = golden("processes_discrete")
    oracle = oracles.token_table(g["p"])
    logits = denoise(oracle, g["cond_states"], 0.5)
    assert logits.shape == (len(g["cond_states"]), 5, 4)
    np.testing.assert_allclose(np.exp(logits), g["cond"], atol=2e-6)
    clean = g["loss_x0"]
    np.testing.assert_allclose(oracle.log_prob(clean), np.log(g["p"][tuple(clean.T)]), rtol=1e-5)


def test_token_table_by_hand():
    # two tokens of two symbols: p(00) = .4, p(01) = .1, p(10) = .2, p(11) = .3
    oracle = oracles.token_table([[0.4, 0.1], [0.2, 0.3]])
    got = np.exp(denoise(oracle, jnp.array([[2, 2], [0, 2], [2, 1], [1, 0]]), 0.0))
    np.testing.assert_allclose(got[0], [[0.5, 0.5], [0.6, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(got[1], [[1, 0], [0.8, 0.2]], rtol=1e-6)
    np.testing.assert_allclose(got[2], [[0.25, 0.75], [0, 1]], rtol=1e-6)
    np.testing.assert_allclose(got[3], [[0, 1], [1, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    "probs, words",
    [
        (np.full((2, 3), 1 / 6), r"one axis of V entries a position; got \(2, 3\)"),
        (np.array([[0.6, -0.1], [0.2, 0.3]]), "min -0.1"),
        (np.full((2, 2), 0.3), "sum 1.2"),
    ],
)
def test_bad_tables_are_refused(probs, words):
    with pytest.raises(ValueError, match=words):
        oracles.token_table(probs)
