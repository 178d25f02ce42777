"""Samplers keep the marginals: for Gaussian data the law of the output is known exactly, and converges."""

import numpy as np
import pytest
from solver_checks import (
    AffineBridge,
    affine_gaussian,
    affine_law,
    bridges,
    plain_run,
    required,
    table_names,
)

from diffusion_jax import processes, registry
from diffusion_jax.samplers import (
    dbim,
    ddbm_heun,
    ddim,
    ddpm,
    edm_heun,
    sde_dpm_solver_pp,
)

MEAN, COVARIANCE = np.array([0.6, -0.4]), np.array([[0.30, 0.12], [0.12, 0.10]])
DENOISE = affine_gaussian(MEAN, COVARIANCE).at
RANGE = {"grid": "log_snr", "t_start": 0.999, "t_end": 5e-4}


def law_error(process, sampler):
    """Largest error of mean and covariance at the last time, started from the exact law at the first."""
    t, s = sampler.times[0], sampler.xs["next"]["t"][-1]
    a, b = process.alpha(t), process.sigma(t)
    root = np.linalg.cholesky(a**2 * COVARIANCE + b**2 * np.eye(2))
    mean, covariance = affine_law(sampler, DENOISE, a * MEAN, root)
    a, b = process.alpha(s), process.sigma(s)
    truth = a**2 * COVARIANCE + b**2 * np.eye(2)
    return max(np.abs(mean - a * MEAN).max(), np.abs(covariance - truth).max())


@pytest.mark.parametrize("name", table_names("gaussian"))
def test_every_sampler_converges_to_the_data(name):
    process = processes.VP()
    build = registry.get("sampler", name)
    options = {**RANGE, **required(name, process)}
    coarse, fine = (law_error(process, build(process, n, **options)) for n in (60, 120))
    assert fine < 0.04
    assert fine < 0.62 * coarse


