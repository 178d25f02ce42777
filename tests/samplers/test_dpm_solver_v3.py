"""DPM-Solver-v3 against the authors' program, against what it degenerates to, and against exact flows."""

import dataclasses

import numpy as np
import pytest
from golden_files import golden
from solver_checks import AffineGaussian, Mixture, affine_gaussian, mixture_mean, plain_run

from diffusion_jax import oracles, processes, samplers
from diffusion_jax.samplers import (
    ModelStatistics,
    dpm_solver,
    dpm_solver_pp,
    dpm_solver_v3,
    official_flags,
    sample,
)
from diffusion_jax.samplers.model_statistics import describe

MODEL = golden("solvers_model")
MIXTURE = Mixture(MODEL["w"], MODEL["means"], MODEL["covs"])
Z16 = MODEL["z16"]
VP, EDM = processes.VP(), processes.EDM()
NFES = (5, 6, 8, 10, 15, 20, 50)
CASES = {
    "vp": (VP, {"logSNR": "log_snr", "time_uniform": "uniform", "time_quadratic": "quadratic"}),
    "edm": (EDM, {"logSNR": "log_snr", "edm": "karras"}),
}
FLAGS = {
    "v3_1": {"order": 1, "corrector": False},
    "v3_2": {"order": 2, "corrector": False},
    "v3_3": {"order": 3, "corrector": False},
    "v3_2_cpseudo": {"order": 2, "corrector_pseudo": True},
    "v3_3_c": {"order": 3},
    "v3_3_cpseudo": {"order": 3, "corrector_pseudo": True},
    "v3_3_ppseudo_c": {"order": 3, "predictor_pseudo": True},
    "v3_3_ppseudo_c_nolof": {"order": 3, "predictor_pseudo": True, "lower_order_final": False},
    "v3deg_2": {"order": 2, "corrector": False},
    "v3deg_3": {"order": 3, "corrector": False},
}


def numpy_mixture(x, point):
    return mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])


def stored_statistics(name, degenerated=False):
    process, stored = CASES[name][0], golden(f"solvers_v3_{name}")
    if degenerated:
        return ModelStatistics.data_prediction(process, t_end=process.t_min, intervals=240)
    values = (stored[f"ems_{n}"] for n in ("lam", "l", "s", "b"))
    return ModelStatistics(*values, describe(process), 1.0, process.t_min, 512)


def official(name, flags, grid, n):
    process, grids = CASES[name]
    return dpm_solver_v3(
        process,
        n,
        statistics=stored_statistics(name, "deg" in flags),
        snap=True,
        grid=grids[grid],
        t_end=process.t_min,
        **FLAGS[flags],
    )


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", CASES)
def test_the_authors_program(name, flags):
    process, grids = CASES[name]
    stored = golden(f"solvers_v3_{name}")
    for grid in grids:
        for n in NFES:
            sampler = official(name, flags, grid, n)
            assert sampler.nfe == n
            end = plain_run(sampler, numpy_mixture, Z16 * process.prior_std)[-1]
            expected = stored[f"{flags}__{grid}__nfe{n}"]
            np.testing.assert_allclose(end, expected, rtol=0, atol=1e-10, err_msg=f"{grid} {n}")


@pytest.mark.parametrize("name", CASES)
def test_times_move_to_the_nodes(name):
    process, grids = CASES[name]
    stored = golden(f"solvers_v3_{name}")
    for grid in grids:
        for n in NFES:
            times = official(name, "v3_3_c", grid, n).times * process.prior_std
            np.testing.assert_allclose(times, stored[f"time__{grid}__n{n}"][:-1], rtol=1e-11)
            nodes = stored["ems_lam"][stored[f"index__{grid}__n{n}"]]
            at = process.lam(times / process.prior_std)
            np.testing.assert_allclose(at, nodes[:-1], rtol=0, atol=1e-10)


