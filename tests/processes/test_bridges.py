"""Bridges against brute-force Gaussian conditioning, log-densities and the authors' schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import registry
from diffusion_jax.processes import (
    EDM,
    I2SB,
    VE,
    VP,
    BrownianBridge,
    Cosine,
    GmaxBridge,
    HTransform,
    SubVP,
    VEBridge,
    VPBridge,
)

NAMES = registry.names("process", family="bridge")
SMOOTH = {
    "vp_bridge": VPBridge(),
    "vp_bridge_steep": VPBridge(beta_d=8.0, beta_min=0.5),
    "vp_bridge_flat": VPBridge(beta_d=0.0, beta_min=2.0),
    "ve_bridge": VEBridge(),
    "ve_bridge_small": VEBridge(sigma_max=3.0, sigma_min=0.01),
    "brownian_bridge": BrownianBridge(),
    "brownian_bridge_wide": BrownianBridge(scale=2.5),
    "gmax_bridge": GmaxBridge(),
    "sub_vp_bridge": HTransform(SubVP(beta_max=4.0)),
    "geometric_ve_bridge": HTransform(VE(sigma_min=0.1, sigma_max=5.0)),
}
PROCESSES = SMOOTH | {"i2sb": I2SB(), "i2sb_dbim": I2SB(rho_T_excludes_overlap=True)}
each_smooth = pytest.mark.parametrize("name", SMOOTH)
each = pytest.mark.parametrize("name", PROCESSES)


def times(process, count=40):
    early = np.geomspace(process.t_min, 0.5, count)
    late = 1.0 - np.geomspace(1e-6, 0.5, count)
    return np.unique(np.float32(np.concatenate([early, late]))).astype(float)


def test_every_bridge_is_covered():
    covered = {type(process) for process in PROCESSES.values()}
    assert covered == {registry.get("process", name) for name in NAMES}


@each_smooth
def test_pinned_at_both_ends(name):
    process = SMOOTH[name]
    np.testing.assert_allclose([process.a(1.0), process.b(1.0), process.c(1.0)], [1, 0, 0], atol=0)
    np.testing.assert_allclose([process.a(0.0), process.b(0.0), process.c(0.0)], [0, 1, 0], atol=0)
    assert process.lam(0.0) == np.inf and process.lam(1.0) == -np.inf


@each_smooth
def test_inverse_of_lam(name):
    process = SMOOTH[name]
    t = times(process)
    lam = process.lam(t)
    assert (np.diff(lam) < 0).all()
    np.testing.assert_allclose(process.t_of_lam(lam), t, rtol=1e-9)
    np.testing.assert_allclose(lam, np.log(process.b(t) / process.c(t)), rtol=1e-9, atol=1e-12)


def conditioned(process, s, t):
    """Moments of (x_s, x_t) given x0 and x1, from the joint law of the base diffusion.

    Given x0, x_u = alpha_u (x0 + rho_u-Brownian motion): Cov(x_u, x_v) = alpha_u alpha_v rho_min^2.
    Returns the coefficients of x0 and x1 in the mean, `[2]` each, and the covariance `[2, 2]`.
    """
    u = np.array([s, t, 1.0])
    alpha, rho2 = process.alpha(u), process.rho2(u)
    cov = np.outer(alpha, alpha) * np.minimum.outer(rho2, rho2)
    gain = cov[:2, 2] / cov[2, 2]
    return alpha[:2] - gain * alpha[2], gain, cov[:2, :2] - np.outer(gain, cov[:2, 2])


@each_smooth
def test_marginals_are_the_base_diffusion_conditioned_on_its_end(name):
    process = SMOOTH[name]
    for s, t in ((0.05, 0.3), (0.3, 0.31), (0.1, 0.95)):
        of_x0, of_x1, cov = conditioned(process, s, t)
        u = np.array([s, t])
        np.testing.assert_allclose(process.b(u), of_x0, rtol=1e-9)
        np.testing.assert_allclose(process.a(u), of_x1, rtol=1e-9)
        np.testing.assert_allclose(process.c(u) ** 2, np.diag(cov), rtol=1e-9)
        # Markov: x_t = (b_t / b_s) x_s + (..) x1 + noise, from s on to t gives q(x_t | x0, x1)
        step = process.b(t) / process.b(s)
        np.testing.assert_allclose(cov[0, 1], step * process.c(s) ** 2, rtol=1e-9)
        assert process.c(t) ** 2 - step**2 * process.c(s) ** 2 > 0


@each_smooth
def test_base_diffusion_solves_its_sde(name, x64):
    """d alpha / dt = f alpha and d rho^2 / dt = g^2 / alpha^2."""
    process = SMOOTH[name]
    t = jnp.asarray(times(process))
    dalpha = jax.vmap(jax.grad(process.alpha))(t)
    drho2 = jax.vmap(jax.grad(process.rho2))(t)
    np.testing.assert_allclose(dalpha, process.drift(t) * process.alpha(t), rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(
        drho2, process.diffusion_squared(t) / process.alpha(t) ** 2, rtol=1e-9
    )
    np.testing.assert_allclose(process.rho2(t) + process.rho_bar2(t), process.rho2(1.0), rtol=1e-9)


@each_smooth
def test_score_is_that_of_the_base_plus_the_pull_of_the_end(name, x64):
    """grad log q(x | x0, x1) = grad log q(x | x0) + grad log q(x1 | x): Doob's h-transform."""
    process = SMOOTH[name]
    x0, x1 = jnp.array(0.7), jnp.array(-1.3)

    def log_normal(x, mean, variance):
        return -0.5 * (x - mean) ** 2 / variance - 0.5 * jnp.log(variance)

    alpha_end, rho2_end = process.alpha(1.0), process.rho2(1.0)
    for t in (0.02, 0.4, 0.97):
        a, b, c, alpha = process.a(t), process.b(t), process.c(t), process.alpha(t)
        rho2, rho_bar2 = process.rho2(t), process.rho_bar2(t)
        x = a * x1 + b * x0 + 0.8 * c

        def base(x, alpha=alpha, rho2=rho2):
            return log_normal(x, alpha * x0, alpha**2 * rho2)

        def end(x, alpha=alpha, rho2=rho2):
            left = alpha_end**2 * (rho2_end - rho2)
            return log_normal(x1, alpha_end / alpha * x, left)

        pull = process.kernel_score(x, x1, t)
        np.testing.assert_allclose(pull, -(x - alpha / alpha_end * x1) / (alpha**2 * rho_bar2))
        np.testing.assert_allclose(jax.grad(end)(x), pull, rtol=1e-9)
        score = process.score(x, x0, x1, t)
        np.testing.assert_allclose(score, -(x - a * x1 - b * x0) / c**2)
        np.testing.assert_allclose(jax.grad(base)(x) + jax.grad(end)(x), score, rtol=1e-8)