VARIANTS = {
    "ddim eta 0.5": lambda p, n: ddim(p, n, eta=0.5, **RANGE),
    "ddim eta 1": lambda p, n: ddim(p, n, eta=1.0, **RANGE),
    "ddpm large": lambda p, n: ddpm(p, n, variance="large", **RANGE),
    "sde 2m eta 0.5": lambda p, n: sde_dpm_solver_pp(p, n, eta=0.5, **RANGE),
    "sde 2m heun": lambda p, n: sde_dpm_solver_pp(p, n, kind="heun", **RANGE),
    "sde 3m eta 2": lambda p, n: sde_dpm_solver_pp(p, n, order=3, eta=2.0, **RANGE),
    "churn": lambda p, n: edm_heun(p, n, s_churn=20.0, s_min=0.01, s_max=20.0, **RANGE),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("process", ("vp", "rectified_flow"))
def test_noise_added_is_noise_removed(variant, process):
    process = registry.get("process", process)()
    coarse, fine = (law_error(process, VARIANTS[variant](process, n)) for n in (60, 120))
    assert fine < 0.04
    assert fine < 0.62 * coarse


def test_inflated_churn_noise_inflates_the_result():
    """The other direction: s_noise above 1 adds more than is removed, and the test above would see it."""
    vp = processes.VP()
    options = {"s_churn": 20.0, "s_min": 0.01, "s_max": 20.0, **RANGE}
    assert law_error(vp, edm_heun(vp, 120, s_noise=1.1, **options)) > 0.05


@pytest.mark.parametrize("process", ("vp", "rectified_flow", "edm"))
def test_churn_before_the_first_call(process):
    """Alg. 2, l. 4-6 at step 0: the noise level u rises to sqrt(2) u before the network sees anything."""
    process = registry.get("process", process)()
    t = float(process.t_of_noise_level(0.7))
    sampler = edm_heun(process, 3, s_churn=3.0, s_noise=1.5, t_start=t)
    x, z = np.array([[0.3, -0.8]]), np.array([[1.2, 0.5]])
    noise = np.concatenate([[z], np.zeros((sampler.nfe, 1, 2))])
    raised = process.point(sampler.times[0])
    np.testing.assert_allclose(raised["sigma"] / raised["alpha"], 0.7 * np.sqrt(2.0), rtol=1e-9)
    first = plain_run(sampler, lambda x, point: 0 * x, x, noise)[0]
    expected = x / process.alpha(t) + 1.5 * 0.7 * z
    np.testing.assert_allclose(first / raised["alpha"], expected, rtol=1e-9)


def test_the_prior_is_the_marginal_at_the_start():
    """`process.prior` of EDM and rectified flow ignores the data; what that costs at the end is small."""
    for process in (processes.EDM(), processes.RectifiedFlow()):
        mean, covariance = affine_law(
            ddim(process, 400, grid="karras"), DENOISE, np.zeros(2), process.prior_std * np.eye(2)
        )
        np.testing.assert_allclose(mean, MEAN, atol=0.01)
        np.testing.assert_allclose(covariance, COVARIANCE, atol=0.01)


def test_ddpm_is_ddim_at_eta_one():
    for process in (processes.VP(), processes.Cosine(), processes.EDM()):
        one, other = ddim(process, 12, eta=1.0), ddpm(process, 12)
        assert one.step == other.step
        np.testing.assert_allclose(one.xs["scalars"], other.xs["scalars"], rtol=1e-14)


BRIDGES = bridges()
SOURCE, TARGET = np.array([0.9, -0.5]), np.array([0.2, 0.3])
BRIDGE_DENOISE = AffineBridge(SOURCE, TARGET, *np.linalg.eigh(COVARIANCE)).at


def bridge_error(sampler):
    """Distance of the output law to q(x_t | x1) at the last time."""
    mean, covariance = affine_law(sampler, BRIDGE_DENOISE, SOURCE, np.zeros((2, 2)))
    end = {name: v[-1] for name, v in sampler.xs["next"].items()}
    truth = end["b"] ** 2 * COVARIANCE + end["c"] ** 2 * np.eye(2)
    error = np.abs(mean - end["a"] * SOURCE - end["b"] * TARGET).max()
    return max(error, np.abs(covariance - truth).max())


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("name", ("vp_bridge", "ve_bridge", "brownian_bridge"))
def test_dbim_converges_to_the_conditional_law(name, eta):
    process = BRIDGES[name]
    ends = {"t_start": float(process.t_of_lam(-4.0)), "t_end": float(process.t_of_lam(5.0))}
    coarse, fine = (
        bridge_error(dbim(process, n, eta=eta, grid="log_snr", **ends)) for n in (60, 120)
    )
    assert fine < 0.04
    assert fine < 0.62 * coarse


@pytest.mark.parametrize("name", BRIDGES)
def test_dbim_on_its_default_grid(name):
    for eta in (0.0, 1.0):
        assert bridge_error(dbim(BRIDGES[name], 400, eta=eta)) < 0.02


@pytest.mark.parametrize("name", ("vp_bridge", "ve_bridge", "brownian_bridge", "i2sb"))
def test_ddbm_heun_converges_to_the_conditional_law(name):
    process = BRIDGES[name]
    coarse, fine = (bridge_error(ddbm_heun(process, n)) for n in (30, 100))
    assert fine < 0.5 * coarse
    assert fine < 0.03


@pytest.mark.parametrize("name", ("vp_bridge", "ve_bridge", "brownian_bridge"))
def test_the_source_drops_out_of_dbim_at_eta_one(name):
    """The posterior sampler is Markov: after the boot no row reads x1."""
    sampler = dbim(BRIDGES[name], 12, eta=1.0)
    columns = [column for column, kind in sampler.step.structure.rows[0][1] if kind == "s"]
    weights = dict(zip(columns, sampler.xs["scalars"].T))["src"]
    assert abs(weights[0]) > 0.5
    np.testing.assert_allclose(weights[1:], 0.0, atol=1e-10)