def test_compiled_and_in_float32(x64):
    stored = golden("solvers_v3_vp")
    for n in (5, 10):
        sampler = official("vp", "v3_3_cpseudo", "logSNR", n)
        expected = stored[f"v3_3_cpseudo__logSNR__nfe{n}"]
        np.testing.assert_allclose(
            sample(sampler, MIXTURE, None, Z16), expected, rtol=0, atol=1e-10
        )
        end = sample(sampler, MIXTURE, None, Z16.astype(np.float32))
        assert end.dtype == np.float32
        np.testing.assert_allclose(end, expected, rtol=0, atol=2e-5)


def gaussian_statistics(process, mean, variances, intervals):
    """The exact ones of Gaussian data: l = sigma^2 / (alpha^2 c + sigma^2), s = 0, b = -l' mean."""
    flat = ModelStatistics.data_prediction(process, intervals=intervals)
    t = process.t_of_lam(flat.lam)
    ratio = variances * np.exp(2.0 * flat.lam)[:, None]
    np.testing.assert_allclose(
        1.0 / (1.0 + ratio),
        process.sigma(t)[:, None] ** 2
        / (process.alpha(t)[:, None] ** 2 * variances + process.sigma(t)[:, None] ** 2),
        rtol=1e-10,
    )
    l, slope = 1.0 / (1.0 + ratio), -2.0 * ratio / (1.0 + ratio) ** 2
    return dataclasses.replace(flat, l=l, s=np.zeros_like(l), b=-slope * mean)


@pytest.mark.parametrize("snap", (True, False))
@pytest.mark.parametrize("process", (VP, processes.Cosine(), processes.VE()))
def test_gaussian_data_in_one_step(process, snap):
    """f is -l mean, known without a derivative: a step of any length is exact but for the N intervals."""
    mean, c = np.array([0.6, -0.4]), np.array([0.30, 0.02])
    t, s = process.sampling_range
    x = process.alpha(t) * mean + process.sigma(t) * Z16
    exact = oracles.gaussian_flow(process, mean, np.diag(c), x, t, s)
    model = affine_gaussian(mean, np.diag(c))
    model = AffineGaussian(model.mean, model.eigenvalues, model.basis)
    errors = []
    for intervals in (60, 240, 960):
        statistics = gaussian_statistics(process, mean, c, intervals)
        for order in (1, 3):
            sampler = dpm_solver_v3(
                process, 1, statistics=statistics, order=order, grid="log_snr", snap=snap
            )
            end = plain_run(sampler, model.at, x)[-1]
        errors.append(np.abs(end - exact).max())
    assert errors[0] < 5e-3 and errors[2] < 2e-5
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.2)
    ddim = plain_run(samplers.ddim(process, 1, grid="log_snr"), model.at, x)[-1]
    assert np.abs(ddim - exact).max() > 100 * errors[0]


PAIRS = {
    ("data_prediction", 1): lambda p, n, **kw: samplers.ddim(p, n, **kw),
    ("data_prediction", 2): lambda p, n, **kw: dpm_solver_pp(p, n, kind="taylor", **kw),
    ("data_prediction", 3): lambda p, n, **kw: dpm_solver_pp(
        p, n, order=3, kind="taylor", exact_d2=True, **kw
    ),
    ("noise_prediction", 1): lambda p, n, **kw: samplers.ddim(p, n, **kw),
    ("noise_prediction", 2): lambda p, n, **kw: dpm_solver(
        p, n, kind="taylor", prediction="eps", **kw
    ),
    ("noise_prediction", 3): lambda p, n, **kw: dpm_solver(
        p, n, order=3, kind="taylor", exact_d2=True, prediction="eps", **kw
    ),
}


