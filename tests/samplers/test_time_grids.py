"""Time grids: ends, spacing in the clock they name, infinite ends, and what is refused."""

import numpy as np
import pytest
from golden_files import golden
from solver_checks import bridges

from diffusion_jax import processes, registry
from diffusion_jax.samplers import (
    align_your_steps,
    build_times,
    dpm_solver_pp,
    karras,
    log_snr,
    quadratic,
    uniform,
)

GRIDS = registry.names("time_grid", own_ends=None, any_process=None)
GAUSSIAN = {n: registry.get("process", n)() for n in registry.names("process", family="gaussian")}
BRIDGES = bridges()
PROCESSES = GAUSSIAN | BRIDGES


@pytest.mark.parametrize("name", [n for n in PROCESSES if n != "i2sb"])
@pytest.mark.parametrize("grid", GRIDS)
def test_grids_run_down_from_end_to_end(name, grid):
    """On every process, for every length; I2SB has a table of 1000 times."""
    process = PROCESSES[name]
    start = 0.999 if name in BRIDGES else process.sampling_range[0]
    for n in (1, 2, 3, 10, 200):
        times = build_times(process, n, grid, start)
        assert times.dtype == np.float64 and times.shape == (n + 1,)
        assert (np.diff(times) < 0).all()
        assert (times[0], times[-1]) == (start, process.sampling_range[1])


def test_spacing():
    vp, n = processes.VP(), 8
    np.testing.assert_allclose(np.diff(uniform(vp, n, 1.0, 0.2)), -0.1, rtol=1e-12)
    roots = np.sqrt(quadratic(vp, n, 1.0, 0.04))
    np.testing.assert_allclose(np.diff(roots), -0.1, rtol=1e-12)
    cubes = quadratic(vp, n, 1.0, 0.008, power=3.0) ** (1 / 3)
    np.testing.assert_allclose(np.diff(cubes), -0.1, rtol=1e-12)
    lam = vp.lam(log_snr(vp, n, 1.0, 1e-3))
    np.testing.assert_allclose(np.diff(lam), (lam[-1] - lam[0]) / n, rtol=1e-9)
    levels = vp.noise_level(karras(vp, n, 1.0, 1e-3)) ** (1 / 7)
    np.testing.assert_allclose(np.diff(levels), (levels[-1] - levels[0]) / n, rtol=1e-9)
    lower = vp.noise_level(karras(vp, n, 1.0, 1e-3, rho=3.0)) ** (1 / 3)
    np.testing.assert_allclose(np.diff(lower), (lower[-1] - lower[0]) / n, rtol=1e-9)


def test_karras_of_edm_is_n_points_and_then_zero():
    stored, edm = golden("solvers_kdiff"), processes.EDM(0.03, 14.6)
    for n in (5, 10, 20, 50):
        levels = 14.6 * build_times(edm, n)
        np.testing.assert_allclose(levels, stored[f"sigmas_karras__n{n}"], rtol=1e-11)
        # equal steps of log sigma: the same convention for the last step
        levels = 14.6 * build_times(edm, n, "log_snr")
        np.testing.assert_allclose(levels, stored[f"sigmas_exponential__n{n}"], rtol=1e-11)


def test_infinite_ends_are_kept_and_the_rest_starts_at_the_finite_limit():
    flow = processes.RectifiedFlow(t_min=0.01, t_max=0.98)
    for grid in ("log_snr", "karras"):
        times = build_times(flow, 6, grid)
        assert (times[0], times[-1]) == (1.0, 0.0)
        np.testing.assert_allclose(times[[1, -2]], [0.98, 0.01], rtol=1e-12)
        assert build_times(flow, 1, grid).tolist() == [1.0, 0.0]
        np.testing.assert_allclose(build_times(flow, 2, grid), [1.0, 0.98, 0.0])
    inner = build_times(flow, 4, "log_snr", 0.9, 0.1)
    np.testing.assert_allclose(np.diff(flow.lam(inner)), np.diff(flow.lam(inner))[0], rtol=1e-9)


def test_spacing_of_arctan_and_shifted():
    vp, n = processes.VP(), 8
    angles = np.arctan(vp.noise_level(build_times(vp, n, "arctan")))
    np.testing.assert_allclose(np.diff(angles), (angles[-1] - angles[0]) / n, rtol=1e-9)
    flow = processes.RectifiedFlow()
    t = build_times(flow, n, {"name": "shifted", "shift": 3.0})
    np.testing.assert_allclose(t, 3 * (s := np.linspace(1, 0, n + 1)) / (1 + 2 * s), atol=1e-15)
    np.testing.assert_array_equal(t, build_times(flow, n, "shifted"))
    np.testing.assert_allclose(
        build_times(flow, n, {"name": "shifted", "shift": 1.0}, 0.9, 0.1),
        uniform(flow, n, 0.9, 0.1),
    )


