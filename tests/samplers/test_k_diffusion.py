"""k-diffusion's two-stage and multistep solvers: the released program, and where they coincide."""

import itertools
import warnings

import numpy as np
import pytest
from golden_files import golden
from solver_checks import mixture_mean, place_noise, plain_run

from diffusion_jax import processes
from diffusion_jax.samplers import (
    ddim,
    dpm_2,
    dpm_2_ancestral,
    dpm_solver,
    dpm_solver_pp,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    lms,
)

MODEL, STORED = golden("solvers_model"), golden("solvers_kdiff_more")
SOLVERS = {s.__name__: s for s in (dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde, lms)}


def mixture(x, point):
    return mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])


@pytest.mark.parametrize("name", SOLVERS)
def test_the_released_program(name):
    for n in (5, 10, 20, 50):
        levels = STORED[f"sigmas_karras__n{n}"]
        process = processes.EDM(sigma_min=levels[-2], sigma_max=levels[0])
        sampler = SOLVERS[name](process, n, grid=levels / levels[0])
        assert sampler.nfe == STORED[f"{name}__n{n}_nfe"]
        draws = int(STORED.get(f"{name}__n{n}_draws", 0))
        assert sampler.stochastic == (draws > 0)
        rows = range(draws) if name == "dpmpp_sde" else range(1, 2 * draws, 2)
        noise = place_noise(sampler, STORED["noise"][:draws], rows)
        end = plain_run(sampler, mixture, STORED["xT"], noise)[-1]
        expected = STORED[f"{name}__n{n}"]
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10, err_msg=str(n))


@pytest.mark.parametrize("name", ("vp", "sub_vp", "rectified_flow"))
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_schedule_walks_the_same_path_in_x_over_alpha(name, solver):
    """The exact prediction depends on x / alpha and sigma / alpha alone: EDM's path, scaled by alpha."""
    process = {"vp": processes.VP, "sub_vp": processes.SubVP}.get(name, processes.RectifiedFlow)()
    u = np.geomspace(20.0, 0.01, 8)
    times, x = np.asarray(process.t_of_noise_level(u)), MODEL["z16"] * u[0]
    edm = SOLVERS[solver](processes.EDM(), grid=u / 80.0)
    own = SOLVERS[solver](process, grid=times)
    noise = np.random.default_rng(0).standard_normal((edm.nfe + 1, 16, 2))
    alpha = np.asarray(process.alpha(times))
    expected = alpha[-1] * plain_run(edm, mixture, x, noise)[-1]
    end = plain_run(own, mixture, alpha[0] * x, noise)[-1]
    np.testing.assert_allclose(end, expected, rtol=0, atol=1e-8)


def test_equivalences():
    vp, x = processes.VP(), MODEL["z16"]

    def run(sampler):
        return plain_run(sampler, mixture, x)[-1]

    for n in (3, 8):
        plan = run(dpm_solver_pp(vp, 2 * n, variant="singlestep", grid="log_snr"))
        for solver in (dpmpp_2s_ancestral, dpmpp_sde):
            sampler = solver(vp, n, eta=0.0, grid="log_snr")
            assert not sampler.stochastic
            np.testing.assert_allclose(run(sampler), plan, rtol=0, atol=1e-9)
        plan = run(dpm_solver(vp, 2 * n, prediction="eps", variant="singlestep", grid="log_snr"))
        np.testing.assert_allclose(run(dpm_2(vp, n, grid="log_snr")), plan, rtol=0, atol=1e-9)
        one, two = dpm_2_ancestral(vp, n, eta=0.0), dpm_2(vp, n)
        np.testing.assert_allclose(run(one), run(two), rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            run(lms(vp, n, order=1)), run(ddim(vp, n, grid="karras")), rtol=0, atol=1e-9
        )


def test_multistep_integrates_its_polynomials_exactly():
    """eps = u^3 along the path: orders of 4 and more are exact once three points lie behind."""
    u = np.array([3.0, 2.5, 1.7, 1.2, 0.6, 0.3])
    for order, exact in ((4, True), (5, True), (3, False)):
        sampler = lms(processes.EDM(), grid=u / 80.0, order=order)

        def denoise(x, point):
            return x - point["sigma"] ** 4

        path = plain_run(sampler, denoise, np.zeros((1, 1)))[:, 0, 0]
        steps = np.diff(path)[3:]
        expected = np.diff(u**4 / 4)[3:]
        assert np.allclose(steps, expected, rtol=1e-10) == exact


@pytest.mark.parametrize("eta", (0.5, 1.0))
def test_variance_of_the_noise(eta):
    """A denoiser that returns 0 leaves y' = u_down/u y + u_up z: the law of y stays N(0, u^2)."""
    u = np.geomspace(10.0, 0.1, 5)
    for solver in (dpm_2_ancestral, dpmpp_2s_ancestral, dpmpp_sde):
        sampler = solver(processes.EDM(), grid=u / 80.0, eta=eta)
        if solver is dpm_2_ancestral:  # not an exponential rule: its midpoint is not exact here
            continue
        rows = [np.zeros((1, 1))] * (sampler.nfe + 1)
        variance = u[0] ** 2 * plain_run(sampler, lambda x, p: 0 * x, np.ones((1, 1)))[-1] ** 2
        for row in range(sampler.nfe + 1):
            noise = np.stack([r + (k == row) for k, r in enumerate(rows)])
            variance += plain_run(sampler, lambda x, p: 0 * x, np.zeros((1, 1)), noise)[-1] ** 2
        np.testing.assert_allclose(variance, u[-1] ** 2, rtol=1e-10)


def test_finite_ends_and_errors():
    """Starts at alpha = 0 and ends at sigma = 0, with warnings as errors."""
    flow = processes.RectifiedFlow()
    for solver, n in itertools.product(SOLVERS.values(), (1, 2, 5)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sampler = solver(flow, n, grid="uniform")
        assert np.isfinite(plain_run(sampler, mixture, MODEL["z16"])).all()
    with pytest.raises(ValueError, match="order"):
        lms(flow, 5, order=0)
    with pytest.raises(ValueError, match="eta"):
        dpmpp_2s_ancestral(flow, 5, eta=-1.0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        dpmpp_sde(flow, 5, r=1.0)