@each_smooth
def test_slopes_and_velocity_are_those_of_the_path_and_of_the_sde(name, x64):
    """a', b', c c' against derivatives; a' x1 + b' x0 - c c' s against f x - g^2 (s / 2 - h)."""
    process = SMOOTH[name]
    t = jnp.asarray(times(process)[5:-5:5])
    slopes = process.slopes(t)
    variance = lambda t: 0.5 * process.c(t) ** 2
    for key, function in (("a", process.a), ("b", process.b), ("cc", variance)):
        scale = np.abs(slopes[key]).max()
        exact = jax.vmap(jax.grad(function))(t)
        np.testing.assert_allclose(slopes[key], exact, rtol=1e-7, atol=1e-9 * scale, err_msg=key)
    x, x0, x1 = jax.random.normal(jax.random.key(0), (3, len(t), 2))
    score, pull = process.score(x, x0, x1, t), process.kernel_score(x, x1, t)
    f, g2 = process.drift(t)[:, None], process.diffusion_squared(t)[:, None]
    expected = f * x - g2 * (0.5 * score - pull)
    got = process.velocity(x, x0, x1, t)
    # the terms are larger than their sum near the ends
    np.testing.assert_allclose(got, expected, atol=1e-7 * float(jnp.abs(g2 * score).max()))
    middle = np.abs(np.asarray(t) - 0.5) < 0.4
    np.testing.assert_allclose(got[middle], expected[middle], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "same, other",
    [
        (HTransform(VP(beta_min=0.1, beta_max=2.1)), VPBridge(beta_d=2.0, beta_min=0.1)),
        (HTransform(EDM(sigma_max=80.0)), VEBridge(sigma_max=80.0)),
        (GmaxBridge(beta_0=4.0, beta_1=4.0), BrownianBridge(scale=2.0)),
    ],
)
def test_one_bridge_by_two_names(same, other):
    t = np.concatenate([np.geomspace(1e-4, 0.5, 20), 1.0 - np.geomspace(1e-4, 0.4, 20)])
    for coefficient in ("a", "b", "c", "rho2", "rho_bar2", "drift", "diffusion_squared"):
        ours, theirs = getattr(same, coefficient)(t), getattr(other, coefficient)(t)
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=coefficient)