@pytest.mark.parametrize(("kind", "order"), PAIRS)
def test_what_it_is_without_knowledge(kind, order):
    """Exactly DDIM, DPM-Solver++ and DPM-Solver; up to O(N^-2) with the trapezoidal rule."""
    for process, grid, n in ((VP, "log_snr", 10), (EDM, "karras", 7), (VP, "quadratic", 12)):
        ends = {"grid": grid, "t_end": process.t_min}
        x = Z16 * process.prior_std
        expected = plain_run(PAIRS[kind, order](process, n, **ends), numpy_mixture, x)[-1]
        make = getattr(ModelStatistics, kind)
        options = {"order": order, "corrector": False, **ends}
        sampler = dpm_solver_v3(process, n, statistics=make(process), **options)
        end = plain_run(sampler, numpy_mixture, x)[-1]
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-8)
    errors = []
    for intervals in (240, 480):
        options = {"order": order, "corrector": False, "grid": "log_snr", "snap": True}
        statistics = make(VP, intervals=intervals)
        sampler = dpm_solver_v3(VP, 10, statistics=statistics, **options)
        end = plain_run(sampler, numpy_mixture, Z16)[-1]
        expected = plain_run(PAIRS[kind, order](VP, 10, grid="log_snr"), numpy_mixture, Z16)[-1]
        errors.append(np.abs(end - expected).max())
    assert errors[0] < 5e-3 and errors[0] / errors[1] == pytest.approx(4.0, rel=0.1)


ORDERS = {
    (1, False, False, False): 1,
    (2, False, False, False): 2,
    (3, False, False, False): 3,
    (3, True, False, False): 2,
    (2, False, True, False): 2,
    (3, True, True, False): 3,
    (3, False, True, True): 2,
}


@pytest.mark.parametrize(("order", "predictor_pseudo", "corrector", "corrector_pseudo"), ORDERS)
def test_order_of_convergence(order, predictor_pseudo, corrector, corrector_pseudo):
    """With smooth functions that belong to no model: formula (1) holds for any."""
    reached = ORDERS[order, predictor_pseudo, corrector, corrector_pseudo]
    flat = ModelStatistics.data_prediction(VP, intervals=1000)
    rise = 1.0 / (1.0 + np.exp(-2.0 * flat.lam))
    statistics = dataclasses.replace(flat, l=1.0 - 0.8 * rise, s=-0.7 * rise, b=0.4 * rise)
    errors, steps = [], (160, 322)
    for n in steps:
        sampler = dpm_solver_v3(
            VP,
            n,
            statistics=statistics,
            order=order,
            predictor_pseudo=predictor_pseudo,
            corrector=corrector,
            corrector_pseudo=corrector_pseudo,
            lower_order_final=False,
            grid="log_snr",
        )
        end = plain_run(sampler, numpy_mixture, Z16)[-1]
        errors.append(np.sqrt(np.mean((end - MODEL["vp_exact_t_end"]) ** 2)))
    assert sampler.order == reached
    slope = np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0])
    assert slope > reached - 0.2
    if not corrector:  # a corrector of the same order only lowers the constant, by more at first
        assert slope < reached + 0.5


def test_statistics_help():
    """Twenty calls: closer to the exact flow than without knowledge, on the published grid and another."""
    for grid in ("log_snr", "quadratic"):
        errors = {}
        for name in ("known", "data", "noise"):
            statistics = {
                "known": stored_statistics("vp"),
                "data": ModelStatistics.data_prediction(VP),
                "noise": ModelStatistics.noise_prediction(VP),
            }[name]
            sampler = dpm_solver_v3(VP, 20, statistics=statistics, order=1, grid=grid)
            end = plain_run(sampler, numpy_mixture, Z16)[-1]
            errors[name] = np.sqrt(np.mean((end - MODEL["vp_exact_t_end"]) ** 2))
        assert errors["known"] < 0.75 * min(errors["data"], errors["noise"])


@pytest.mark.parametrize("process", (EDM, processes.RectifiedFlow()))
def test_infinite_ends_are_steps_of_ddim(process):
    """sigma = 0 at the end, alpha = 0 at the start: DDIM there, the solver between."""
    statistics = ModelStatistics.data_prediction(process)
    x = Z16 * process.prior_std
    for n in (1, 2, 3, 9):
        ours = dpm_solver_v3(process, n, statistics=statistics, order=1)
        end = plain_run(ours, numpy_mixture, x)[-1]
        expected = plain_run(samplers.ddim(process, n), numpy_mixture, x)[-1]
        np.testing.assert_allclose(end, expected, rtol=0, atol=1e-9)
    options = {"statistics": statistics, "order": 3, "predictor_pseudo": True}
    path = plain_run(dpm_solver_v3(process, 9, **options), numpy_mixture, x)
    point = {k: v[-1] for k, v in dpm_solver_v3(process, 9, **options).xs["point"].items()}
    last = numpy_mixture(path[-2], point)
    np.testing.assert_allclose(path[-1], last, rtol=0, atol=1e-12)


