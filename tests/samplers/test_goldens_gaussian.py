"""Gaussian solvers against the authors' programs, on an exact mixture in float64 (`goldens/PROVENANCE.md`)."""

import numpy as np
import pytest
from golden_files import golden
from solver_checks import Mixture, mixture_mean, place_noise, plain_run

from diffusion_jax import processes, samplers
from diffusion_jax.numerics import pytree_dataclass
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.samplers import ddim, ddpm, dpm_solver, dpm_solver_pp, edm_heun, sample
from diffusion_jax.samplers import sde_dpm_solver_pp as sde_dpmpp

MODEL = golden("solvers_model")
MIXTURE = Mixture(MODEL["w"], MODEL["means"], MODEL["covs"])
Z16 = MODEL["z16"]
GRIDS = {"logSNR": "log_snr", "time_uniform": "uniform", "time_quadratic": "quadratic"}
NFES = (5, 6, 8, 10, 15, 20, 50)

# The released programs lower the order of the last steps only below 10 steps.
DPM = {
    "ddim": lambda p, n, **kw: ddim(p, n, **kw),
    "dpmpp_2m": lambda p, n, **kw: dpm_solver_pp(p, n, lower_order_final=n < 10, **kw),
    "dpmpp_2m_taylor": lambda p, n, **kw: dpm_solver_pp(
        p, n, kind="taylor", lower_order_final=n < 10, **kw
    ),
    "dpmpp_2m_dz": lambda p, n, **kw: dpm_solver_pp(
        p, n - 1, lower_order_final=n - 1 < 10, denoise_to_zero=True, **kw
    ),
    "dpmpp_3m": lambda p, n, **kw: dpm_solver_pp(p, n, order=3, lower_order_final=n < 10, **kw),
    "dpmpp_3m_nolof": lambda p, n, **kw: dpm_solver_pp(
        p, n, order=3, lower_order_final=False, **kw
    ),
    "dpm_2m": lambda p, n, **kw: dpm_solver(p, n, prediction="eps", lower_order_final=n < 10, **kw),
    "dpm_3m": lambda p, n, **kw: dpm_solver(
        p, n, order=3, prediction="eps", lower_order_final=n < 10, **kw
    ),
    "dpmpp_2s": lambda p, n, **kw: dpm_solver_pp(p, n, variant="singlestep", **kw),
    "dpmpp_3s": lambda p, n, **kw: dpm_solver_pp(p, n, order=3, variant="singlestep", **kw),
    "dpmpp_3s_taylor": lambda p, n, **kw: dpm_solver_pp(
        p, n, order=3, variant="singlestep", kind="taylor", **kw
    ),
    "dpm_2s": lambda p, n, **kw: dpm_solver(p, n, prediction="eps", variant="singlestep", **kw),
    "dpm_3s": lambda p, n, **kw: dpm_solver(
        p, n, order=3, prediction="eps", variant="singlestep", **kw
    ),
}


def vp_sampler(name, grid, n):
    ends = {"t_start": float(MODEL["vp_T"]), "t_end": float(MODEL["vp_t_end"])}
    return DPM[name](processes.VP(), n, grid=GRIDS[grid], **ends)


def numpy_mixture(x, point):
    return mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])


@pytest.mark.parametrize("name", DPM)
def test_dpm_solver_family_on_vp(name):
    """All grids and budgets, tables run by the plain loop."""
    stored = golden("solvers_dpm_vp")
    for grid in GRIDS:
        for n in NFES:
            sampler = vp_sampler(name, grid, n)
            assert sampler.nfe == n
            end = plain_run(sampler, numpy_mixture, Z16)[-1]
            expected = stored[f"{name}__{grid}__nfe{n}"]
            expected = expected[-1] if expected.ndim == 3 else expected
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10, err_msg=f"{grid} {n}")


