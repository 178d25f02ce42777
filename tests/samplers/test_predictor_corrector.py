"""Predictor-corrector sampling: the released program, exact laws on Gaussian data, the corrector alone."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import Mixture, affine_gaussian, affine_law, plain_run

from diffusion_jax import processes, registry
from diffusion_jax.samplers import (
    build_sampler,
    ddim,
    euler,
    euler_maruyama,
    predictor_corrector,
    reverse_diffusion,
    sample,
    with_noise,
)
from diffusion_jax.samplers.predictor_corrector import PREDICTORS, _n_step

MODEL = golden("solvers_model")
MIXTURE = Mixture(MODEL["w"], MODEL["means"], MODEL["covs"])
STORED = golden("solvers_score_sde")
SDES = {"vp": processes.VP(), "subvp": processes.SubVP(), "ve": processes.VE()}
CASES = sorted(
    name for name in STORED if name.startswith("pc_") and name.endswith(("_denoise", "_noisy"))
)
MEAN, COVARIANCE = np.array([0.6, -0.4]), np.array([[0.30, 0.12], [0.12, 0.10]])


def squash(x, t):
    return 0.5 * jnp.tanh(x)


def parsed(case):
    """`pc_<sde>_<predictor>_<corrector>[_pf]_<denoise|noisy>` -> (process, arguments)."""
    sde, rest = case.removeprefix("pc_").split("_", 1)
    rest, last = rest.rsplit("_", 1)
    rest, flow, _ = rest.partition("_pf")
    predictor, corrector = rest.rsplit("_", 1)
    return SDES[sde], {
        "predictor": predictor.removesuffix("_sampling"),
        "corrector": corrector,
        "probability_flow": bool(flow),
        "denoise": last == "denoise",
    }


@pytest.mark.parametrize("case", CASES)
def test_the_released_program(case, x64):
    process, options = parsed(case)
    steps = int(STORED["N"])
    sampler = predictor_corrector(
        process, steps, snr=float(STORED["snr"]), norms="batch", **options
    )
    calls = (options["predictor"] != "none") + (options["corrector"] != "none")
    assert sampler.nfe == steps * calls
    assert int(STORED[f"{case}_draws"]) == 1 + sampler.nfe  # the prior, then every row
    assert sampler.stochastic == (not options["probability_flow"])
    noise = STORED["noise"][: sampler.nfe + 1]  # entry 0 is the prior here, unused in with_noise
    x = process.prior_std * STORED["noise"][0]
    end = sample(with_noise(sampler, noise), MIXTURE, None, x)
    np.testing.assert_allclose(end, STORED[case], rtol=0, atol=1e-11)


def test_there_are_the_cases_we_think_there_are():
    assert len(CASES) == 36
    assert {parsed(case)[1]["corrector"] for case in CASES} == {"langevin", "ald", "none"}


def n_step_law(sde, predictor, n, snr):
    """Mean and covariance of the released chain with the exact score of Gaussian data, ALD between."""
    identity = np.eye(2)
    start = 1.0 if sde != "ve" else 50.0
    mean, cov = np.zeros(2), start**2 * identity
    betas = np.linspace(0.1 / n, 20.0 / n, n)
    sigmas = 0.01 * 5000.0 ** np.linspace(0.0, 1.0, n)
    for t in np.linspace(1.0, 1e-5 if sde == "ve" else 1e-3, n):
        k, beta = int(t * (n - 1)), 0.1 + 19.9 * t
        alpha = 1.0 if sde == "ve" else np.exp(-0.05 * t - 19.9 * t * t / 4)
        std = {"vp": np.sqrt(1 - alpha**2), "subvp": 1 - alpha**2, "ve": 0.01 * 5000.0**t}[sde]
        precision = np.linalg.inv(alpha**2 * COVARIANCE + std**2 * identity)
        kept = 1.0 if sde == "ve" else 1.0 - betas[k]
        h = 2.0 * kept * (snr * std) ** 2
        moves = [(1.0, h, 2.0 * h)] if snr else []
        if predictor == "euler_maruyama" or (sde == "subvp" and predictor != "ancestral"):
            g2 = {
                "vp": beta,
                "subvp": beta * (1 - alpha**4),
                "ve": 2 * np.log(5000.0) * std**2,
            }[sde]
            f = 0.0 if sde == "ve" else -0.5 * beta
            moves.append((1.0 - f / n, g2 / n, g2 / n))
        elif sde == "ve":
            below = sigmas[k - 1] if k else 0.0
            v = sigmas[k] ** 2 - below**2
            moves.append((1.0, v, v if predictor != "ancestral" else below**2 * v / sigmas[k] ** 2))
        elif predictor == "reverse_diffusion":
            moves.append((2.0 - np.sqrt(1 - betas[k]), betas[k], betas[k]))
        else:
            root = np.sqrt(1 - betas[k])
            moves.append((1.0 / root, betas[k] / root, betas[k]))
        for scale, pull, added in moves:
            linear = scale * identity - pull * precision
            mean = linear @ mean + pull * precision @ (alpha * MEAN)
            cov = linear @ cov @ linear.T + added * identity
    return mean, cov


@pytest.mark.parametrize(
    ("sde", "predictor"),
    [pair for pair in itertools.product(SDES, PREDICTORS[:3]) if pair != ("subvp", "ancestral")],
)
def test_law_on_gaussian_data(sde, predictor):
    """Exact: the chain with an affine score maps Gaussians to Gaussians."""
    model, start = affine_gaussian(MEAN, COVARIANCE), np.eye(2) * SDES[sde].prior_std
    for corrector, snr in (("none", 0.0), ("ald", 0.2)):
        sampler = predictor_corrector(
            SDES[sde], 30, predictor=predictor, corrector=corrector, snr=snr, denoise=False
        )
        mean, cov = affine_law(sampler, model.at, np.zeros(2), start)
        expected_mean, expected_cov = n_step_law(sde, predictor, 30, snr)
        np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-9)
        np.testing.assert_allclose(cov, expected_cov, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("process", (processes.VP(), processes.SubVP(), processes.Cosine()))
@pytest.mark.parametrize("predictor", ("euler_maruyama", "reverse_diffusion", "ancestral"))
def test_the_law_approaches_the_data_on_any_schedule(process, predictor):
    """With exact transitions; the error falls about like 1 / n."""
    model, errors = affine_gaussian(MEAN, COVARIANCE), []
    for n in (50, 100):
        sampler = predictor_corrector(
            process, n, predictor=predictor, corrector="none", discretization="chain"
        )
        mean, cov = affine_law(sampler, model.at, np.zeros(2), np.eye(2))
        errors.append(max(np.abs(mean - MEAN).max(), np.abs(cov - COVARIANCE).max()))
    assert errors[1] < 0.7 * errors[0] and errors[1] < 0.05


def test_equivalences_on_a_chain():
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((8, 16, 2))
    for process in (*SDES.values(), processes.EDM(), processes.RectifiedFlow()):
        x = rng.standard_normal((16, 2)) * process.prior_std
        chain = {"corrector": "none", "discretization": "chain"}

        def run(sampler, x=x):
            return plain_run(sampler, MIXTURE.at, x, noise)[-1]

        one = predictor_corrector(process, 7, predictor="ancestral", denoise=False, **chain)
        np.testing.assert_allclose(run(one), run(ddim(process, 7, eta=1.0)), rtol=0, atol=1e-9)
        if process.alpha(process.sampling_range[0]) > 0:
            flow = euler_maruyama(process, 7, probability_flow=True, discretization="chain")
            np.testing.assert_allclose(run(flow), run(euler(process, 7)), rtol=1e-9, atol=1e-9)


def test_each_level_of_the_ve_chain_is_visited_once():
    """The variances telescope: truncation to an index does not fall by one when rounding does."""
    ve = processes.VE()
    for n in range(2, 400):
        total = sum(step.variance for step in _n_step(ve, n, 0.0))
        assert total == pytest.approx(ve.sigma_max**2, rel=1e-12), n


def test_the_langevin_rows_draw_by_the_documented_keys(x64):
    """Row i of example j draws from fold_in(fold_in(key, j), i + 1); a part is run by hand."""
    vp, key = processes.VP(), jax.random.key(5)
    sampler = predictor_corrector(vp, 30, corrector_steps=2)
    assert sampler.nfe == 90 and len(sampler.times) == 90
    assert not sampler.xs["draw"][-1] and sampler.xs["draw"][:-1].all()
    keys = [jax.random.fold_in(key, j) for j in range(3)]
    noise = jax.vmap(
        lambda row: jnp.stack(
            [jax.random.normal(jax.random.fold_in(k, row), (2,), jnp.float64) for k in keys]
        )
    )(jnp.arange(91))
    x = MODEL["z16"][:3]
    end = sample(sampler, MIXTURE, key, x)
    given = sample(with_noise(sampler, noise), MIXTURE, None, x)
    np.testing.assert_allclose(end, given, rtol=0, atol=1e-10)


def test_norms_of_each_example_are_those_of_a_batch_of_one(x64):
    """And with the batch's norms an example does depend on its neighbours."""
    noise, x = STORED["noise"][:81], MODEL["z16"]

    def run(norms, rows):
        sampler = predictor_corrector(processes.VP(), 40, norms=norms)
        return np.asarray(sample(with_noise(sampler, noise[:, rows]), MIXTURE, None, x[rows]))

    each = run("example", slice(0, 4))
    for j in range(4):
        np.testing.assert_allclose(each[j], run("batch", slice(j, j + 1))[0], rtol=0, atol=1e-10)
    assert np.abs(run("batch", slice(0, 4)) - each).max() > 1e-3