def test_half_corrects_the_later_half_of_time():
    options = {"statistics": stored_statistics("vp"), "grid": "uniform"}

    def table(corrector, **ends):
        sampler = dpm_solver_v3(VP, 6, corrector=corrector, **options, **ends)
        return plain_run(sampler, numpy_mixture, Z16)[-1]

    early, late = {"t_start": 1.0, "t_end": 0.5}, {"t_start": 0.5, "t_end": 0.01}
    np.testing.assert_array_equal(table("half", **late), table(True, **late))
    np.testing.assert_array_equal(table("half", **early), table(False, **early))
    assert np.abs(table(True, **early) - table(False, **early)).max() > 1e-4
    assert np.abs(table(True, **late) - table(False, **late)).max() > 1e-4


def test_any_grid_between_the_nodes():
    """200 uniform times fall between 240 nodes: nothing moves, and the end is the better for it."""
    statistics = stored_statistics("vp")
    sampler = dpm_solver_v3(VP, 200, statistics=statistics, grid="uniform")
    np.testing.assert_allclose(sampler.times, np.linspace(1.0, 1e-3, 201)[:-1], rtol=1e-12)
    end = plain_run(sampler, numpy_mixture, Z16)[-1]
    assert np.abs(end - MODEL["vp_exact_t_end"]).max() < 1e-4
    with pytest.raises(ValueError, match=r"one node.*240 intervals.*snap=False"):
        dpm_solver_v3(VP, 200, statistics=statistics, grid="uniform", snap=True)


def test_official_flags():
    assert official_flags(5) == {
        "predictor_pseudo": True,
        "corrector": True,
        "lower_order_final": False,
    }
    assert [official_flags(n)["corrector"] for n in (6, 8, 9, 10, 11, 25)] == [
        True,
        True,
        False,
        False,
        True,
        True,
    ]
    for n in (3, 9, 20):
        dpm_solver_v3(VP, n, statistics=stored_statistics("vp"), **official_flags(n))


def test_statistics_from_a_file(tmp_path):
    path = tmp_path / "mine.npz"
    stored_statistics("vp").save(path)
    for where in (path, str(path)):
        ours = dpm_solver_v3(VP, 5, statistics=where)
        expected = dpm_solver_v3(VP, 5, statistics=stored_statistics("vp"))
        for a, b in zip(ours.xs["arrays"], expected.xs["arrays"], strict=True):
            np.testing.assert_array_equal(a, b)


def test_mistakes():
    statistics = stored_statistics("vp")

    def ask(match, process=VP, n=5, **options):
        with pytest.raises(ValueError, match=match):
            dpm_solver_v3(process, n, **{"statistics": statistics, **options})

    ask("diffusion_jax statistics", statistics=None)
    ask("order must be one of 1, 2, 3; got 4", order=4)
    ask(
        "corrector must be one of True, False, half; got 'hal'; did you mean 'half'",
        corrector="hal",
    )
    ask("predictor_pseudo must be one of True, False; got 1", predictor_pseudo=1)
    ask("snap", snap="yes")
    ask(r"VP\(.*EDM\(", process=EDM)
    ask(r"beta_max=20.0.*beta_max=12.0", process=processes.VP(beta_max=12.0))
    ask("VPBridge", process=processes.VPBridge())
    ask(r"t = 0.0001, lam = .*cover t = 1 to 0.001", t_end=1e-4)
    ask(r"cover t = 1 to 0.001", t_end=1e-4, snap=True)
    ask("num_steps", n=0)
    short = dataclasses.replace(statistics, lam=statistics.lam - 1.0)
    ask("cover", statistics=short)
    sampler = dpm_solver_v3(VP, 5, statistics=statistics)
    for shape in ((4, 3), (4, 2, 2), (4,)):
        with pytest.raises(ValueError, match=r"shape \(2,\)"):
            sample(sampler, MIXTURE, None, np.zeros(shape, np.float32))