@pytest.mark.parametrize("name", DPM)
def test_dpm_solver_family_on_vp_compiled(name, x64):
    """`sample` itself, below and above the 10 steps where the released programs change their plan."""
    stored = golden("solvers_dpm_vp")
    for n in (5, 10):
        for grid in GRIDS:
            end = sample(vp_sampler(name, grid, n), MIXTURE, None, Z16)
            expected = stored[f"{name}__{grid}__nfe{n}"]
            expected = expected[-1] if expected.ndim == 3 else expected
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10, err_msg=f"{grid} {n}")


@pytest.mark.parametrize("name", ("ddim", "dpmpp_2m", "dpmpp_3m", "dpm_2m"))
def test_every_intermediate_state(name, x64):
    sampler = vp_sampler(name, "logSNR", 10)
    end, path = sample(sampler, MIXTURE, None, Z16, trajectory=True)
    expected = golden("solvers_dpm_vp")[f"{name}__logSNR__nfe10"]
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(path[-1], end)


@pytest.mark.parametrize("name", ("ddim", "dpmpp_2m", "dpmpp_3m"))
def test_float32_state_stays_close(name):
    stored = golden("solvers_dpm_vp")
    for n in (5, 20, 50):
        end = sample(vp_sampler(name, "logSNR", n), MIXTURE, None, Z16.astype(np.float32))
        assert end.dtype == np.float32
        expected = stored[f"{name}__logSNR__nfe{n}"]
        np.testing.assert_allclose(end, expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_time_grids(grid):
    stored = golden("solvers_dpm_vp")
    for n in NFES:
        times = vp_sampler("ddim", grid, n).times
        np.testing.assert_allclose(times, stored[f"grid__{grid}__n{n}"][:-1], rtol=1e-11)


EDM_SOLVERS = {  # this program always lowers the order of the last steps
    "ddim": ddim,
    "dpmpp_2m": dpm_solver_pp,
    "dpmpp_3m": lambda p, n, **kw: dpm_solver_pp(p, n, order=3, **kw),
    "dpmpp_3m_dz": lambda p, n, **kw: dpm_solver_pp(p, n - 1, order=3, denoise_to_zero=True, **kw),
    "dpm_3m": lambda p, n, **kw: dpm_solver(p, n, order=3, prediction="eps", **kw),
}


@pytest.mark.parametrize("name", EDM_SOLVERS)
@pytest.mark.parametrize("grid", ("logSNR", "edm"))
def test_edm_schedule(name, grid, x64):
    stored, edm = golden("solvers_edm_ode"), processes.EDM()
    start = Z16 * edm.sigma_max
    lay = {"logSNR": "log_snr", "edm": "karras"}[grid]
    for n in NFES:
        sampler = EDM_SOLVERS[name](edm, n, grid=lay, t_end=edm.t_min)
        assert sampler.nfe == n
        if name == "ddim":
            levels = edm.sigma_max * np.append(sampler.times, edm.t_min)
            np.testing.assert_allclose(levels, stored[f"grid__{grid}__n{n}"], rtol=1e-11)
        expected = stored[f"{name}__{grid}__nfe{n}"]
        end = plain_run(sampler, numpy_mixture, start)[-1]
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10)
        if n == 10:
            end = sample(sampler, MIXTURE, None, start)
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10)


def test_edm_heun(x64):
    stored, edm = golden("solvers_nv_edm"), processes.EDM()
    for n in (3, 4, 5, 6, 8, 11, 18, 26):
        sampler = edm_heun(edm, n)
        assert sampler.nfe == stored[f"heun__N{n}_nfe"]
        end = plain_run(sampler, numpy_mixture, 80 * Z16)[-1]
        np.testing.assert_allclose(end, stored[f"heun__N{n}"], rtol=0, atol=1e-10)
    end = sample(sampler, MIXTURE, None, 80 * Z16)
    np.testing.assert_allclose(end, stored["heun__N26"], rtol=0, atol=1e-10)


