"""Algebra every Gaussian solver obeys, and equalities between solvers that their papers state."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import least_steps, mixture_mean, plain_run, required, table_names

from diffusion_jax import processes, registry, samplers
from diffusion_jax.samplers import (
    dbim,
    ddim,
    dpm_solver,
    dpm_solver_pp,
    edm_heun,
    euler,
    sample,
    sde_dpm_solver_pp,
    singlestep_plan,
)

MODEL = golden("solvers_model")
NAMES = table_names("gaussian")
RULES_IN_T = ("euler", "heun", "midpoint")
# Discretisations of the reverse SDE itself: right only as the steps shrink.
RULES_OF_THE_SDE = ("euler_maruyama", "reverse_diffusion")
EXACT_FOR_CONSTANTS = [n for n in NAMES if n not in RULES_IN_T + RULES_OF_THE_SDE]
VP, EDM, FLOW = processes.VP(), processes.EDM(), processes.RectifiedFlow()


def mixture(x, point):
    return mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])


def same_table(one, other, atol=1e-13):
    assert one.step == other.step and one.init == other.init
    np.testing.assert_allclose(one.xs["scalars"], other.xs["scalars"], rtol=1e-12, atol=atol)


@pytest.mark.parametrize(
    "process", (VP, EDM, FLOW, processes.Cosine()), ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("name", EXACT_FOR_CONSTANTS)
def test_a_single_data_point_is_solved_exactly_in_any_number_of_steps(name, process):
    """For data c, x = alpha c + sigma e and D = c: deterministic solvers give alpha' c + sigma' e.

    Stochastic ones, their draws set to zero, keep c whole and only shrink e.
    """
    c, e = np.array([[0.7, -1.2]]), np.array([[0.4, 0.9]])
    for n in sorted({max(n, least_steps(name)) for n in (1, 2, 3, 7)}):
        sampler = registry.get("sampler", name)(process, n, **required(name, process))
        t, s = sampler.times[0], float(sampler.xs["next"]["t"][-1])
        for signal, noise in ((c, e), (c, 0 * e)):
            x = process.alpha(t) * signal + process.sigma(t) * noise
            end = plain_run(sampler, lambda x, point, c=signal: c + 0 * x, x)[-1]
            if sampler.stochastic and noise.any():
                assert np.abs(end - process.alpha(s) * c).max() <= process.sigma(s) * 0.9 + 1e-9
                continue
            exact = process.alpha(s) * signal + process.sigma(s) * noise
            np.testing.assert_allclose(end, exact, rtol=0, atol=1e-10 * process.prior_std)


@pytest.mark.parametrize("name", RULES_IN_T)
def test_a_straight_path_is_solved_exactly_by_the_rules_in_t(name):
    """Rectified flow moves along straight lines, EDM at constant speed: one step does it."""
    c, e = np.array([[0.7, -1.2]]), np.array([[0.4, 0.9]])
    for process in (FLOW, EDM):
        for n in (1, 3):
            sampler = registry.get("sampler", name)(process, n)
            x = process.alpha(1.0) * c + process.sigma(1.0) * e
            end = plain_run(sampler, lambda x, point: c, x)[-1]
            np.testing.assert_allclose(end, c, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", EXACT_FOR_CONSTANTS)
def test_coefficients_of_each_row_keep_the_signal(name):
    """Sum rule: where x is alpha c and every past output c, each row gives alpha' c."""
    sampler = registry.get("sampler", name)(VP, 6, **required(name, VP))
    path = plain_run(sampler, lambda x, point: np.ones_like(x), VP.alpha(1.0) * np.ones((1, 1)))
    np.testing.assert_allclose(path[1:, 0, 0], sampler.xs["next"]["alpha"], rtol=1e-9)


def test_first_order_solvers_are_ddim():
    for process in (VP, EDM, FLOW):
        for grid in ("log_snr", "karras", "uniform"):
            reference = ddim(process, 7, grid=grid)
            for other in (
                dpm_solver_pp(process, 7, order=1, grid=grid),
                dpm_solver(process, 7, order=1, prediction="eps", grid=grid),
                dpm_solver_pp(process, 7, order=1, variant="singlestep", grid=grid),
            ):
                a, b = (
                    plain_run(s, mixture, MODEL["z16"] * process.prior_std)
                    for s in (reference, other)
                )
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * process.prior_std)
    same_table(
        ddim(VP, 7, grid="uniform"), sde_dpm_solver_pp(VP, 7, order=1, eta=0.0, grid="uniform")
    )


def test_euler_is_ddim_where_time_is_the_noise_level():
    for process in (EDM, FLOW):
        same_table(ddim(process, 9), euler(process, 9))
    vp = plain_run(euler(VP, 9), mixture, MODEL["z16"])[-1]
    assert np.abs(vp - plain_run(ddim(VP, 9), mixture, MODEL["z16"])[-1]).max() > 1e-3


def test_sde_solver_at_eta_zero_is_the_ode_solver():
    """Its "heun" form is the "taylor" form; both forms of the second step agree."""
    for kind, ode in (("midpoint", "midpoint"), ("heun", "taylor")):
        sde = sde_dpm_solver_pp(EDM, 8, eta=0.0, kind=kind)
        same_table(dpm_solver_pp(EDM, 8, kind=ode, lower_order_final=False), sde)
        assert not sde.stochastic
    sde = sde_dpm_solver_pp(VP, 8, order=3, eta=0.0)
    reference = dpm_solver_pp(VP, 8, order=3, kind="taylor", lower_order_final=False)
    same_table(reference, sde)


def test_sde_solver_of_order_one_is_ancestral_at_eta_one():
    same_table(ddim(VP, 8, eta=1.0), sde_dpm_solver_pp(VP, 8, order=1, eta=1.0))


