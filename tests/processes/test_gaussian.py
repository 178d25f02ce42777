"""Gaussian processes against their own SDEs, closed forms and the authors' schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import processes, registry
from diffusion_jax.processes import (
    EDM,
    VE,
    VP,
    ContinuousBFN,
    Cosine,
    LinearLogSNR,
    RectifiedFlow,
    SubVP,
    discrete_vp,
)
from diffusion_jax.samplers import time_grids

NAMES = registry.names("process", family="gaussian")
VARIANTS = {
    "bfn_continuous": ContinuousBFN(min_variance=1e-3, eta=0.05),
    "vp": VP(beta_min=0.4, beta_max=9.0, t_min=1e-4),
    "sub_vp": SubVP(beta_min=0.4, beta_max=9.0),
    "cosine": Cosine(s=0.03, t_max=0.98),
    "ve": VE(sigma_min=0.03, sigma_max=7.0),
    "edm": EDM(sigma_min=0.01, sigma_max=20.0),
    "rectified_flow": RectifiedFlow(t_min=1e-4, t_max=0.9999),
    "linear_log_snr": LinearLogSNR(gamma_min=-8.0, gamma_max=4.5),
    "discrete_vp": discrete_vp("scaled_linear", 128, 1e-3, 0.2),
}
PROCESSES = {name: registry.get("process", name)() for name in NAMES}
PROCESSES |= {f"{name}_variant": process for name, process in VARIANTS.items()}
FUNCTIONS = (
    "alpha log_alpha sigma dalpha dsigma lam log_snr drift diffusion_squared noise_level".split()
)

each_process = pytest.mark.parametrize("name", PROCESSES)


def times(process, count=60):
    """Times crowded at both ends of [t_min, t_max], exact in float32."""
    low, high = max(process.t_min, 1e-4), process.t_max
    early = np.geomspace(low, 0.5 * high, count)
    late = high - np.geomspace(1e-6 * high, 0.5 * high, count)
    t = np.unique(np.float32(np.clip(np.concatenate([early, late]), low, high))).astype(float)
    if hasattr(process, "num_train_steps"):  # at the knots of log alpha a derivative has two sides
        steps = t * process.num_train_steps
        t = t[np.abs(steps - np.round(steps)) > 1e-4]
    return t


def test_every_process_is_covered():
    assert set(VARIANTS) == set(NAMES)


@each_process
def test_inverses(name):
    process = PROCESSES[name]
    t = times(process)
    np.testing.assert_allclose(process.t_of_lam(process.lam(t)), t, rtol=1e-10)
    np.testing.assert_allclose(process.t_of_noise_level(process.noise_level(t)), t, rtol=1e-10)
    assert (np.diff(process.lam(t)) < 0).all()


@each_process
def test_derivatives_are_those_of_alpha_and_sigma(name, x64):
    process = PROCESSES[name]
    t = times(process)
    slopes = jax.jit(jax.vmap(lambda s: (jax.grad(process.alpha)(s), jax.grad(process.sigma)(s))))
    dalpha, dsigma = slopes(jnp.asarray(t))
    np.testing.assert_allclose(dalpha, process.dalpha(t), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(dsigma, process.dsigma(t), rtol=1e-9)


@pytest.mark.parametrize("name", [n for n in PROCESSES if "discrete" not in n])  # quadrature
def test_forward_sde_carries_one_marginal_into_the_next(name):
    """Solving dx = f x dt + g dw from s to t on top of q(s | 0) must give q(t | 0)."""
    process = PROCESSES[name]
    knots = np.concatenate(
        [
            np.geomspace(max(process.t_min, 1e-4), 0.4 * process.t_max, 40),
            process.t_max * (1.0 - np.geomspace(0.6, 1e-3, 40))[1:],
        ]
    )
    nodes, weights = np.polynomial.legendre.leggauss(20)
    s, t = knots[:-1, None], knots[1:, None]
    u = 0.5 * (s + t) + 0.5 * (t - s) * nodes
    w = 0.5 * (t - s) * weights
    growth = np.exp((w * process.drift(u)).sum(axis=1))  # of the mean, over each interval
    np.testing.assert_allclose(
        growth, process.alpha(knots[1:]) / process.alpha(knots[:-1]), rtol=1e-8
    )
    added = (w * process.diffusion_squared(u) * (process.alpha(t) / process.alpha(u)) ** 2).sum(1)
    composed = growth**2 * process.sigma(knots[:-1]) ** 2 + added
    np.testing.assert_allclose(composed, process.sigma(knots[1:]) ** 2, rtol=1e-8)
    assert (process.diffusion_squared(knots) > 0).all()


def test_diffusion_has_the_form_written_in_the_papers():
    t = np.linspace(0.01, 0.97, 25)
    vp, sub = PROCESSES["vp_variant"], PROCESSES["sub_vp_variant"]
    beta, total = 0.4 + 8.6 * t, 0.4 * t + 4.3 * t**2
    np.testing.assert_allclose(vp.diffusion_squared(t), beta, rtol=1e-12)
    np.testing.assert_allclose(sub.diffusion_squared(t), beta * -np.expm1(-2.0 * total), rtol=1e-12)
    ve, edm = PROCESSES["ve_variant"], PROCESSES["edm_variant"]
    np.testing.assert_allclose(
        ve.diffusion_squared(t), 2 * ve.sigma(t) ** 2 * np.log(7.0 / 0.03), rtol=1e-12
    )
    np.testing.assert_allclose(edm.diffusion_squared(t), 2 * 20.0**2 * t, rtol=1e-12)
    flow = PROCESSES["rectified_flow"]
    np.testing.assert_allclose(flow.diffusion_squared(t), 2 * t / (1 - t), rtol=1e-12)
    for p in (vp, PROCESSES["cosine"], sub):  # finite where the noise begins
        assert np.isfinite(p.diffusion_squared(0.0)) and np.isfinite(p.drift(0.0))
    for p in (vp, sub):
        np.testing.assert_allclose(p.drift(t), -0.5 * beta, rtol=1e-12)


def test_cosine_is_the_published_ratio_of_cosines():
    t = np.linspace(0.002, 0.99, 50)
    for s in (0.008, 0.03):
        ratio = np.cos((t + s) / (1 + s) * np.pi / 2) / np.cos(s / (1 + s) * np.pi / 2)
        np.testing.assert_allclose(Cosine(s=s).alpha(t), ratio, rtol=1e-12)


@each_process
def test_numpy_is_float64_and_equals_jax_in_64_bits(name, x64):
    process = PROCESSES[name]
    t = times(process)
    device = jax.jit(lambda t: {f: getattr(process, f)(t) for f in FUNCTIONS})(jnp.asarray(t))
    for function, got in device.items():
        host = getattr(process, function)(t.astype(np.float32))
        assert not isinstance(host, jax.Array) and host.dtype == np.float64, function
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, host, rtol=1e-12, atol=1e-300, err_msg=function)
    assert np.asarray(process.sigma(0.5)).dtype == np.float64
    assert np.shape(process.alpha(0.5)) == ()


@each_process
def test_float32_keeps_its_digits_at_both_ends(name):
    process = PROCESSES[name]
    t = times(process)

    @jax.jit
    def everything(t):
        return {f: getattr(process, f)(t) for f in FUNCTIONS}

    for function, got in everything(jnp.asarray(t, jnp.float32)).items():
        assert got.dtype == jnp.float32
        exact = getattr(process, function)(t)
        scale = np.maximum(np.abs(exact), 1.0 if function in ("lam", "log_snr") else 0.0)
        error = np.abs(np.asarray(got, float) - exact) / np.where(scale == 0, 1.0, scale)
        assert error.max() <= 1e-5, (function, t[error.argmax()], error.max())


@each_process
def test_point_holds_the_schedule(name):
    process = PROCESSES[name]
    point = process.point([0.25, 0.5])
    assert sorted(point) == ["alpha", "dalpha", "dsigma", "sigma", "t"]
    for key in ("alpha", "sigma", "dalpha", "dsigma"):
        np.testing.assert_array_equal(point[key], getattr(process, key)(np.array([0.25, 0.5])))


@pytest.mark.parametrize("name", NAMES)
def test_corrupt_has_the_stated_moments(name):
    process = PROCESSES[name]
    count = 20_000
    t = np.full(count, 0.6 * process.t_max)
    t[::2] = 0.05
    eps = np.random.default_rng(0).standard_normal((count, 2))
    x = process.corrupt(np.tile([1.5, -0.5], (count, 1)), eps, t)
    for part, at in ((x[::2], 0.05), (x[1::2], float(t[1]))):
        alpha, sigma = process.alpha(at), process.sigma(at)
        error = 4.0 * sigma / np.sqrt(len(part))
        np.testing.assert_allclose(part.mean(0), alpha * np.array([1.5, -0.5]), atol=error)
        np.testing.assert_allclose(part.var(0), sigma**2, rtol=4.0 * np.sqrt(2.0 / len(part)))


def test_corrupt_broadcasts_times_over_any_data():
    process = VP()
    x0, eps = np.ones((3, 4, 4, 2)), np.full((3, 4, 4, 2), 2.0)
    t = np.array([0.1, 0.5, 0.9])
    x = process.corrupt(x0, eps, t)
    for i in range(3):
        expected = process.alpha(t[i]) + 2.0 * process.sigma(t[i])
        np.testing.assert_allclose(x[i], expected, rtol=1e-12)
        np.testing.assert_allclose(process.corrupt(x0, eps, t[i])[i], expected, rtol=1e-12)


@each_process
def test_prior_is_as_wide_as_the_process_ends(name):
    process = PROCESSES[name]
    start = process.sigma(process.sampling_range[0])
    assert process.prior_std == pytest.approx(start, rel=0.01)


@pytest.mark.parametrize("process", [VP(), VE()], ids=["vp", "ve"])
def test_prior_is_standard_normal_times_its_width(process):
    draw = jax.jit(lambda key: process.prior(key, (5_000, 3)))
    draws = np.asarray(draw(jax.random.key(1))) / process.prior_std
    assert draws.shape == (5_000, 3) and draws.dtype == np.float32
    assert draws.std() == pytest.approx(1.0, abs=4 / np.sqrt(2 * draws.size))
    assert draws.mean() == pytest.approx(0.0, abs=4 / np.sqrt(draws.size))


def test_prior_of_an_example_depends_on_its_index_alone():
    process, key = VE(), jax.random.key(3)
    rows = np.array([7, 2, 9])
    whole = np.asarray(jax.jit(lambda key: process.prior(key, (10, 4, 4, 1)))(key))
    part = jax.jit(lambda key, index: process.prior(key, (3, 4, 4, 1), index=index))(key, rows)
    np.testing.assert_allclose(part, whole[rows], rtol=1e-6)
    assert len(np.unique(whole)) == whole.size
    low = jax.eval_shape(lambda key: process.prior(key, (2, 3), dtype=jnp.bfloat16), key)
    assert low.dtype == jnp.bfloat16


# Official tables


@pytest.mark.parametrize("schedule, process", [("vp_linear", VP()), ("vp_cosine", Cosine())])
def test_schedules_and_grids_of_the_official_solvers(schedule, process):
    g = golden("processes_gaussian")
    t = g[f"{schedule}_t"]
    np.testing.assert_allclose(process.log_alpha(t), g[f"{schedule}_log_alpha"], atol=1e-12)
    np.testing.assert_allclose(process.sigma(t), g[f"{schedule}_sigma"], atol=1e-12)
    np.testing.assert_allclose(process.lam(t), g[f"{schedule}_lambda"], atol=1e-11)
    inverse = process.t_of_lam(g[f"{schedule}_lambda"])
    np.testing.assert_allclose(inverse, g[f"{schedule}_t_from_lambda"], atol=1e-11)
    for ours, theirs in (
        ("log_snr", "logSNR"),
        ("uniform", "time_uniform"),
        ("quadratic", "time_quadratic"),
    ):
        grid = time_grids.build_times(process, 10, ours)
        np.testing.assert_allclose(grid, g[f"{schedule}_grid_{theirs}_n10"], atol=1e-10)


@pytest.mark.parametrize("sde, process", [("vp", VP()), ("subvp", SubVP()), ("ve", VE())])
def test_sdes_of_score_sde(sde, process):
    g = {k: golden("processes_gaussian")[f"sde_{sde}_{k}"] for k in "t drift diff mean std".split()}
    t = g["t"]
    np.testing.assert_allclose(process.drift(t), g["drift"], rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(np.sqrt(process.diffusion_squared(t)), g["diff"], rtol=1e-10)
    np.testing.assert_allclose(process.alpha(t), g["mean"], rtol=1e-12)
    np.testing.assert_allclose(process.sigma(t), g["std"], rtol=1e-10)


# As pytrees


@each_process
def test_numbers_are_leaves_and_sweeping_them_traces_once(name):
    process = PROCESSES[name]
    leaves, tree = jax.tree.flatten(process)
    assert len(leaves) == len(dataclasses.fields(process))
    traces = []

    @jax.jit
    def at_half(process):
        traces.append(1)
        return {
            "point": process.point(0.5),
            "lam": process.lam(0.5),
            "t": process.t_of_lam(0.1),
            "g2": process.diffusion_squared(0.5),
            "u": process.t_of_noise_level(0.5),
        }

    swept = tree.unflatten([v * 0.9 for v in leaves])
    for p in (process, swept):
        out = at_half(p)
        exact = {"point": p.point(0.5), "lam": p.lam(0.5), "t": p.t_of_lam(0.1)}
        exact |= {"g2": p.diffusion_squared(0.5), "u": p.t_of_noise_level(0.5)}
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), out, exact)
    assert len(traces) == 1


@pytest.mark.parametrize("name", NAMES)
def test_one_traced_number_is_enough_to_trace(name, x64):
    """Differentiating in a single field, at a time known on the host, agrees with differences."""
    process = PROCESSES[name]
    for field in dataclasses.fields(process):
        if field.name in ("t_min", "t_max") or np.ndim(getattr(process, field.name)):
            continue
        value = getattr(process, field.name)

        def noise_level(v, field=field):
            changed = dataclasses.replace(process, **{field.name: v})
            return changed.noise_level(0.4) + changed.t_of_lam(0.3)

        step = 1e-5 * (value or 1.0)
        slope = (noise_level(value + step) - noise_level(value - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(noise_level)(value), slope, rtol=1e-5, atol=1e-9)


def test_a_batch_of_processes():
    sweep = jax.tree.map(lambda v: v * jnp.array([1.0, 0.8]), VP())
    out = jax.vmap(lambda p: p.sigma(0.3))(sweep)
    beta = VP(beta_min=0.08, beta_max=16.0)
    np.testing.assert_allclose(out, [VP().sigma(0.3), beta.sigma(0.3)], rtol=1e-5)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: VP(beta_min=-1.0), "beta_min = -1.0"),
        (lambda: VP(beta_max=0.05), "beta_max = 0.05"),
        (lambda: VP(t_min=0.0), "t_min = 0.0"),
        (lambda: VP(t_max=1.5), "t_max = 1.5"),
        (lambda: SubVP(beta_min=30.0), "SubVP: beta_max"),
        (lambda: Cosine(s=-0.1), "s = -0.1"),
        (lambda: Cosine(t_max=1.0), "t_max = 1.0"),
        (lambda: Cosine(t_min=-0.5), "t_min = -0.5"),
        (lambda: VE(sigma_min=60.0), "sigma_min = 60.0"),
        (lambda: VE(t_min=2.0), "t_min = 2.0"),
        (lambda: EDM(sigma_min=0.0), "sigma_min = 0.0"),
        (lambda: RectifiedFlow(t_min=0.0), "t_min = 0.0"),
        (lambda: RectifiedFlow(t_max=1.0), "t_max = 1.0"),
    ],
)
def test_bad_ranges_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_sampling_ranges_and_ends():
    for process in (EDM(), RectifiedFlow()):
        assert process.sampling_range == (1.0, 0.0)
        assert process.sigma(0.0) == 0.0 and process.alpha(0.0) == 1.0
        assert process.lam(0.0) == np.inf
    assert RectifiedFlow().lam(1.0) == -np.inf
    assert VP().sampling_range == (1.0, 1e-3)
    assert EDM().t_min == pytest.approx(0.002 / 80.0)
    assert EDM().sigma(EDM().t_min) == pytest.approx(0.002)
    assert VE().sigma(0.0) == pytest.approx(0.01) and VE().sigma(1.0) == pytest.approx(50.0)
    assert isinstance(VP(), processes.GaussianProcess)