def test_edm_heun_with_churn(x64):
    stored = golden("solvers_nv_edm")
    churn = dict(zip(("s_churn", "s_min", "s_max", "s_noise"), stored["churn_params"]))
    for n in (3, 4, 5, 6, 8, 11, 18, 26):
        sampler = edm_heun(processes.EDM(), n, **churn)
        assert sampler.nfe == stored[f"heun__N{n}_nfe"]
        # the draw of step i is added by the row that ends step i - 1
        noise = place_noise(sampler, stored["churn_noise"][:n], range(-1, 2 * n - 1, 2))
        end = plain_run(sampler, numpy_mixture, 80 * Z16, noise)[-1]
        np.testing.assert_allclose(end, stored[f"churn__N{n}"], rtol=0, atol=1e-10, err_msg=str(n))
    end = sample(samplers.with_noise(sampler, noise), MIXTURE, None, 80 * Z16)
    np.testing.assert_allclose(end, stored["churn__N26"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", ("euler", "heun"))
def test_edm_ablation_sampler_on_vp(rule, x64):
    """The paper's general sampler with the VP schedule and scaling: Runge-Kutta in t, uniform times, then 0."""
    stored, vp = golden("solvers_nv_edm"), processes.VP()
    for n in (8, 18):
        times = np.append(np.linspace(1.0, 1e-3, n), 0.0)
        sampler = getattr(samplers, rule)(vp, grid=times)
        assert sampler.nfe == stored[f"abl_vp_{rule}__N{n}_nfe"]
        end = sample(sampler, MIXTURE, None, Z16 * vp.sigma(1.0))
        np.testing.assert_allclose(end, stored[f"abl_vp_{rule}__N{n}"], rtol=0, atol=1e-9)


SDE = {
    "dpmpp_2m_sde_solver_typemidpoint": lambda p, n, t: sde_dpmpp(p, n, grid=t),
    "dpmpp_2m_sde_solver_typeheun": lambda p, n, t: sde_dpmpp(p, n, grid=t, kind="heun"),
    "dpmpp_2m_sde_eta0.5": lambda p, n, t: sde_dpmpp(p, n, grid=t, eta=0.5),
    "dpmpp_3m_sde": lambda p, n, t: sde_dpmpp(p, n, grid=t, order=3),
    "dpmpp_3m_sde_eta0.0": lambda p, n, t: sde_dpmpp(p, n, grid=t, order=3, eta=0.0),
    "dpmpp_2m": lambda p, n, t: dpm_solver_pp(p, n, grid=t, lower_order_final=False),
    "euler": lambda p, n, t: samplers.euler(p, n, grid=t),
    "euler_ancestral": lambda p, n, t: ddim(p, n, eta=1.0, grid=t),
    "euler_ancestral_eta0.4": lambda p, n, t: ddim(p, n, eta=0.4, grid=t),
    "heun": lambda p, n, t: edm_heun(p, n, grid=t),
}


@pytest.mark.parametrize("name", SDE)
def test_k_diffusion(name, x64):
    stored = golden("solvers_kdiff")
    for n in (5, 10, 20, 50):
        levels = stored[f"sigmas_karras__n{n}"]
        process = processes.EDM(sigma_min=levels[-2], sigma_max=levels[0])
        sampler = SDE[name](process, n, levels / levels[0])
        np.testing.assert_allclose(
            samplers.karras(process, n, 1.0, 0.0) * levels[0], levels, rtol=1e-11
        )
        noise = np.zeros((sampler.nfe + 1, 16, 2))
        draws = int(stored.get(f"{name}__n{n}_draws", 0))
        noise[1 : 1 + draws] = stored["noise"][:draws]
        assert sampler.nfe == stored[f"{name}__n{n}_nfe"]
        assert sampler.stochastic == (draws > 0)
        end = plain_run(sampler, numpy_mixture, stored["xT"], noise)[-1]
        expected = stored[f"{name}__n{n}"]
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11, err_msg=str(n))
        if n == 10:
            end = sample(samplers.with_noise(sampler, noise), MIXTURE, None, stored["xT"])
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("rule", ("euler", "midpoint"))
@pytest.mark.parametrize("grid", ("uniform", "shifted"))
def test_rectified_flow(rule, grid, x64):
    stored, process = golden("solvers_rf"), processes.RectifiedFlow()
    shift = float(stored["shift"]) if grid == "shifted" else 1.0
    for nfe in NFES:
        n = nfe if rule == "euler" else nfe // 2
        if rule == "midpoint" and nfe % 2:
            continue
        t = np.linspace(1.0, 0.0, n + 1)
        sampler = getattr(samplers, rule)(process, grid=shift * t / (1 + (shift - 1) * t))
        assert sampler.nfe == nfe
        end = plain_run(sampler, numpy_mixture, stored["x1"])[-1]
        expected = stored[f"{rule}__{grid}__nfe{nfe}"]
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11, err_msg=str(nfe))
    end = sample(sampler, MIXTURE, None, stored["x1"])
    np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11)