def test_bridge_tts_schedules():
    """Their tables, and the asymmetry of gmax: most noise nearer the source, at t > 0.5."""
    g = golden("bridges_tts")
    rate = float(g["beta_1"])
    processes = {
        "gmax": GmaxBridge(float(g["beta_0"]), rate),
        "const": BrownianBridge(scale=rate**0.5),
        "vp": VPBridge(float(g["vp_beta_1"]) - float(g["vp_beta_0"]), float(g["vp_beta_0"])),
    }
    for name, process in processes.items():
        for ours, theirs in (
            (process.alpha, "alpha"),
            (process.rho2, "sigma2"),
            (process.rho_bar2, "sigma2_bar"),
            (process.a, "a"),
            (process.b, "b"),
            (process.c, "c"),
        ):
            expected = g[f"{name}_{theirs}"]
            scale = np.abs(expected).max()
            np.testing.assert_allclose(
                ours(g["t"]), expected, rtol=1e-9, atol=1e-13 * scale, err_msg=f"{name} {theirs}"
            )
    fine = np.linspace(0.0, 1.0, 1001)
    assert fine[processes["gmax"].c(fine).argmax()] > 0.6
    assert fine[processes["const"].c(fine).argmax()] == 0.5


def test_the_ot_ode_of_i2sb_has_no_noise():
    noisy, plain = I2SB(), I2SB(ot_ode=True)
    t = np.linspace(0.0, 1.0, 11)
    assert (plain.c(t) == 0).all() and (noisy.c(t) > 0).all()
    np.testing.assert_array_equal(plain.a(t), noisy.a(t))
    assert (plain.slopes(t)["cc"] == 0).all()


def test_brownian_closed_form():
    t = np.linspace(0.0, 1.0, 21)
    p = BrownianBridge(scale=1.7)
    np.testing.assert_allclose(p.a(t), t, atol=1e-15)
    np.testing.assert_allclose(p.b(t), 1 - t, atol=1e-15)
    np.testing.assert_allclose(p.c(t) ** 2, 1.7**2 * t * (1 - t), atol=1e-15)
    np.testing.assert_allclose(p.diffusion_squared(t), 1.7**2)


@each_smooth
def test_float32_keeps_its_digits_at_both_ends(name):
    process = SMOOTH[name]
    t = times(process)
    functions = ("a", "b", "c", "rho2", "rho_bar2")

    @jax.jit
    def everything(t):
        return {f: getattr(process, f)(t) for f in functions}

    for function, got in everything(jnp.asarray(t, jnp.float32)).items():
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, getattr(process, function)(t), rtol=2e-6, atol=0)