@pytest.mark.parametrize("sde", SDES)
def test_the_langevin_corrector_leaves_the_marginal(sde):
    """60 corrections at one time, data N(0, 0.25) in d = 1024 dimensions: a sample of the marginal stays
    one, and a start of twice its variance comes back to it.

    Up to what the step size costs, 1 + snr^2, and what its dependence on the state does, 1 + 4/d.
    """
    process = SDES[sde]
    t = 0.3
    point = process.point(t)
    variance = 0.25 * point["alpha"] ** 2 + point["sigma"] ** 2

    def denoise(x, t):
        return 0.25 * point["alpha"] / variance * x

    sampler = predictor_corrector(
        process, predictor="none", corrector_steps=60, grid=[t, t - 1e-3], snr=0.16
    )
    assert sampler.nfe == 60
    z = jax.random.normal(jax.random.key(0), (64, 1024)) * np.sqrt(variance)
    for factor in (1.0, 2.0):
        end = sample(sampler, denoise, jax.random.key(1), np.sqrt(factor) * z) / np.sqrt(variance)
        expected = (1.0 + 0.16**2) * (1.0 + 4.0 / 1024)
        assert float((end**2).mean()) == pytest.approx(expected, abs=0.02)
        assert abs(float(end.mean())) < 0.02