@pytree_dataclass
class DiscreteBetas(GaussianProcess):
    """A discrete-time schedule as a process: t = k / N is the state after k noising steps, k = 0..N."""

    alphas_cumprod: object
    t_min: float = 1e-3
    t_max: float = 1.0

    def _kept(self, t):
        kept = np.concatenate([[1.0], self.alphas_cumprod])
        return kept[np.round((len(kept) - 1) * np.asarray(t)).astype(int)]

    def log_alpha(self, t):
        return 0.5 * np.log(self._kept(t))

    def sigma(self, t):
        return np.sqrt(1.0 - self._kept(t))

    def dalpha(self, t):
        return np.full(np.shape(t), np.nan)  # undefined between the steps, and not needed

    dsigma = dalpha


def ddim_path(sequence, noise):
    """Times and draws for an index sequence of DDIM: from its last index down, then the clean end.

    The quadratic sequence repeats indices; a step of length zero changes nothing and is left out.
    """
    times = np.append((sequence[::-1] + 1) / 1000.0, 0.0)
    moves = np.diff(times) < 0
    draws = np.concatenate([np.zeros_like(noise[:1]), noise[: len(sequence)][moves]])
    return np.append(times[:-1][moves], 0.0), draws


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_ddim_on_its_discrete_schedule(eta, x64):
    stored = golden("solvers_ddim")
    process = DiscreteBetas(stored["alphas_cumprod"])
    for spacing in ("uniform", "quad"):
        for n in (5, 10, 20, 50):
            times, noise = ddim_path(stored[f"seq_{spacing}__n{n}"], stored["noise"])
            sampler = ddim(process, eta=eta, grid=times)
            end = plain_run(sampler, numpy_mixture, Z16, noise)[-1]
            expected = stored[f"ddim_eta{eta}__{spacing}__n{n}"]
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10, err_msg=f"{spacing} {n}")
    end = sample(samplers.with_noise(sampler, noise), MIXTURE, None, Z16)
    np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10)


def test_ddpm_with_the_large_variance_and_clamped_predictions(x64):
    stored = golden("solvers_ddim")
    process = DiscreteBetas(stored["alphas_cumprod"])
    small = Mixture(MODEL["w"], stored["small_means"], stored["small_covs"])

    class Clamped:
        def at(self, x, point):
            return small.at(x, point).clip(-1.0, 1.0)

        def __call__(self, x, t):
            raise AssertionError

    clamped = Clamped()
    for n in (10, 50):
        times, noise = ddim_path(stored[f"seq_uniform__n{n}"], stored["noise"])
        sampler = samplers.with_noise(ddpm(process, variance="large", grid=times), noise)
        end = sample(sampler, clamped, None, Z16)
        np.testing.assert_allclose(end, stored[f"ddpm_small__n{n}"], rtol=0, atol=1e-10)