@each
def test_numpy_is_float64_and_equals_jax_in_64_bits(name, x64):
    process = PROCESSES[name]
    t = times(process)
    functions = "alpha rho2 rho_bar2 rho2_T a b c drift diffusion_squared lam".split()
    device = jax.jit(lambda t: {f: getattr(process, f)(t) for f in functions})(jnp.asarray(t))
    for function, got in device.items():
        host = np.asarray(getattr(process, function)(np.float32(t)))
        assert host.dtype == np.float64 and got.dtype == jnp.float64, function
        np.testing.assert_allclose(got, np.broadcast_to(host, got.shape), rtol=1e-12, atol=1e-300)
    point = process.point(0.5)
    assert sorted(point) == ["a", "alpha", "b", "c", "sigma", "t"]
    assert point["alpha"] == process.alpha(0.5)
    np.testing.assert_allclose(point["sigma"], process.alpha(0.5) * process.rho2(0.5) ** 0.5)
    assert [point[k] for k in "abc"] == [process.a(0.5), process.b(0.5), process.c(0.5)]


@each
def test_corrupt_has_the_stated_moments(name):
    process, count = PROCESSES[name], 20_000
    eps = np.random.default_rng(0).standard_normal((count, 2))
    x0, x1 = np.tile([1.0, -2.0], (count, 1)), np.tile([0.3, 0.9], (count, 1))
    t = np.where(np.arange(count) % 2, 0.7, 0.2)
    x = process.corrupt(x0, x1, eps, t)
    for part, at in ((x[::2], 0.2), (x[1::2], 0.7)):
        a, b, c = process.a(at), process.b(at), process.c(at)
        mean = a * np.array([0.3, 0.9]) + b * np.array([1.0, -2.0])
        np.testing.assert_allclose(part.mean(0), mean, atol=4 * c / np.sqrt(len(part)))
        np.testing.assert_allclose(part.var(0), c**2, rtol=4 * np.sqrt(2 / len(part)))


# Official tables


@pytest.mark.parametrize(
    "name, process",
    [
        ("vp", VPBridge(beta_d=2.0, beta_min=0.1)),
        ("ve", VEBridge(sigma_max=80.0)),
        ("i2sb", I2SB(beta_min=0.1, beta_max=1.0, rho_T_excludes_overlap=True)),
    ],
)
def test_schedules_of_the_official_bridge_code(name, process):
    g = golden("processes_bridge")
    clock = process.clock_scale
    t = g[f"{name}_t"] / clock
    np.testing.assert_allclose(process.alpha(t), g[f"{name}_alpha"], atol=1e-12)
    np.testing.assert_allclose(
        process.alpha(t) / process.alpha_T(), g[f"{name}_alpha_bar"], atol=1e-12
    )
    np.testing.assert_allclose(np.sqrt(process.rho2(t)), g[f"{name}_rho"], atol=1e-12)
    np.testing.assert_allclose(np.sqrt(process.rho_bar2(t)), g[f"{name}_rho_bar"], atol=1e-12)
    np.testing.assert_allclose(np.sqrt(process.rho2(1.0)), g[f"{name}_rho_T"], atol=1e-12)
    for coefficient in "abc":
        ours, theirs = getattr(process, coefficient)(t), g[f"{name}_{coefficient}"]
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
    # their f and g^2 are per unit of their clock
    np.testing.assert_allclose(process.drift(t) / clock, g[f"{name}_f"], atol=1e-12)
    unit = 999 if name == "i2sb" else clock  # their table's g^2 is per index
    np.testing.assert_allclose(process.diffusion_squared(t) / unit, g[f"{name}_g2"], rtol=1e-11)


def test_i2sb_normalised_as_by_its_authors():
    g = golden("processes_bridge")
    process = I2SB(beta_min=0.1, beta_max=0.3)
    t = g["official_index"] / 999
    np.testing.assert_allclose(process.a(t), g["official_mu_x1"], atol=2e-7)
    np.testing.assert_allclose(process.b(t), g["official_mu_x0"], atol=2e-7)
    np.testing.assert_allclose(process.c(t), g["official_std_sb"], atol=2e-7)
    np.testing.assert_allclose(np.sqrt(process.rho2(t)), g["official_std_fwd"], atol=2e-7)
    np.testing.assert_allclose(np.sqrt(process.rho_bar2(t)), g["official_std_bwd"], atol=2e-7)
    np.testing.assert_allclose(process.diffusion_squared(t) / 999, g["official_betas"], rtol=1e-6)
    np.testing.assert_allclose(process.a(t) + process.b(t), 1.0, atol=1e-14)


