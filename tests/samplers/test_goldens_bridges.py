"""Bridge samplers against the authors' programs, on exact bridges in float64 (`goldens/PROVENANCE.md`)."""

import numpy as np
import pytest
from golden_files import golden
from solver_checks import AffineBridge, affine_law, mixture_bridge, place_noise, plain_run

from diffusion_jax import processes
from diffusion_jax.numerics import pytree_dataclass
from diffusion_jax.processes import SDEBridge
from diffusion_jax.samplers import bridge_tts, dbim, ddbm_heun, i2sb, sample, with_noise

ETAS = ("0", "0.3", "0.8", "1")
BUDGETS = (5, 10, 20, 50, 100)


def dbim_process(name):
    stored = golden(f"bridges_samplers_{name}")
    if name == "vp":
        return processes.VPBridge(stored["param_beta_d"], stored["param_beta_min"])
    if name == "ve":
        return processes.VEBridge(float(stored["param_sigma_max"]))
    betas = float(stored["param_beta_min"]), float(stored["param_beta_max"])
    return processes.I2SB(*betas, rho_T_excludes_overlap=True)


def affine_bridge(stored, source):
    mean = stored["m0"] + (source - stored["mT"]) @ stored["G"].T
    return AffineBridge(source, mean, *np.linalg.eigh(stored["Sc"]))


def dbim_sampler(process, stored, eta, n, grid=None, order=1):
    grid = stored[f"ts_nfe{n}"] if grid is None else grid
    return dbim(process, len(grid), eta=float(eta), order=order, grid=grid / process.clock_scale)


@pytest.mark.parametrize("name", ("vp", "ve", "i2sb"))
def test_dbim(name, x64):
    stored, process = golden(f"bridges_samplers_{name}"), dbim_process(name)
    bridge = affine_bridge(stored, stored["xT"])
    for n in BUDGETS:
        for eta in ETAS:
            sampler = dbim_sampler(process, stored, eta, n)
            assert sampler.nfe == n
            noise = place_noise(sampler, stored["noise"][:n], range(n))
            expected = stored[f"dbim_eta{eta}_nfe{n}"]
            end = sample(with_noise(sampler, noise), bridge, None, stored["xT"])
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11, err_msg=f"{eta} {n}")


@pytest.mark.parametrize(("name", "atol"), (("vp", 2e-6), ("ve", 2e-6), ("i2sb", 1e-5)))
def test_dbim_in_float32(name, atol):
    stored, process = golden(f"bridges_samplers_{name}"), dbim_process(name)
    source = stored["xT"].astype(np.float32)
    bridge = affine_bridge(stored, source)
    for eta in ("0", "0.8"):
        sampler = dbim_sampler(process, stored, eta, 20)
        noise = place_noise(sampler, stored["noise"][:20], range(20)).astype(np.float32)
        end = sample(with_noise(sampler, noise), bridge, None, source)
        assert end.dtype == np.float32
        np.testing.assert_allclose(end, stored[f"dbim_eta{eta}_nfe20"], rtol=0, atol=atol)


@pytest.mark.parametrize("name", ("vp", "i2sb"))
def test_the_default_grid_of_dbim_is_the_released_one(name):
    stored, process = golden(f"bridges_samplers_{name}"), dbim_process(name)
    for n in BUDGETS:
        times = dbim(process, n).xs["next"]["t"]
        np.testing.assert_allclose(times, stored[f"ts_nfe{n}"], rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ("vp", "ve", "i2sb"))
