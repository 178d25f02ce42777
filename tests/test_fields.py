"""Exact fields against the authors' and a second derivation; the field made of learned parts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import oracles
from diffusion_jax.fields import InterpolantField, split_heads
from diffusion_jax.processes import BrownianBridge, Interpolant, RectifiedFlow, VPBridge

STORED = golden("bridges_si")
T = 1.0 - STORED["t"]
LINEAR = Interpolant(t_min=0.0, t_max=1.0)
COUPLING = np.array([[0.2, 0.05, 0.0], [-0.1, 0.1, 0.02], [0.0, 0.03, -0.15]])
X = STORED["x"]


def gaussian(process, coupled=True):
    cov01 = COUPLING if coupled else None
    m0, c0, m1, c1 = (STORED[n] for n in ("m1", "C1", "m0", "C0"))
    return oracles.GaussianInterpolant(process, m0, c0, m1, c1, cov01)


def mixtures(process):
    data, source = (tuple(STORED[f"mix_{n}{end}"] for n in ("p", "mu", "C")) for end in (1, 0))
    return oracles.MixtureInterpolant(process, data, source)


def test_drift_and_score_of_the_authors(x64):
    point = LINEAR.point(jnp.asarray(T))
    for oracle, name in ((gaussian(LINEAR, coupled=False), "gauss"), (mixtures(LINEAR), "mix")):
        parts = oracle.parts(jnp.asarray(X), point)
        np.testing.assert_allclose(-parts["velocity"], STORED[f"{name}_b"], rtol=0, atol=2e-14)
        np.testing.assert_allclose(parts["score"], STORED[f"{name}_s"], rtol=0, atol=2e-14)


PROCESSES = (
    LINEAR,
    Interpolant("trig", "quadratic"),
    Interpolant("encoder_decoder", "sin2"),
    Interpolant(gamma="none"),
    VPBridge(),
)


@pytest.mark.parametrize("process", PROCESSES)
def test_coupled_gaussians_by_conditioning_of_one_large_gaussian(process, x64):
    """Second derivation: x_t and each target are linear in (x0, x1, z)."""
    oracle = gaussian(process)
    mean = np.concatenate([STORED["m1"], STORED["m0"], np.zeros(3)])
    covariance = np.block(
        [
            [STORED["C1"], COUPLING, np.zeros((3, 3))],
            [COUPLING.T, STORED["C0"], np.zeros((3, 3))],
            [np.zeros((3, 6)), np.eye(3)],
        ]
    )
    for t in (0.1, 0.35, 0.8):
        point, slopes = process.point(t), process.slopes(t)
        to_x = np.kron([point["b"], point["a"], point["c"]], np.eye(3))
        gain = covariance @ to_x.T @ np.linalg.inv(to_x @ covariance @ to_x.T)
        x0, x1, z = np.split(mean + (X - to_x @ mean) @ gain.T, 3, axis=1)
        parts = oracle.parts(jnp.asarray(X), point)
        expected = {
            "x0": x0,
            "x1": x1,
            "denoiser": z,
            "conditional_velocity": slopes["a"] * x1 + slopes["b"] * x0,
        }
        if point["c"] > 0:
            noise_slope = slopes["cc"] / point["c"]
            expected["velocity"] = expected["conditional_velocity"] + noise_slope * z
            expected["score"] = -z / point["c"]
        for name, value in expected.items():
            np.testing.assert_allclose(parts[name], value, rtol=0, atol=1e-12, err_msg=name)


def test_the_score_of_mixtures_is_the_gradient_of_the_density(x64):
    process, t = Interpolant("trig", "sigmoid"), 0.4
    oracle, point = mixtures(process), process.point(0.4)

    def log_density(x):
        total = 0.0
        for p1, m1, c1 in zip(*(STORED[f"mix_{n}0"] for n in ("p", "mu", "C"))):
            for p0, m0, c0 in zip(*(STORED[f"mix_{n}1"] for n in ("p", "mu", "C"))):
                mean = point["a"] * m1 + point["b"] * m0
                covariance = (
                    point["a"] ** 2 * c1 + point["b"] ** 2 * c0 + point["c"] ** 2 * np.eye(3)
                )
                total += p0 * p1 * jax.scipy.stats.multivariate_normal.pdf(x, mean, covariance)
        return jnp.log(total)

    expected = jax.vmap(jax.grad(log_density))(jnp.asarray(X))
    found = oracle.parts(jnp.asarray(X), process.point(t))["score"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES)
def test_velocity_is_conditional_velocity_less_noise_times_score(process, x64):
    """b = v - gamma gamma' s pointwise, on nonlinear fields."""
    t = jnp.linspace(0.05, 0.95, len(X))
    parts = mixtures(process).parts(jnp.asarray(X), process.point(t))
    cc = process.slopes(t)["cc"][:, None]
    rebuilt = parts["conditional_velocity"] - cc * parts["score"]
    np.testing.assert_allclose(parts["velocity"], rebuilt, rtol=0, atol=1e-13)