def test_i2sb_overlap_is_the_documented_one():
    process = I2SB(rho_T_excludes_overlap=True)
    t = np.arange(1000) / 999
    excess = process.a(t) + process.b(t) - 1.0
    betas = process.diffusion_squared(t) / 999
    np.testing.assert_allclose(excess, betas / process.rho2(1.0), rtol=1e-9)
    assert 1e-3 < excess.max() < 2e-3


def test_i2sb_looks_up_the_nearest_entry():
    process = I2SB(intervals=10)
    entries = np.array([process.rho2(i / 9) for i in range(10)])
    assert (np.diff(entries) > 0).all()
    assert process.rho2(0.0) == entries[0] and process.rho2(1.0) == entries[-1]
    assert process.rho2(3.4 / 9) == entries[3] and process.rho2(3.6 / 9) == entries[4]
    np.testing.assert_allclose(process.t_of_rho2(entries), np.arange(10) / 9, atol=1e-15)
    np.testing.assert_array_equal(
        jax.jit(process.rho2)(jnp.arange(10) / 9.0), entries.astype(np.float32)
    )


# As pytrees


@each_smooth
def test_numbers_are_leaves_and_sweeping_them_traces_once(name):
    process = SMOOTH[name]
    leaves, tree = jax.tree.flatten(process)
    numbers = getattr(process, "base", process)
    assert len(leaves) == len(dataclasses.fields(numbers))
    traces = []

    @jax.jit
    def at_half(process):
        traces.append(1)
        return process.point(0.5), process.lam(0.5), process.t_of_lam(0.1)

    for p in (process, tree.unflatten([v * 0.9 for v in leaves])):
        exact = p.point(0.5), p.lam(0.5), p.t_of_lam(0.1)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), at_half(p), exact)
    assert len(traces) == 1


@each_smooth
def test_one_traced_number_is_enough_to_trace(name, x64):
    process = SMOOTH[name]
    for field in dataclasses.fields(process):
        value = getattr(process, field.name)
        if field.name in ("t_min", "t_max", "base") or value == 0:
            continue

        def summary(v, field=field):
            changed = dataclasses.replace(process, **{field.name: v})
            return changed.c(0.4) + changed.a(0.3) + changed.t_of_lam(0.1)

        step = 1e-5 * value
        slope = (summary(value + step) - summary(value - step)) / (2 * step)
        np.testing.assert_allclose(jax.grad(summary)(value), slope, rtol=1e-5, atol=1e-9)


def test_a_batch_of_bridges():
    sweep = jax.tree.map(lambda v: v * jnp.array([1.0, 0.5]), VEBridge())
    out = jax.vmap(lambda p: p.c(0.3))(sweep)
    np.testing.assert_allclose(out, [VEBridge().c(0.3), VEBridge(40.0).c(0.3)], rtol=1e-6)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: VPBridge(beta_d=-1.0), "beta_d = -1.0"),
        (lambda: VPBridge(beta_d=0.0, beta_min=0.0), "nor both zero"),
        (lambda: VPBridge(t_min=-0.1), "t_min = -0.1"),
        (lambda: VPBridge(t_max=1.5), "t_max = 1.5"),
        (lambda: VEBridge(sigma_min=100.0), "sigma_min = 100.0"),
        (lambda: VEBridge(t_max=2.0), "t_max = 2.0"),
        (lambda: BrownianBridge(scale=0.0), "scale = 0.0"),
        (lambda: BrownianBridge(t_min=1.0), "t_min = 1.0"),
        (lambda: GmaxBridge(beta_0=-1.0), "beta_0 = -1.0"),
        (lambda: HTransform(Cosine()), "Cosine has"),
        (lambda: HTransform(VPBridge()), "VPBridge is a bridge already"),
        (lambda: HTransform("vp"), "got 'vp'"),
        (lambda: I2SB(intervals=7), "intervals = 7"),
        (lambda: I2SB(beta_min=2.0), "beta_min = 2.0"),
    ],
)
def test_bad_ranges_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