@pytest.mark.parametrize("n", (5, 20))
def test_output_law_of_dbim(name, n):
    """Not one path but the whole law of the sampler equals that of the released program."""
    stored, process = golden(f"bridges_samplers_{name}"), dbim_process(name)
    for eta in ETAS:
        sampler = dbim_sampler(process, stored, eta, n)
        denoise = affine_bridge(stored, stored["xT"][0]).at
        mean, covariance = affine_law(sampler, denoise, stored["xT"][0], np.zeros((3, 3)))
        tag = f"dbim_eta{eta}_nfe{n}_law"
        np.testing.assert_allclose(mean, stored[f"{tag}_mean"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(covariance, stored[f"{tag}_cov"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", (2, 3))
@pytest.mark.parametrize("name", ("vp", "ve", "i2sb"))
def test_dbim_of_higher_order(name, order):
    """Ends, a whole path and laws of the released multistep sampler, all budgets."""
    stored, orders = golden(f"bridges_samplers_{name}"), golden("bridges_orders")
    process, bridge = dbim_process(name), affine_bridge(stored, stored["xT"])
    denoise = affine_bridge(stored, stored["xT"][0]).at
    for n in BUDGETS:
        sampler = dbim_sampler(process, stored, 0, n, order=order)
        assert sampler.nfe == n and sampler.order == order
        path = plain_run(
            sampler, bridge.at, stored["xT"], place_noise(sampler, stored["noise"][:1], (0,))
        )
        tag = f"{name}_ho{order}_nfe{n}"
        np.testing.assert_allclose(path[-1], orders[tag], rtol=0, atol=1e-12, err_msg=tag)
        if f"{tag}_path" in orders:
            np.testing.assert_allclose(path[1:], orders[f"{tag}_path"], rtol=0, atol=1e-11)
        mean, covariance = affine_law(sampler, denoise, stored["xT"][0], np.zeros((3, 3)))
        np.testing.assert_allclose(mean, orders[f"{tag}_law_mean"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(covariance, orders[f"{tag}_law_cov"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", (2, 3))
@pytest.mark.parametrize(("name", "atol"), (("vp", 2e-6), ("ve", 2e-6), ("i2sb", 1e-5)))
def test_higher_orders_in_float32(name, order, atol):
    stored = golden(f"bridges_samplers_{name}")
    source = stored["xT"].astype(np.float32)
    sampler = dbim_sampler(dbim_process(name), stored, 0, 20, order=order)
    noise = place_noise(sampler, stored["noise"][:1], (0,)).astype(np.float32)
    end = sample(with_noise(sampler, noise), affine_bridge(stored, source), None, source)
    assert end.dtype == np.float32
    expected = golden("bridges_orders")[f"{name}_ho{order}_nfe20"]
    np.testing.assert_allclose(end, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ("vp", "ve", "i2sb"))
def test_inpainting_is_a_transform_of_the_denoiser(name, x64):
    """Predictions are replaced by the source where the mask is 0; the sampler is not told."""
    stored, process = golden(f"bridges_samplers_{name}"), dbim_process(name)
    bridge, mask = affine_bridge(stored, stored["xT"]), stored["mask"]

    class Masked:
        def at(self, x, point):
            return bridge.at(x, point) * mask + stored["xT"] * (1 - mask)

        def __call__(self, x, t):
            raise AssertionError

    sampler = dbim_sampler(process, stored, "0.8", 10)
    noise = place_noise(sampler, stored["noise"][:10], range(10))
    end = sample(with_noise(sampler, noise), Masked(), None, stored["xT"])
    np.testing.assert_allclose(end, stored["mask_dbim_nfe10"], rtol=0, atol=1e-11)
    sampler = dbim_sampler(process, stored, 0, 10, order=3)
    noise = place_noise(sampler, stored["noise"][:1], (0,))
    path = plain_run(sampler, Masked().at, stored["xT"], noise)[1:]
    expected = golden("bridges_orders")[f"{name}_mask_ho3_nfe10_path"]
    np.testing.assert_allclose(path, expected, rtol=0, atol=1e-11)


def test_dbim_on_a_mixture():
    stored = golden("bridges_samplers_mixture")
    process = processes.VPBridge(stored["param_beta_d"], stored["param_beta_min"])
    denoise = mixture_bridge(stored)
    for t, x, expected in zip(stored["q_t"], stored["q_x"], stored["q_denoised"]):
        np.testing.assert_allclose(denoise(x, process.point(t)), expected, atol=1e-11)
    cases = [(eta, n, f"nfe{n}", f"nfe{n}") for eta in ETAS for n in (5, 10, 20, 50)]
    for eta, n, grid, tag in [*cases, ("0", 21, "lambda_n20", "lambda_n20")]:
        sampler = dbim_sampler(process, stored, eta, n, stored[f"ts_{grid}"])
        noise = place_noise(sampler, stored["noise"][:n], range(n))
        end = plain_run(sampler, denoise, stored["xT"], noise)[-1]
        expected = stored[f"dbim_eta{eta}_{tag}"]
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11, err_msg=f"{eta} {tag}")
    orders = golden("bridges_orders")
    for order in (2, 3):
        for n, grid in (
            (5, "nfe5"),
            (10, "nfe10"),
            (20, "nfe20"),
            (50, "nfe50"),
            (21, "lambda_n20"),
        ):
            sampler = dbim_sampler(process, stored, 0, n, stored[f"ts_{grid}"], order)
            noise = place_noise(sampler, stored["noise"][:1], (0,))
            end = plain_run(sampler, denoise, stored["xT"], noise)[-1]
            expected = orders[f"mixture_ho{order}_{grid}"]
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-11, err_msg=f"{order} {grid}")
    sampler = ddbm_heun(process, 7, churn=0.33)
    noise = place_noise(sampler, stored["noise"][:7], range(0, 21, 3))
    end = plain_run(sampler, denoise, stored["xT"], noise)[-1]
    np.testing.assert_allclose(end, orders["mixture_heun_churn0.33_n7"], rtol=0, atol=1e-11)


def heun_case(name, key):
    """The sampler of a stored DDBM run, and at which rows its draws go."""
    process = processes.VPBridge(2.0, 0.1) if name == "vp" else processes.VEBridge(80.0)
    *tags, steps = key.split("_")[1:]
    churn = float(tags[-1].removeprefix("churn"))
    w = float(tags[0].removeprefix("guidance")) if len(tags) == 2 else 1.0
    # the released VE program leaves its stochastic part alone and halves the rest
    both = (w, w) if name == "vp" else (0.5 * (1.0 + w), 1.0)
    n = int(steps[1:])
    sampler = ddbm_heun(process, n, churn=churn, guidance=both[0], guidance_stochastic=both[1])
    return sampler, n, range(0, 3 * n, 3) if churn else ()


@pytest.mark.parametrize("name", ("vp", "ve"))
def test_ddbm_heun(name, x64):
    stored = golden("bridges_heun")
    bridge = affine_bridge(stored, stored["xT"])
    keys = [
        k
        for k in stored
        if k.startswith(f"{name}_") and "churn" in k and k.split("_")[-1][1:].isdigit()
    ]
    assert len(keys) == 14
    for key in keys:
        sampler, n, rows = heun_case(name, key)
        noise = place_noise(sampler, stored["noise"][:n], rows)
        end = plain_run(sampler, bridge.at, stored["xT"], noise)[-1]
        np.testing.assert_allclose(end, stored[key], rtol=0, atol=2e-9, err_msg=key)
        if n == 7:
            end = sample(with_noise(sampler, noise), bridge, None, stored["xT"])
            np.testing.assert_allclose(end, stored[key], rtol=0, atol=2e-9, err_msg=key)


@pytest.mark.parametrize("name", ("vp", "ve"))
def test_grid_calls_and_law_of_ddbm_heun(name):
    stored = golden("bridges_heun")
    for churn in ("0", "0.33"):
        for n, nfe in zip(stored["n_steps"], stored[f"{name}_churn{churn}_nfe"]):
            sampler = heun_case(name, f"{name}_churn{churn}_n{n}")[0]
            assert sampler.nfe == nfe
            scale = 80.0 if name == "ve" else 1.0
            starts = sampler.times[:: 3 if churn != "0" else 2] * scale
            np.testing.assert_allclose(starts, stored[f"{name}_ts_n{n}"][:-1], rtol=1e-11)
    sampler = heun_case(name, f"{name}_churn0.33_n7")[0]
    denoise = affine_bridge(stored, stored["xT"][0]).at
    mean, covariance = affine_law(sampler, denoise, stored["xT"][0], np.zeros((3, 3)))
    np.testing.assert_allclose(mean, stored[f"{name}_churn0.33_n7_law_mean"], rtol=1e-9)
    np.testing.assert_allclose(covariance, stored[f"{name}_churn0.33_n7_law_cov"], rtol=1e-9)


def test_ddbm_heun_in_float32_keeps_its_digits():
    """Coefficients near the source reach 4e5 and cancel; the centred columns keep float32 at 1e-5."""
    stored = golden("bridges_heun")
    source = stored["xT"].astype(np.float32)
    bridge = affine_bridge(stored, source)
    sampler = heun_case("ve", "ve_churn0_n4")[0]
    assert np.abs(sampler.xs["scalars"]).max() > 1e4
    end = sample(sampler, bridge, None, source)
    np.testing.assert_allclose(end, stored["ve_churn0_n4"], rtol=0, atol=3e-5)


@pytree_dataclass
class CumulativeBridge(SDEBridge):
    """alpha = 1 with rho^2 from a table, and rho_bar^2 the rest of it: the exact Markov chain."""

    variance: object
    t_min: float = 0.0
    t_max: float = 1.0

    def rho2(self, t):
        return self.variance[np.round((len(self.variance) - 1) * np.asarray(t)).astype(int)]

    def rho_bar2(self, t):
        return self.variance[-1] - self.rho2(t)


def test_i2sb_is_dbim_at_eta_one(x64):
    """The posterior sampler of I2SB, with its own tables and a network that does not see the source."""
    stored = golden("bridges_i2sb_official")
    process = CumulativeBridge(stored["sde_std_fwd"].astype(np.float64) ** 2)

    def denoise(x, point):
        k = round(999 * float(point["t"]))
        a, b, c = (float(stored[f"sde_{n}"][k]) for n in ("mu_x1", "mu_x0", "std_sb"))
        cross = a * b * (stored["S0T"] + stored["S0T"].T)
        total = a**2 * stored["STT"] + b**2 * stored["S00"] + cross + c**2 * np.eye(3)
        gain = (a * stored["S0T"] + b * stored["S00"]) @ np.linalg.inv(total)
        return stored["m0"] + (x - a * stored["mT"] - b * stored["m0"]) @ gain.T

    for n in (5, 10, 20):
        steps = stored[f"sde_nfe{n}_steps"]
        sampler = dbim(process, eta=1.0, num_steps=n, grid=steps[:-1][::-1] / 999.0)
        assert sampler.nfe == n
        noise = place_noise(sampler, stored[f"sde_nfe{n}_noise"], range(n - 1))
        end = plain_run(sampler, denoise, stored["x1"], noise)[-1]
        np.testing.assert_allclose(end, stored[f"sde_nfe{n}_xs"], rtol=0, atol=2e-6)


def blind_denoiser(stored):
    """E[x0 | x_t] of the joint Gaussian, for a network that is not told the source."""

    def denoise(x, point):
        a, b, c = (point[n] for n in "abc")
        cross = a * b * (stored["S0T"] + stored["S0T"].T)
        total = a**2 * stored["STT"] + b**2 * stored["S00"] + cross + c**2 * np.eye(3)
        gain = (a * stored["S0T"] + b * stored["S00"]) @ np.linalg.inv(total)
        return stored["m0"] + (x - a * stored["mT"] - b * stored["m0"]) @ gain.T

    return denoise


@pytest.mark.parametrize("kind", ("sde", "ot"))
def test_i2sb(kind):
    """The released sampler on its own entries: paths from stored draws, and laws over random sources."""
    stored = golden("bridges_i2sb_official")
    runs = stored if kind == "sde" else golden("bridges_i2sb_ot")
    process = processes.I2SB(0.1, float(runs[f"{kind}_beta_max"]), ot_ode=kind == "ot")
    denoise = blind_denoiser(stored)
    root = np.linalg.cholesky(stored["STT"])
    for n in (5, 10, 20):
        sampler = i2sb(process, n)
        assert sampler.nfe == n and sampler.stochastic == (kind == "sde")
        steps = np.append(sampler.times, sampler.xs["next"]["t"][-1]) * 999
        np.testing.assert_allclose(steps[::-1], runs[f"{kind}_nfe{n}_steps"], rtol=0, atol=1e-9)
        noise = None
        if kind == "sde":
            noise = place_noise(sampler, runs[f"sde_nfe{n}_noise"], range(n - 1))
        path = plain_run(sampler, denoise, stored["x1"], noise)
        if kind == "sde":
            states, expected = path[-1], runs[f"sde_nfe{n}_xs"]
        else:
            states, expected = path[1:], runs[f"ot_nfe{n}_xs"].swapaxes(0, 1)[::-1]
        np.testing.assert_allclose(states, expected, rtol=0, atol=2e-6)
        mean, covariance = affine_law(sampler, denoise, stored["mT"], root)
        np.testing.assert_allclose(mean, runs[f"{kind}_nfe{n}_law_mean"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(covariance, runs[f"{kind}_nfe{n}_law_cov"], rtol=0, atol=2e-6)
    steps = i2sb(process, 100).times * 999
    np.testing.assert_allclose(steps[::-1], stored["sde_nfe100_steps"][1:], rtol=0, atol=1e-9)


def tts_process(stored, name):
    low, high = float(stored["beta_0"]), float(stored["beta_1"])
    if name == "gmax":
        return processes.GmaxBridge(low, high)
    if name == "const":
        return processes.BrownianBridge(high**0.5)
    low, high = float(stored["vp_beta_0"]), float(stored["vp_beta_1"])
    return processes.VPBridge(beta_d=high - low, beta_min=low)


@pytest.mark.parametrize("name", ("gmax", "vp", "const"))
def test_bridge_tts(name):
    """One step of each of its solvers from a given state, by the paper's own formulas."""
    stored = golden("bridges_tts")
    process = tts_process(stored, name)
    # one step more, so that the stored one is not the last
    grid = [float(stored["step_s"]), float(stored["step_t"]), 0.1]
    noise = np.stack([np.zeros_like(stored["z2"]), stored["z2"], stored["z2"]])
    cases = {"ode": {"kind": "ode"}, "sde": {}, "sde_tau": {"temperature": float(stored["tau_b"])}}
    for case, options in cases.items():
        sampler = bridge_tts(process, grid=grid, **options)
        path = plain_run(
            sampler,
            lambda x, point: stored[f"{name}_step_D"],
            stored[f"{name}_step_xs"],
            noise,
            source=stored["x1"],
        )
        expected = stored[f"{name}_step_{case}"]
        np.testing.assert_allclose(path[1], expected, rtol=0, atol=1e-12, err_msg=case)


@pytest.mark.parametrize("name", ("gmax", "vp", "const"))
@pytest.mark.parametrize(("kind", "eta"), (("ode", 0.0), ("sde", 1.0)))
def test_steps_of_bridge_tts(name, kind, eta, x64):
    """One step of Bridge-TTS from a given state, by its own formulas: DBIM at both ends of eta."""
    stored = golden("bridges_tts")
    process = tts_process(stored, name)
    # boot at s, the step s -> t, and one more so that the step is not the last
    grid = [float(stored["step_s"]), float(stored["step_t"]), 0.1]
    sampler = dbim(process, 3, eta=eta, grid=grid)
    inputs = {k: v[1] for k, v in sampler.xs.items() if k in ("scalars", "draw")}
    inputs |= {"point": None, "arrays": (), "z": stored["z2"]}
    state = sampler.init(None, {}, stored["x1"])._replace(x=stored[f"{name}_step_xs"])
    state, _ = sampler.step(lambda x, point: stored[f"{name}_step_D"], None, state, inputs)
    np.testing.assert_allclose(state.x, stored[f"{name}_step_{kind}"], rtol=0, atol=1e-10)
