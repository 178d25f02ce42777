"""ODE and SDE samplers of interpolants: the authors' runs, exact laws, orders, diffusion swept after training."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from golden_files import golden
from solver_checks import affine_law, plain_run

from diffusion_jax import oracles
from diffusion_jax.numerics import pytree_dataclass
from diffusion_jax.processes import VP, BrownianBridge, Interpolant, VPBridge
from diffusion_jax.samplers import interpolant_euler, interpolant_heun, sample, with_noise

STORED = golden("bridges_si")
LINEAR = Interpolant(t_min=0.0, t_max=1.0)
DATA = STORED["m1"], STORED["C1"]
SOURCE = STORED["m0"], STORED["C0"]
SOLVERS = (interpolant_euler, interpolant_heun)
COUPLING = np.array([[0.2, 0.05, 0.0], [-0.1, 0.1, 0.02], [0.0, 0.03, -0.15]])


@pytree_dataclass
class Drift:
    """The exact drift of Gaussian ends from means and covariances alone: `u = m' + C' V^-1 (x - m)`.

    C' is Cov(a' x1 + b' x0, x_t) + c c' I. NumPy or JAX, t scalar.
    """

    process: object
    coupling: object = 0.0

    def at(self, x, point):
        p, s = point, self.process.slopes(point["t"])
        (m0, c00), (m1, c11), c01 = DATA, SOURCE, np.zeros((3, 3)) + self.coupling
        a, b, cc, eye = p["a"], p["b"], p["c"] ** 2, np.eye(3)
        total = a * a * c11 + b * b * c00 + a * b * (c01 + c01.T) + cc * eye
        moved = a * s["a"] * c11 + b * s["b"] * c00 + s["cc"] * eye
        moved = moved + s["a"] * b * c01.T + s["b"] * a * c01
        inverse = (np if isinstance(x, np.ndarray) else jnp).linalg.inv(total)
        gain = (moved + p.get("epsilon", 0.0) * eye) @ inverse
        return s["a"] * m1 + s["b"] * m0 + (x - a * m1 - b * m0) @ gain.T

    def __call__(self, x, t):
        raise AssertionError("a field with `at` is called through it")


def law(sampler, drift=None, start=SOURCE):
    drift = drift or Drift(LINEAR)
    return affine_law(sampler, drift.at, start[0], np.linalg.cholesky(start[1]))


def wasserstein(found, truth=DATA):
    (m, c), (mean, covariance) = found, truth
    root = scipy.linalg.sqrtm(covariance)
    cross = np.real(scipy.linalg.sqrtm(root @ c @ root))
    return np.sqrt(np.sum((m - mean) ** 2) + max(np.trace(covariance + c - 2 * cross), 0.0))


def test_the_drift_of_these_tests_is_that_of_the_oracle(x64):
    x = jnp.asarray(STORED["x"])
    for process in (LINEAR, Interpolant("trig", "sigmoid"), VPBridge()):
        oracle = oracles.GaussianInterpolant(process, *DATA, *SOURCE, COUPLING)
        for point in (process.point(0.3), {**process.point(0.6), "epsilon": 0.4}):
            found = Drift(process, COUPLING).at(x, point)
            np.testing.assert_allclose(found, oracle.at(x, point), rtol=0, atol=1e-12)


def test_euler_maruyama_of_the_authors(x64):
    sampler = interpolant_euler(LINEAR, 20, epsilon=float(STORED["eps"]), grid="uniform")
    np.testing.assert_allclose(sampler.times, 1.0 - STORED["sde_ts"][:-1], rtol=0, atol=1e-15)
    noise = np.concatenate([np.zeros((1, 4, 3)), STORED["sde_noise"]])
    oracle = oracles.GaussianInterpolant(LINEAR, *DATA, *SOURCE)
    found = sample(with_noise(sampler, noise), oracle, None, jnp.asarray(STORED["sde_start"]))
    np.testing.assert_allclose(found, STORED["sde_em"], rtol=0, atol=1e-14)
    mean, covariance = law(sampler)
    np.testing.assert_allclose(mean, STORED["sde_em_law_mean"], rtol=0, atol=1e-14)
    np.testing.assert_allclose(covariance, STORED["sde_em_law_cov"], rtol=0, atol=1e-14)


def test_in_float32(x64):
    sampler = interpolant_euler(LINEAR, 20, epsilon=float(STORED["eps"]), grid="uniform")
    noise = np.concatenate([np.zeros((1, 4, 3)), STORED["sde_noise"]])
    oracle = oracles.GaussianInterpolant(LINEAR, *DATA, *SOURCE)
    found = sample(
        with_noise(sampler, noise.astype(np.float32)),
        oracle,
        None,
        STORED["sde_start"].astype(np.float32),
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, STORED["sde_em"], rtol=0, atol=5e-6)


def test_heun_is_better_than_the_released_one():
    """Theirs evaluates both stages at the end of the step, after the noise: no better than Euler."""
    theirs = wasserstein((STORED["sde_heun_law_mean"], STORED["sde_heun_law_cov"]))

    def reached(solver, steps, grid=None):
        return wasserstein(law(solver(LINEAR, steps, epsilon=0.5, grid=grid)))

    euler, ours = (reached(solver, 20, "uniform") for solver in SOLVERS)
    assert theirs == pytest.approx(0.0762, abs=1e-4) and euler == pytest.approx(0.0642, abs=1e-4)
    assert ours == pytest.approx(0.0451, abs=1e-4)
    assert reached(interpolant_heun, 40, "uniform") < 0.35 * ours
    # and where the steps are small at both ends
    assert reached(interpolant_heun, 20) < 0.15 * ours < 0.1 * theirs
    assert reached(interpolant_heun, 10) < 0.25 * euler  # which makes as many calls


FAMILIES = {
    "linear brownian": (LINEAR, 0.0),
    "coupled": (LINEAR, COUPLING),
    "trig quadratic": (Interpolant("trig", "quadratic", t_min=0.0, t_max=1.0), 0.0),
    "no noise": (Interpolant(gamma="none", t_min=0.0, t_max=1.0), COUPLING),
    "brownian bridge": (BrownianBridge(0.7, t_min=0.0), COUPLING),
    "vp bridge": (VPBridge(t_min=0.0), 0.0),
}
EPSILONS = (0.0, 0.25, 1.0)


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_diffusion_arrives_at_the_law_of_the_data(family, epsilon):
    """The exact output law tends to N(m0, C0) with the order of the solver; the ODE pushes it forward."""
    process, coupling = FAMILIES[family]
    drift = Drift(process, coupling)
    for solver, order in zip(SOLVERS, (1, 2)):
        steps = (80, 160)
        errors = [wasserstein(law(solver(process, n, epsilon=epsilon), drift)) for n in steps]
        assert errors[-1] < (0.02 if order == 1 else 2e-3)
        assert np.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_ode_end_and_a_varying_diffusion_keep_the_law(solver):
    order = 1 + SOLVERS.index(solver)
    for options in (
        {"epsilon": 0.5, "ode_end": True},
        {"epsilon": lambda t: t * (1.0 - t)},
        {"epsilon": 0.8, "shape": "gamma"},
        {"epsilon": 0.8, "shape": "gamma_squared"},
        {"epsilon": 0.5, "shape": "sde"},
    ):
        errors = [wasserstein(law(solver(LINEAR, n, **options))) for n in (60, 120)]
        assert errors[-1] < (0.03 if order == 1 else 3e-3), options
        slope = np.log2(errors[0] / errors[1])
        assert slope > order - 0.4, options


@pytest.mark.parametrize("solver", SOLVERS)
def test_backwards_from_data_to_the_source(solver):
    for epsilon in EPSILONS:
        errors = [
            wasserstein(law(solver(LINEAR, n, epsilon=epsilon, backward=True), start=DATA), SOURCE)
            for n in (60, 120)
        ]
        assert errors[-1] < 0.03 and errors[1] < 0.65 * errors[0]


def test_the_ode_forth_and_back_is_the_identity():
    x = STORED["sde_start"]
    there = plain_run(interpolant_heun(LINEAR, 100, backward=True), Drift(LINEAR).at, x)[-1]
    back = plain_run(interpolant_heun(LINEAR, 100), Drift(LINEAR).at, there)[-1]
    np.testing.assert_allclose(back, x, rtol=0, atol=1e-3)


def test_options_are_what_they_say():
    process = Interpolant(noise=0.6)
    constant = interpolant_euler(process, 8, epsilon=0.18)
    for same in (
        interpolant_euler(process, 8, epsilon=lambda t: 0.18),
        interpolant_euler(process, 8, epsilon=1.0, shape="sde"),
    ):
        close = lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-14)
        jax.tree.map(close, same.xs, constant.xs)
    shaped = interpolant_euler(process, 8, epsilon=0.5, shape="gamma").xs["point"]
    np.testing.assert_allclose(shaped["epsilon"], 0.5 * shaped["c"], rtol=1e-14)
    shaped = interpolant_euler(process, 8, epsilon=0.5, shape="gamma_squared").xs["point"]
    np.testing.assert_allclose(shaped["epsilon"], 0.5 * shaped["c"] ** 2, rtol=1e-14)
    ode = interpolant_euler(process, 8)
    assert not ode.stochastic and ode.order == 1 and "epsilon" not in ode.xs["point"]
    assert interpolant_heun(process, 8).order == 2 and constant.order is None
    assert interpolant_heun(process, 8).nfe == 15
    assert interpolant_heun(process, 8, t_end=0.1).nfe == 16
    assert interpolant_heun(Interpolant(gamma="none"), 8).nfe == 16
    assert not interpolant_euler(process, 1, epsilon=0.5, ode_end=True).stochastic


def test_the_walk_is_from_1_to_0_and_calls_stay_where_training_was():
    for solver in SOLVERS:
        sampler = solver(Interpolant(t_min=0.01, t_max=0.98), 4, grid="uniform")
        times = sampler.xs["point"]["t"]
        assert times.max() == 0.98
        assert times.min() == pytest.approx(0.2525)
        moved = plain_run(sampler, lambda x, point: np.ones_like(x), np.zeros((1, 1)))
        assert moved[-1, 0, 0] == pytest.approx(-1.0)
    whole, same = (
        interpolant_euler(Interpolant(), 4, **e) for e in ({}, {"t_start": 1.0, "t_end": 0.0})
    )
    jax.tree.map(np.testing.assert_array_equal, whole.xs, same.xs)
    angles = np.arcsin(np.sqrt(interpolant_euler(LINEAR, 4).times))
    np.testing.assert_allclose(angles, 0.5 * np.pi * np.array([1.0, 0.75, 0.5, 0.25]), rtol=1e-12)
    ends = interpolant_euler(Interpolant(), 4, t_start=0.9, t_end=0.1, grid="uniform")
    np.testing.assert_allclose(ends.times, (0.9, 0.7, 0.5, 0.3))


CALLS = collections.Counter()


def test_epsilon_is_swept_without_compiling_again():
    class Counting(Drift):
        def at(self, x, point):
            CALLS["at"] += 1
            return super().at(x, point)

    field = pytree_dataclass(Counting)(LINEAR)
    x, key = jnp.asarray(STORED["sde_start"], jnp.float32), jax.random.key(0)
    swept = (
        {"epsilon": 0.25},
        {"epsilon": 1.0},
        {"epsilon": lambda t: 0.1 + t},
        {"epsilon": 0.3, "shape": "gamma", "t_start": 0.9},
    )
    run = lambda options: sample(interpolant_euler(Interpolant(), 8, **options), field, key, x)
    ends, traced = [run(swept[0])], CALLS["at"]
    ends += [run(options) for options in swept[1:]]
    assert CALLS["at"] == traced > 0
    assert all(np.isfinite(e).all() for e in ends) and (ends[0] != ends[1]).all()


def test_mistakes_are_named():
    for options, message in (
        ({"epsilon": -0.1}, "epsilon must be a finite number not below 0"),
        ({"epsilon": float("nan")}, "epsilon must be a finite number"),
        ({"epsilon": lambda t: t - 0.5}, "not below 0 at every time"),
        ({"epsilon": 0.1, "shape": "gama"}, r"shape must be one of .*'gamma'"),
        ({"epsilon": lambda t: t, "shape": "gamma"}, "shape must be left out"),
        ({"grid": [0.1, 0.9]}, "times must decrease strictly"),
    ):
        for solver in SOLVERS:
            with pytest.raises(ValueError, match=message):
                solver(Interpolant(), None if "grid" in options else 4, **options)
    with pytest.raises(ValueError, match="needs a bridge process, got VP"):
        interpolant_euler(VP(), 4)