@pytest.mark.parametrize("epsilon", (None, 0.7, -0.4))
def test_a_field_of_any_learned_parts_is_the_exact_one(epsilon, x64):
    process = Interpolant("trig", "brownian", scale=0.9)
    oracle, x = mixtures(process), jnp.asarray(X)
    point = process.point(jnp.linspace(0.05, 0.95, len(X)))
    if epsilon is not None:
        point["epsilon"] = jnp.asarray(epsilon)
    expected = oracle.at(x, point)

    def learned(name):
        return lambda x, t: oracle.parts(x, process.point(t))[name]

    for motion, noise in itertools.product(
        ("velocity", "conditional_velocity"), ("denoiser", "score")
    ):
        apart = InterpolantField(process, **{n: learned(n) for n in (motion, noise)})
        joint = InterpolantField(
            process, joint=lambda x, t, ns=(motion, noise): {n: learned(n)(x, t) for n in ns}
        )
        for field in (apart, joint):
            np.testing.assert_allclose(field.at(x, point), expected, rtol=0, atol=1e-12)
            parts = oracle.parts(x, point)
            for name in ("score", "denoiser"):
                found = getattr(field, f"{name}_at")(x, point)
                np.testing.assert_allclose(found, parts[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("path", ("linear", "trig"))
def test_a_one_sided_field_knows_its_score(path, x64):
    """Flow matching: the score from the velocity alone, against the mixture oracle of the same process."""
    process = Interpolant(path, gamma="none")
    gaussian_process = RectifiedFlow()
    weights, means, covariances = (STORED[f"mix_{n}1"] for n in ("p", "mu", "C"))
    source = (np.ones(1), np.zeros((1, 3)), np.eye(3)[None])
    oracle = oracles.MixtureInterpolant(process, (weights, means, covariances), source)
    field = InterpolantField(process, velocity=oracle, one_sided=True)
    x = jnp.asarray(X)
    for t in (0.1, 0.5, 0.9):
        point = {**process.point(t), "epsilon": 0.3}
        np.testing.assert_allclose(field.at(x, point), oracle.at(x, point), rtol=0, atol=1e-12)
        if path == "linear":
            mixture = oracles.GaussianMixture(gaussian_process, weights, means, covariances)
            score = mixture.score(x, t)
            np.testing.assert_allclose(field.score_at(x, point), score, rtol=0, atol=1e-12)


def test_with_half_of_g_squared_the_drift_is_the_reverse_sde(x64):
    """Brownian bridge: u - g^2 / 2 s = (x - E[x0 | x]) / t, in which the source has cancelled."""
    process = BrownianBridge(scale=1.3)
    oracle, x, t = mixtures(process), jnp.asarray(X), 0.35
    point = {**process.point(t), "epsilon": 0.5 * process.diffusion_squared(t)}
    expected = (x - oracle.parts(x, point)["x0"]) / t
    np.testing.assert_allclose(oracle.at(x, point), expected, rtol=0, atol=1e-12)


def test_pairs_are_drawn_from_their_law(x64):
    oracle = gaussian(LINEAR)
    x0, x1 = oracle.sample(jax.random.key(0), 40_000)
    together = np.concatenate([x0, x1], axis=1)
    mean = np.concatenate([STORED["m1"], STORED["m0"]])
    covariance = np.block([[STORED["C1"], COUPLING], [COUPLING.T, STORED["C0"]]])
    np.testing.assert_allclose(together.mean(0), mean, rtol=0, atol=0.03)
    np.testing.assert_allclose(np.cov(together.T), covariance, rtol=0, atol=0.05)


def test_heads_and_mistakes():
    x = jnp.ones((2, 3))
    heads = split_heads(lambda x, t: jnp.concatenate([x, 2 * x], -1), ("velocity", "denoiser"))
    found = heads(x, 0.5)
    np.testing.assert_array_equal(found["denoiser"], 2 * found["velocity"])
    with pytest.raises(ValueError, match="need 6 channels"):
        split_heads(lambda x, t: x, ("velocity", "denoiser"))(x, 0.5)
    with pytest.raises(ValueError, match=r"needs a velocity.*it has denoiser"):
        InterpolantField(LINEAR, denoiser=lambda x, t: x)
    with pytest.raises(ValueError, match="it has nothing"):
        InterpolantField(LINEAR)(x, 0.5)
    ode_only = InterpolantField(LINEAR, velocity=lambda x, t: x)
    np.testing.assert_array_equal(ode_only(x, 0.5), x)
    with pytest.raises(ValueError, match="needs a score or a denoiser; this field has velocity"):
        ode_only.at(x, {**LINEAR.point(0.5), "epsilon": 0.1})