def test_sub_vp_has_the_corrector_of_vp():
    vp, sub = (predictor_corrector(p, 40).xs["kick"] for p in (processes.VP(), processes.SubVP()))
    np.testing.assert_array_equal(vp, sub)
    x = jax.random.normal(jax.random.key(1), (256, 2))
    sampler = predictor_corrector(processes.SubVP(), 100, norms="batch")
    end = np.asarray(sample(sampler, MIXTURE, jax.random.key(0), x))
    far = np.linalg.norm(end[:, None] - MODEL["means"], axis=-1).min(axis=1)
    assert np.median(far) < 0.4 and np.quantile(far, 0.9) < 0.75  # the data's own: 0.31 and 0.61


@pytest.mark.parametrize("n", (1, 2, 3, 25))
def test_finite_on_every_process_and_grid(n):
    """With the Langevin corrector, from and to an infinite log-SNR too."""
    names = registry.names("process", family="gaussian")
    for name, grid in itertools.product(names, registry.names("time_grid", any_process=None)):
        process = registry.get("process", name)()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = predictor_corrector(process, n, grid=grid)
        x = process.prior(jax.random.key(0), (4, 2))
        end = sample(sampler, squash, jax.random.key(1), x)
        assert np.isfinite(end).all(), (name, grid)


