"""Samplers of bridges against second derivations: quadrature, exact laws, one another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from scipy.integrate import solve_ivp
from solver_checks import (
    AffineBridge,
    affine_law,
    bridges,
    mixture_bridge,
    place_noise,
    plain_run,
)

from diffusion_jax import processes
from diffusion_jax.samplers import (
    Pinned,
    bridge_euler,
    bridge_ode,
    bridge_tts,
    build_sampler,
    dbim,
    ddbm_heun,
    i2sb,
    sample,
    with_noise,
)

BRIDGES = bridges()
CONTINUOUS = [name for name in BRIDGES if name != "i2sb"]
VP, GMAX, SI = processes.VPBridge(), processes.GmaxBridge(), processes.Interpolant()
SOURCE, TARGET = np.array([0.9, -0.5]), np.array([0.2, 0.3])
COVARIANCE = np.array([[0.30, 0.12], [0.12, 0.10]])
EXACT = AffineBridge(SOURCE, TARGET, *np.linalg.eigh(COVARIANCE)).at


def end_point(sampler):
    return {name: v[-1] for name, v in sampler.xs["next"].items()}


def wasserstein(sampler, denoise=EXACT):
    """2-Wasserstein distance of the exact output law to q(x_t | x1) at the last time."""
    mean, covariance = affine_law(sampler, denoise, SOURCE, np.zeros((2, 2)))
    end = end_point(sampler)
    truth = end["b"] ** 2 * COVARIANCE + end["c"] ** 2 * np.eye(2)
    root = _root(truth)
    shift = mean - end["a"] * SOURCE - end["b"] * TARGET
    overlap = _root(root @ covariance @ root)
    squared = (shift**2).sum() + np.trace(truth + covariance - 2.0 * overlap)
    return float(np.sqrt(max(squared, 0.0)))


def _root(matrix):
    values, basis = np.linalg.eigh(matrix)
    return (basis * np.sqrt(np.maximum(values, 0.0))) @ basis.T


# ---------------------------------------------------------------- steps against quadrature


def drift_from_scores(process, t, x, x0, source, kappa):
    """The drift of the SDE with kappa g^2, from the slopes of a, b, c alone."""
    slopes, p = process.slopes(t), process.point(t)
    score = -(x - p["a"] * source - p["b"] * x0) / p["c"] ** 2
    flow = slopes["a"] * source + slopes["b"] * x0 - slopes["cc"] * score
    return flow - 0.5 * kappa * process.diffusion_squared(t) * score


def integrated(process, s, t, x, source, frozen, prediction, kappa):
    """Mean and deviation at t by an adaptive solver, from x at s, with x0 or the base noise frozen."""

    def x0_of(at, x):
        if prediction == "x0":
            return frozen
        alpha, rho = process.alpha(at), np.sqrt(process.rho2(at))
        return (x - alpha * rho * frozen) / alpha

    def slopes(at, state):
        x, variance = state
        drift = [
            drift_from_scores(process, at, v, x0_of(at, v), source, kappa) for v in (x, x + 1.0)
        ]
        noise = kappa * process.diffusion_squared(at)
        return [drift[0], 2.0 * (drift[1] - drift[0]) * variance - noise]

    end = solve_ivp(slopes, (s, t), [x, 0.0], method="DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
    return end[0], np.sqrt(max(end[1], 0.0))


@pytest.mark.parametrize("prediction", ("x0", "noise"))
@pytest.mark.parametrize("kind", ("sde", "ode"))
@pytest.mark.parametrize("name", CONTINUOUS)
def test_a_step_is_the_integral_with_the_prediction_frozen(name, kind, prediction):
    process = BRIDGES[name]
    s, t, low = (float(process.t_of_lam(lam)) for lam in (-1.5, 0.2, 3.0))
    x, source, x0 = 0.7, -0.4, 1.3
    alpha, rho = process.alpha(s), np.sqrt(process.rho2(s))
    frozen = x0 if prediction == "x0" else (x - alpha * x0) / (alpha * rho)
    expected = integrated(process, s, t, x, source, frozen, prediction, float(kind == "sde"))
    sampler = bridge_tts(process, grid=[s, t, low], kind=kind, prediction=prediction)
    ends = [
        plain_run(sampler, lambda x, p: x0, [[x]], np.full((3, 1, 1), z), source=[[source]])
        for z in (0.0, 1.0)
    ]
    assert ends[0][1, 0, 0] == pytest.approx(expected[0], rel=1e-8, abs=1e-8)
    deviation = ends[1][1, 0, 0] - ends[0][1, 0, 0]
    assert deviation == pytest.approx(expected[1], rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("kappa", (0.0, 0.5, 1.0, 3.0))
@pytest.mark.parametrize("name", [*BRIDGES, "interpolant"])
def test_the_drift_of_euler_is_that_of_the_scores(name, kappa):
    """The cancelled form for bridges of SDEs against the slopes of a, b and c."""
    process = BRIDGES.get(name, SI)
    t, t_next = 0.6, 0.55
    sampler = bridge_euler(process, grid=[t, t_next], kappa=kappa, booting="none", denoise=False)
    x, source, x0 = 0.7, -0.4, 1.3
    ends = [
        plain_run(sampler, lambda x, p: x0, [[x]], np.full((2, 1, 1), z), source=[[source]])[-1]
        for z in (0.0, 1.0)
    ]
    drift = drift_from_scores(process, t, x, x0, source, kappa)
    # the table of I2SB has steps: its slopes are those of its entries, to 1e-3
    near = 2e-3 if name == "i2sb" else 1e-9
    assert ends[0].item() == pytest.approx(x + (t_next - t) * drift, abs=near)
    kick = np.sqrt(kappa * process.diffusion_squared(t) * (t - t_next))
    assert (ends[1] - ends[0]).item() == pytest.approx(kick, rel=1e-9, abs=1e-12)


# ---------------------------------------------------------------- equivalences


@pytest.mark.parametrize("name", CONTINUOUS)
def test_what_is_the_same_sampler(name):
    """DBIM at eta = 1 is I2SB and Bridge-TTS's SDE, at eta = 0 Bridge-TTS's ODE, from the boot on.

    Not quite on I2SB's own table, whose rho^2 + rho_bar^2 is not constant; see `test_i2sb_is_dbim_at_eta_one`.
    """
    process = BRIDGES[name]
    grid, rng = [0.97, 0.7, 0.4, 0.13, 0.02], np.random.default_rng(0)
    source, booted = rng.standard_normal((2, 3, 2))
    noise = rng.standard_normal((6, 3, 2))

    def denoise(x, point):
        return 0.5 * np.tanh(x) - 0.2 * point["t"] + 0.3 * source

    def run(sampler, noise):
        if sampler.nfe == 5:  # replaces the boot: its own end is put where the others start
            boot = sampler.xs["next"]["c"][0]
            shown = sampler.xs["next"]
            x0 = denoise(source, {"t": sampler.times[0]})
            z = booted - shown["a"][0] * source - shown["b"][0] * x0
            noise = np.concatenate([noise[:1], (z / boot)[None], noise[1:]])
            return plain_run(sampler, denoise, source, noise)[1:]
        return plain_run(sampler, denoise, booted, noise, source=source)

    noise = noise[:5]
    expected = run(dbim(process, grid=grid, eta=1.0), noise)
    for other in (i2sb(process, grid=grid), bridge_tts(process, grid=grid)):
        np.testing.assert_allclose(run(other, noise), expected, rtol=0, atol=1e-10)
    expected = run(dbim(process, grid=grid), noise)
    ode = bridge_tts(process, grid=grid, kind="ode")
    np.testing.assert_allclose(run(ode, noise), expected, rtol=0, atol=1e-10)


def test_temperature_divides_the_variance():
    cold, plain = bridge_tts(GMAX, 6, temperature=2.0), bridge_tts(GMAX, 6)
    names = [column for column, kind in plain.step.structure.rows[0][1] if kind == "s"]
    ratio = plain.xs["scalars"] / np.where(cold.xs["scalars"] != 0, cold.xs["scalars"], 1.0)
    at = names.index("z")
    np.testing.assert_allclose(ratio[:-1, at] ** 2, 2.0, rtol=1e-12)
    np.testing.assert_allclose(np.delete(ratio, at, 1), 1.0, rtol=1e-12)
    assert cold.xs["scalars"][-1, at] == 0.0


@pytest.mark.parametrize("prediction", ("x0", "noise"))
def test_the_ode_without_a_boot_stays_at_one_answer(prediction):
    """From the source itself the flow has one end: noise enters in an SDE or in the boot only."""
    wide = bridge_tts(VP, 80, prediction=prediction, kind="ode")
    mean, covariance = affine_law(wide, EXACT, SOURCE, np.zeros((2, 2)))
    np.testing.assert_array_equal(covariance, 0.0)
    np.testing.assert_allclose(mean, TARGET, atol=0.02)
    assert wide.order == 1 and not wide.stochastic


def test_dbim_is_the_limit_of_euler():
    """From one booting noise both follow one flow; the distance halves with the step."""
    ends = {
        "t_start": float(VP.t_of_lam(-3.0)),
        "t_end": float(VP.t_of_lam(3.0)),
        "grid": "log_snr",
    }
    source, z = np.array([[0.9, -0.5]]), np.array([[0.4, -1.1]])
    gaps = []
    for n in (101, 201):
        pair = [build(VP, n, booting="given", **ends) for build in (dbim, bridge_ode)]
        assert not any(s.stochastic for s in pair)
        a, b = (plain_run(s, EXACT, z, source=source)[-1] for s in pair)
        gaps.append(np.abs(a - b).max())
    assert gaps[1] < 0.03 and gaps[0] / gaps[1] == pytest.approx(2.0, abs=0.2)


# ---------------------------------------------------------------- orders


@pytest.mark.parametrize(("order", "low", "high"), ((1, 0.9, 1.15), (2, 1.9, 2.15), (3, 2.85, 3.6)))
def test_orders_on_a_mixture(order, low, high):
    """A denoiser that is not affine, on a grid uniform in lam, against the flow by an adaptive solver."""
    stored = golden("bridges_samplers_mixture")
    process = processes.VPBridge(stored["param_beta_d"], stored["param_beta_min"])
    denoise, source = mixture_bridge(stored), stored["xT"]
    first, last = (float(process.t_of_lam(lam)) for lam in (-5.0, 5.0))
    noise = stored["noise"][:1]
    shape = source.shape

    def slopes(t, x):
        x = x.reshape(shape)
        return process.velocity(x, denoise(x, process.point(t)), source, t).ravel()

    errors = []
    for n in (81, 161):
        sampler = dbim(process, n, order=order, grid="log_snr", t_start=first, t_end=last)
        path = plain_run(sampler, denoise, source, place_noise(sampler, noise, (0,)))
        if not errors:
            flow = solve_ivp(
                slopes, (first, last), path[1].ravel(), method="DOP853", rtol=1e-10, atol=1e-12
            )
            exact = flow.y[:, -1].reshape(shape)
        errors.append(np.sqrt(np.mean((path[-1] - exact) ** 2)))
    assert low < np.log2(errors[0] / errors[1]) < high
    assert errors[1] < {1: 2e-2, 2: 3e-4, 3: 2e-5}[order]


def test_the_last_step_of_order_one_matters_on_the_default_grid():
    """Its last step is a large one in lam: a polynomial there is an extrapolation."""
    for order in (2, 3):
        kept, lowered = (
            wasserstein(dbim(VP, 20, order=order, lower_order_final=flag)) for flag in (False, True)
        )
        assert lowered < 0.5 * kept
        assert lowered < 0.7 * wasserstein(dbim(VP, 20))


# ---------------------------------------------------------------- laws


@pytest.mark.parametrize("eta", (0.0, 0.3, 0.8, 1.0))
@pytest.mark.parametrize("name", BRIDGES)
def test_marginals_are_kept_whatever_eta(name, eta):
    """With the true x0 for a prediction every state has the law N(a x1 + b x0, c^2)."""
    x0, size = np.array([0.4, -1.2]), 2
    sampler = dbim(BRIDGES[name], 8, eta=eta)
    count = 1 + size * (sampler.nfe + 1)
    noise = np.zeros((sampler.nfe + 1, count, size))
    for row in range(sampler.nfe + 1):
        noise[row, 1 + size * row : 1 + size * (row + 1)] = np.eye(size)
    path = plain_run(sampler, lambda x, p: x0 + 0 * x, np.tile(SOURCE, (count, 1)), noise)
    shown = sampler.xs["next"]
    last = sampler.nfe - 1 if eta else sampler.nfe  # the last step drops its noise
    for i in range(last):
        states, a, b, c = path[i + 1], *(shown[n][i] for n in "abc")
        np.testing.assert_allclose(states[0], a * SOURCE + b * x0, rtol=0, atol=1e-10)
        responses = states[1:] - states[0]
        covariance = responses.T @ responses
        np.testing.assert_allclose(
            covariance, c**2 * np.eye(size), rtol=0, atol=1e-10 + 1e-9 * c**2
        )


@pytest.mark.parametrize("name", BRIDGES)
def test_the_law_nears_the_truth_with_calls_and_eta_zero_is_nearest(name):
    budgets = (5, 10, 20, 50, 100)
    distances = {
        eta: [wasserstein(dbim(BRIDGES[name], n, eta=eta)) for n in budgets]
        for eta in (0.0, 0.5, 1.0)
    }
    for row in distances.values():
        assert (np.diff(row) < 0).all()
    for at in range(len(budgets)):
        assert distances[0.0][at] < distances[0.5][at] < distances[1.0][at]
    ancestral = [wasserstein(i2sb(BRIDGES[name], n)) for n in budgets]
    assert (np.diff(ancestral) < 0).all()


@pytest.mark.parametrize("name", (*BRIDGES, "interpolant"))
def test_every_diffusion_has_the_same_law(name):
    """SDEs of four strengths, one of them a function of t: Euler converges to q(x_t | x1)."""
    process = BRIDGES.get(name, SI)
    for kappa in (0.5, 1.0, 2.0, lambda t: 1.5 - t):
        coarse, fine = (wasserstein(bridge_euler(process, n, kappa=kappa)) for n in (50, 150))
        assert fine < 0.6 * coarse
        assert fine < 0.03


@pytest.mark.parametrize("name", ("vp_bridge", "gmax_bridge", "brownian_bridge", "interpolant"))
def test_euler_on_the_flow_converges_from_its_boot(name):
    process = BRIDGES.get(name, SI)
    coarse, fine = (wasserstein(bridge_ode(process, n)) for n in (100, 400))
    assert fine < 0.3 * coarse and fine < 0.03


def test_noise_given_by_itself_is_that_of_kappa():
    half = bridge_euler(VP, 20, epsilon=lambda t: 0.35 * float(VP.diffusion_squared(t)))
    other = bridge_euler(VP, 20, kappa=0.7)
    np.testing.assert_allclose(half.xs["scalars"], other.xs["scalars"], rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- the boot's noise, precision, programs


def bend(x, t):
    return 0.5 * jnp.tanh(x) * (1.0 - 0.5 * t) + 0.1


@pytest.mark.parametrize("order", (1, 2, 3))
def test_given_booting_noise_is_the_latent_variable(order):
    source, z = jax.random.normal(jax.random.key(0), (2, 4, 3))
    given = dbim(VP, 8, order=order, booting="given")
    assert not given.stochastic
    end = sample(given, bend, None, Pinned(source, z))
    drawn = dbim(VP, 8, order=order)
    noise = place_noise(drawn, np.asarray(z)[None], (0,))
    expected = sample(with_noise(drawn, noise), bend, None, source)
    np.testing.assert_allclose(end, expected, rtol=0, atol=1e-6)
    program = jax.jit(lambda x: sample(given, bend, None, x)).lower(Pinned(source, z)).as_text()
    assert not any(word in program for word in ("threefry", "rng", "random"))
    # with eta the later steps still draw
    assert dbim(VP, 8, eta=0.5, booting="given").stochastic
    other = sample(given, bend, None, Pinned(source, z + 1.0))
    assert np.abs(np.asarray(other - end)).max() > 1e-3


def test_one_program_for_every_eta_and_order():
    """eta, schedules, grids and a lowered last order are numbers; an order is a structure of its own."""
    traced = []

    def count(x, t):
        traced.append(1)
        return bend(x, t)

    source, key = jnp.ones((2, 3)), jax.random.key(0)

    def run(*args, **options):
        before = len(traced)
        sample(dbim(*args, **options), count, key, source)
        return len(traced) - before

    assert run(VP, 9) > 0
    for eta in (0.3, 0.8, 1.0):
        assert run(VP, 9, eta=eta) == 0
    assert run(GMAX, 9, eta=0.5) == run(processes.I2SB(), 9) == 0
    for order in (2, 3):
        assert run(VP, 9, order=order) > 0
        assert run(processes.VPBridge(1.0), 9, order=order, lower_order_final=False) == 0
        assert run(GMAX, 9, order=order, grid="log_snr") == 0


@pytest.mark.parametrize("name", ("vp_bridge", "ve_bridge", "gmax_bridge", "i2sb", "h_transform"))
def test_float32_keeps_its_digits(name):
    process = BRIDGES[name]
    source = np.random.default_rng(0).standard_normal((4, 2)).astype(np.float32)
    samplers = (
        dbim(process, 12, eta=0.5),
        dbim(process, 12, order=3),
        i2sb(process, 12),
        bridge_tts(process, 12, prediction="noise"),
        bridge_tts(process, 12, kind="ode"),
        bridge_tts(process, 12, kind="ode", prediction="noise"),
        bridge_euler(process, 40),
        bridge_euler(process, 40, kappa=0.3, booting="none"),
        bridge_ode(process, 40),
        ddbm_heun(process, 12),
    )

    def denoise(x, point):
        return (0.5 * np.tanh(x) + 0.1 * point["t"]).astype(x.dtype)

    for case, sampler in enumerate(samplers):
        noise = np.random.default_rng(1).standard_normal((sampler.nfe + 1, 4, 2))
        exact = plain_run(sampler, denoise, source, noise)[-1]
        single = plain_run(sampler, denoise, source, noise.astype(np.float32), np.float32)[-1]
        assert np.abs(single - exact).max() < 1e-6, (case, sampler.name)


# ---------------------------------------------------------------- errors

OT = processes.I2SB(ot_ode=True)
MISTAKES = {
    "order": (lambda: dbim(VP, 9, order=4), "order must be one of 1, 2, 3; got 4"),
    "order 0": (lambda: dbim(VP, 9, order=0), "order must be one of 1, 2, 3; got 0"),
    "eta": (lambda: dbim(VP, 9, eta=-0.1), r"eta must lie in \[0, 1\], got -0.1"),
    "eta and order": (
        lambda: dbim(VP, 9, eta=0.5, order=2),
        "orders 2 and 3 are deterministic: eta must be 0, got 0.5",
    ),
    "eta on an interpolant": (
        lambda: dbim(SI, 9, eta=0.5),
        "eta = 0.5 needs the bridge of an SDE, got Interpolant",
    ),
    "calls": (
        lambda: dbim(VP, 3, order=3),
        "dbim of order 3 needs at least 4 network calls, got num_steps=3",
    ),
    "times": (lambda: dbim(VP, grid=[0.9, 0.1], order=2), "order 2 needs at least 3 network calls"),
    "calls of 2.5": (lambda: dbim(VP, 2.5), "num_steps must be a positive int, got 2.5"),
    "booting": (
        lambda: dbim(VP, 9, booting="drawn"),
        "booting must be one of draw, given; got 'drawn'",
    ),
    "entries": (
        lambda: dbim(processes.I2SB(), 1500),
        "stand on one entry of the schedule of I2SB: take fewer steps or another grid",
    ),
    "close times": (
        lambda: dbim(processes.I2SB(), grid=[0.9, 0.5002, 0.5001, 0.1]),
        "the times 0.5002, 0.5001 stand on one entry",
    ),
    "no noise": (lambda: dbim(OT, 9), r"I2SB has no noise \(c = 0\)"),
    "at the source": (
        lambda: dbim(VP, 9, t_start=1.0),
        r"VPBridge has no noise \(c = 0\) at t = 1",
    ),
    "posterior of an interpolant": (
        lambda: i2sb(SI, 9),
        "i2sb needs the bridge of an SDE, got Interpolant",
    ),
    "tts of an interpolant": (lambda: bridge_tts(SI, 9), "bridge_tts needs the bridge of an SDE"),
    "heun of an interpolant": (lambda: ddbm_heun(SI, 9), "ddbm_heun needs the bridge of an SDE"),
    "kind": (lambda: bridge_tts(VP, 9, kind="pde"), "kind must be one of sde, ode; got 'pde'"),
    "prediction": (
        lambda: bridge_tts(VP, 9, prediction="eps"),
        "prediction must be one of x0, noise; got 'eps'",
    ),
    "temperature": (
        lambda: bridge_tts(VP, 9, temperature=0.0),
        "temperature must be positive and finite, got 0.0",
    ),
    "temperature of the ODE": (
        lambda: bridge_tts(VP, 9, kind="ode", temperature=2.0),
        "the ODE draws no noise: temperature must be 1, got 2.0",
    ),
    "ODE at the source": (
        lambda: bridge_tts(VP, 9, kind="ode", t_start=1.0),
        r"no noise \(c = 0\) at t = 1",
    ),
    "kappa": (lambda: bridge_euler(VP, 9, kappa=-1.0), "kappa must not be negative.* got -1.0"),
    "epsilon": (lambda: bridge_euler(VP, 9, epsilon=lambda t: -t), "epsilon must not be negative"),
    "both": (lambda: bridge_euler(VP, 9, kappa=1.0, epsilon=0.1), "give one of them"),
    "euler without noise": (lambda: bridge_euler(OT, 9), r"I2SB has no noise \(c = 0\)"),
    "boot in one call": (lambda: bridge_ode(VP, 1), "bridge_ode needs at least 2 network calls"),
    "grid": (
        lambda: i2sb(VP, 9, grid="entries"),
        "grid 'entries' needs a process that is a table; VPBridge is none",
    ),
    "entries of a table": (
        lambda: i2sb(processes.I2SB(intervals=10), 12),
        "12 steps do not fit between the entries 9 and 0",
    ),
    "no noise given": (
        lambda: sample(dbim(VP, 3, booting="given"), bend, None, jnp.ones((2, 3))),
        r"booting='given' needs x_init = Pinned\(source, noise\)",
    ),
    "noise for a draw": (
        lambda: sample(
            dbim(VP, 3), bend, jax.random.key(0), Pinned(jnp.ones((2, 3)), jnp.ones((2, 3)))
        ),
        "draws its booting noise: x_init is the source alone",
    ),
    "noise of another shape": (
        lambda: sample(
            dbim(VP, 3, booting="given"), bend, None, Pinned(jnp.ones((2, 3)), jnp.ones((2, 4)))
        ),
        "Pinned: x has shape",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case):
    make, message = MISTAKES[case]
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_by_name():
    for name, calls in (("dbim_2", 7), ("dbim_3", 7), ("bridge_tts_ode", 7), ("bridge_ode", 7)):
        sampler = build_sampler(VP, name, calls)
        assert sampler.nfe == calls and sampler.name == name
    assert build_sampler(VP, "dbim", 7, order=3).order == 3