def test_edm_heun_without_churn_is_heun():
    """In sigma on EDM, where t is sigma: the general rule and the paper's algorithm."""
    a, b = samplers.heun(EDM, 9), edm_heun(EDM, 9)
    assert a.nfe == b.nfe == 17
    start = 80 * MODEL["z16"]
    np.testing.assert_allclose(
        plain_run(a, mixture, start)[-1], plain_run(b, mixture, start)[-1], atol=1e-11
    )


@pytest.mark.parametrize(
    "build",
    (
        ddim,
        dpm_solver_pp,
        lambda p, n, **kw: dpm_solver_pp(p, n, order=3, **kw),
        lambda p, n, **kw: dpm_solver_pp(p, n, order=3, variant="singlestep", **kw),
        edm_heun,
        lambda p, n, **kw: ddim(p, n, eta=0.7, **kw),
        lambda p, n, **kw: sde_dpm_solver_pp(p, n, order=3, **kw),
    ),
    ids=("ddim", "2m", "3m", "3s", "edm_heun", "ddim_eta", "sde_3m"),
)
def test_exponential_solvers_depend_on_the_schedule_only_through_its_scale(build):
    """A VP run and an EDM run over the same noise levels agree after y = x / alpha."""
    levels = VP.noise_level(np.array([1.0, 1e-3]))
    edm = processes.EDM(sigma_min=levels[1], sigma_max=levels[0])
    ends = {"grid": "log_snr", "t_start": 1.0}
    vp_sampler = build(VP, 9, t_end=1e-3, **ends)
    edm_sampler = build(edm, 9, t_end=edm.t_min, **ends)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((vp_sampler.nfe + 1, 16, 2))
    alphas = np.append(vp_sampler.xs["point"]["alpha"], vp_sampler.xs["next"]["alpha"][-1])
    sigmas = np.append(edm_sampler.xs["point"]["sigma"], edm_sampler.xs["next"]["sigma"][-1])
    np.testing.assert_allclose(VP.noise_level(np.append(vp_sampler.times, 1e-3)), sigmas, rtol=1e-9)
    one = plain_run(vp_sampler, mixture, alphas[0] * sigmas[0] * MODEL["z16"], noise)
    other = plain_run(edm_sampler, mixture, sigmas[0] * MODEL["z16"], noise)
    np.testing.assert_allclose(one / alphas[:, None, None], other, rtol=1e-8, atol=1e-8)


def test_denoise_to_zero_returns_the_last_prediction():
    base, more = (ddim(VP, 4, denoise_to_zero=flag) for flag in (False, True))
    assert more.nfe == base.nfe + 1
    x = plain_run(base, mixture, MODEL["z16"])[-1]
    last = {name: v[-1] for name, v in base.xs["next"].items()}
    expected = mixture(x, last)
    np.testing.assert_allclose(plain_run(more, mixture, MODEL["z16"])[-1], expected, atol=1e-12)
    end = {name: v[-1] for name, v in more.xs["next"].items()}
    assert (end["t"], end["alpha"], end["sigma"]) == (0.0, 1.0, 0.0)


def test_a_step_into_clean_data_returns_the_prediction():
    """On EDM and rectified flow the last time is 0: whatever the order, the result is a prediction."""
    for name in NAMES:
        for process in (EDM, FLOW):
            sampler = registry.get("sampler", name)(process, 5, **required(name, process))
            last = []

            def spy(x, point, last=last):
                last.append(mixture(x, point))
                return last[-1]

            noise = np.random.default_rng(0).standard_normal((sampler.nfe + 1, 16, 2))
            end = plain_run(sampler, spy, process.prior_std * MODEL["z16"], noise)[-1]
            # midpoint's last call is at half a step, LMS keeps its history into the last one
            if name not in ("midpoint", "lms", *RULES_OF_THE_SDE):
                np.testing.assert_allclose(end, last[-1], rtol=0, atol=1e-11, err_msg=name)


def test_dbim_boots_from_the_source_whatever_eta():
    bridge = processes.VPBridge()
    runs = [dbim(bridge, 5, eta=eta) for eta in (0.0, 0.5, 1.0)]
    for other in runs[1:]:
        np.testing.assert_allclose(other.xs["scalars"][0], runs[0].xs["scalars"][0], rtol=1e-14)
    assert runs[0].times[0] == bridge.t_max and not runs[0].xs["draw"][1:].any()
    assert runs[1].xs["draw"].tolist() == [True, True, True, True, False]


def test_single_step_plans():
    assert singlestep_plan(7, 3) == [3, 3, 1]
    assert singlestep_plan(8, 3) == [3, 3, 2]
    assert singlestep_plan(9, 3) == [3, 3, 2, 1]
    assert singlestep_plan(5, 2) == [2, 2, 1]
    for order in (1, 2, 3):
        for calls in range(1, 30):
            assert sum(singlestep_plan(calls, order)) == calls


def test_the_networks_prediction_changes_nothing():
    """The same model said in eps through `Denoiser`: the solver's own form is x0."""
    from diffusion_jax.denoisers import Denoiser

    def eps(x, t):
        point = VP.point(t)
        x0 = 0.6 * jnp.tanh(x)
        return (x - point["alpha"] * x0) / point["sigma"]

    sampler = dpm_solver_pp(VP, 6)
    direct = sample(sampler, lambda x, t: 0.6 * jnp.tanh(x), None, MODEL["z16"].astype(np.float32))
    through = sample(sampler, Denoiser(eps, VP, "eps"), None, MODEL["z16"].astype(np.float32))
    np.testing.assert_allclose(direct, through, atol=2e-4)