def test_probability_flow_draws_on_corrector_rows_alone():
    sampler = predictor_corrector(processes.VP(), 30, probability_flow=True)
    assert sampler.stochastic
    np.testing.assert_array_equal(sampler.xs["draw"], [True, False] * 30)
    assert not euler_maruyama(processes.VP(), 30, probability_flow=True).stochastic


def test_snr_zero_is_the_predictor_alone(x64):
    noise = STORED["noise"][:41]
    doubled = np.zeros((81, 16, 2))
    doubled[2::2] = noise[1:]
    for process in SDES.values():
        x = process.prior_std * MODEL["z16"]
        both = predictor_corrector(process, 40, snr=0.0)
        end = sample(with_noise(both, doubled), MIXTURE, None, x)
        alone = sample(with_noise(reverse_diffusion(process, 40), noise), MIXTURE, None, x)
        np.testing.assert_allclose(end, alone, rtol=0, atol=1e-10)


def test_gradients_are_finite_where_the_score_vanishes():
    denoise = jax.tree_util.Partial(lambda scale, x, t: scale * x, jnp.float32(0.0))
    sampler = predictor_corrector(processes.VE(), 4, snr=0.1)

    def total(d):
        return sample(sampler, d, jax.random.key(0), jnp.zeros((2, 3))).sum()

    assert np.isfinite(jax.grad(total)(denoise).args[0])


def test_errors_and_budgets():
    vp, ve, sub = processes.VP(), processes.VE(), processes.SubVP()
    for refused in (
        lambda: reverse_diffusion(vp, 20),
        lambda: predictor_corrector(vp, 10, predictor="ancestral", corrector="none"),
        lambda: predictor_corrector(vp, 10, predictor="euler_maruyama"),
        lambda: predictor_corrector(sub, 10, corrector="ald"),
    ):
        with pytest.raises(ValueError, match="must exceed beta_max = 20"):
            refused()
    reverse_diffusion(vp, 21)
    euler_maruyama(vp, 5)
    reverse_diffusion(sub, 5)
    predictor_corrector(vp, 5, discretization="chain")
    predictor_corrector(ve, 5)
    with pytest.raises(ValueError, match="did you mean 'ancestral'"):
        predictor_corrector(ve, 5, predictor="ancestral_sampling")
    with pytest.raises(
        ValueError, match="corrector must be one of langevin, ald, none; got 'mcmc'"
    ):
        predictor_corrector(ve, 5, corrector="mcmc")
    with pytest.raises(ValueError, match="nothing would be done"):
        predictor_corrector(ve, 5, predictor="none", corrector="none")
    with pytest.raises(ValueError, match="no probability-flow variant"):
        predictor_corrector(ve, 5, predictor="ancestral", probability_flow=True)
    with pytest.raises(ValueError, match="not defined on the N-step chain of SubVP"):
        predictor_corrector(sub, 50, predictor="ancestral", corrector="none")
    with pytest.raises(ValueError, match="snr"):
        predictor_corrector(ve, 5, snr=-0.1)
    with pytest.raises(ValueError, match="corrector_steps"):
        predictor_corrector(ve, 5, corrector_steps=0)
    with pytest.raises(ValueError, match="norms must be one of example, batch; got"):
        predictor_corrector(ve, 5, norms="device")
    with pytest.raises(ValueError, match="times of its own"):
        predictor_corrector(ve, 5, discretization="score_sde", grid="karras")
    with pytest.raises(ValueError, match="Gaussian process"):
        predictor_corrector(processes.VPBridge(), 5)
    with pytest.raises(ValueError, match="shape"):
        sampler = with_noise(predictor_corrector(ve, 2), np.zeros((5, 1, 2), np.float32))
        sample(sampler, lambda x, t: x, None, jnp.ones((3, 2)))
    assert build_sampler(ve, "predictor_corrector", 9).nfe == 8
    assert build_sampler(ve, "predictor_corrector", 9, corrector_steps=2).nfe == 9