def test_leading_and_trailing_labels():
    """Of a model with 1000 labels: leading never sees 999, trailing starts there; both end clean."""
    process = processes.discrete_vp()
    labels = {g: np.round(1000 * build_times(process, 10, g)) - 1 for g in ("leading", "trailing")}
    assert labels["leading"].tolist() == [*range(900, -1, -100), -1]
    assert labels["trailing"].tolist() == [*range(999, -1, -100), -1]
    stored = golden("solvers_ddim")["seq_uniform__n10"]
    np.testing.assert_array_equal(labels["leading"][:-1], stored[::-1])
    respaced = np.round(1000 * build_times(process, 250, "respaced")) - 1
    # guided-diffusion's space_timesteps(1000, "250"): 0, 4.01, 8.02, ... 999, rounded
    assert respaced[-1] == -1 and respaced[:3].tolist() == [999, 995, 991]
    assert respaced[::-1][1:5].tolist() == [0, 4, 8, 12] and 500 not in respaced and 502 in respaced
    assert build_times(process, 1, "respaced").tolist() == [0.001, 0.0]
    for grid, n in (("leading", 15), ("trailing", 15), ("trailing", 7), ("respaced", 7)):
        times = build_times(process, n, grid)
        assert len(times) == n + 1 and times[-1] == 0.0
        np.testing.assert_allclose(1000 * times, np.round(1000 * times), atol=1e-9)
    with pytest.raises(ValueError, match="60 steps do not fit into 50 training labels"):
        build_times(processes.VP(), 60, {"name": "leading", "train_steps": 50})
    assert dpm_solver_pp(process, 9, order=3, variant="singlestep", grid="trailing").nfe == 9


@pytest.mark.parametrize("model", ("sd15", "sdxl", "deepfloyd_if", "svd"))
def test_align_your_steps(model):
    stored = golden("solvers_schedules")
    name = {"deepfloyd_if": "if1"}.get(model, model)
    edm = processes.EDM(sigma_min=1e-3, sigma_max=1000.0)
    for n, key in ((10, ""), (5, "_loginterp6"), (19, "_loginterp20")):
        levels = 1000.0 * build_times(edm, n, {"name": "align_your_steps", "model": model})
        np.testing.assert_allclose(levels, stored[f"ays_{name}{key}"], rtol=1e-12)


def test_align_your_steps_needs_a_process_that_reaches_its_levels():
    with pytest.raises(ValueError, match=r"'svd' table spans noise levels 700 to 0.002; .* 80 to"):
        build_times(processes.EDM(), 10, {"name": "align_your_steps", "model": "svd"})
    with pytest.raises(ValueError, match=r"model must be one of sd15, .*; got 'sd2'"):
        align_your_steps(processes.VP(), 10, 1.0, 0.0, model="sd2")


def test_grids_of_ones_own():
    vp = processes.VP()
    times = build_times(vp, 3, lambda process, n, first, last: np.geomspace(first, last, n + 1))
    np.testing.assert_allclose(times, [1.0, 0.1, 0.01, 0.001], rtol=1e-12)
    given = build_times(vp, None, [1.0, 0.5, 0.0])
    assert given.tolist() == [1.0, 0.5, 0.0]
    assert build_times(vp, 2, (1.0, 0.5, 0.0)).tolist() == given.tolist()


def test_single_step_solvers_share_the_spacing():
    stored = golden("solvers_dpm_vp")
    for grid, name in (("logSNR", "log_snr"), ("time_quadratic", "quadratic")):
        times = build_times(processes.VP(), 20, name, 1.0, 1e-3)
        np.testing.assert_allclose(times, stored[f"grid__{grid}__n20"], rtol=1e-11)


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((0,), "num_steps must be a positive int, got 0"),
        ((-3,), "num_steps must be a positive int, got -3"),
        ((2.5,), "num_steps must be a positive int, got 2.5"),
        ((None,), "num_steps must be a positive int, got None"),
        ((5, "logsnr"), "unknown time_grid 'logsnr'; did you mean 'log_snr'.*valid: .*uniform"),
        ((5, "uniform", 0.2, 0.8), "need 0 <= t_end < t_start <= 1, got t_start=0.2, t_end=0.8"),
        ((5, "uniform", 1.5), "need 0 <= t_end < t_start <= 1"),
        ((5, "uniform", 1.0, -0.1), "need 0 <= t_end < t_start <= 1"),
        ((None, [1.0, 0.5, 0.5, 0.0]), r"decrease strictly: times\[1:3\] = \[0.5 0.5\]"),
        ((None, [0.0, 0.5, 1.0]), r"decrease strictly: times\[0:2\] = \[0.  0.5\]"),
        ((None, [1.2, 0.5]), r"must lie in \[0, 1.0\], the range of VP; got 1.2"),
        ((None, [0.5, -0.2]), r"must lie in \[0, 1.0\], the range of VP; got 0.5 to -0.2"),
        ((5, {"name": "karras", "roh": 3}), "'karras' has no option 'roh'; did you mean 'rho'"),
        ((5, {"rho": 3.0}), "given as a mapping needs a 'name'"),
        ((5, {"name": "shifted", "shift": -1.0}), "shift must be positive, got -1"),
        ((5, [1.0, 0.0]), "5 steps need 5 . 1 times, got shape"),
        ((None, [1.0]), "times, got shape"),
        ((2, [[1.0, 0.5, 0.0]]), "times, got shape"),
        ((3, lambda p, n, a, b: np.linspace(a, b, n)), "3 steps need 3 . 1 times"),
        ((None, [1.0, np.nan, 0.0]), "decrease strictly"),
    ),
)
def test_bad_grids_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build_times(processes.VP(), *arguments)


def test_a_grid_beyond_the_last_noise_level_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 0.9946\], the range of Cosine; got 1.0"):
        build_times(processes.Cosine(), None, [1.0, 0.5, 0.1])


def test_options_of_a_named_grid():
    vp = processes.VP()
    np.testing.assert_array_equal(
        build_times(vp, 6, {"name": "karras", "rho": 3.0}),
        karras(vp, 6, *vp.sampling_range, rho=3.0),
    )
