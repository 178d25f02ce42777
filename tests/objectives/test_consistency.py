"""Consistency training: pairs, gaps, distances, gradients, on models with exact answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import oracles
from diffusion_jax.guidance import bridge_consistency, bridge_ode_map
from diffusion_jax.objectives import consistency as pieces
from diffusion_jax.processes import VP, VEBridge, VPBridge

PROCESSES = {"vp": VPBridge(), "ve": VEBridge()}


@pytest.mark.parametrize("name", PROCESSES)
def test_golden_pairs(name, x64):
    g, process = golden("bridges_cdbm"), PROCESSES[name]
    pair = pieces.training_pair(lambda eps, t: process.corrupt(g["x0"], g["xT"], eps, t))
    for i, (t, r) in enumerate(g[f"{name}_pairs"] / process.clock_scale):
        x, x_r = pair(g["z"], t, r)
        for got, wanted in ((x, g[f"{name}_xt"][i]), (x_r, g[f"{name}_xr_cbt"][i])):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.parametrize("name", PROCESSES)
def test_golden_distillation_pairs(name, x64):
    g, process = golden("bridges_cdbm"), PROCESSES[name]
    problem = (g[n] for n in ("m0", "mT", "S00", "S0T", "STT"))
    denoise = oracles.GaussianBridge(process, g["xT"], *problem)
    pair = pieces.distillation_pair(
        lambda eps, t: process.corrupt(g["x0"], g["xT"], eps, t),
        bridge_ode_map(denoise, process, g["xT"]),
    )
    for i, (t, r) in enumerate(g[f"{name}_pairs"] / process.clock_scale):
        wanted = g[f"{name}_xr_ode1"][i]
        got = pair(g["z"], t, r)[1]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


@pytest.mark.parametrize("name", PROCESSES)
def test_the_training_pair_is_the_teachers_step_in_expectation(name, x64):
    """E[x_r | x_t, x1] by regression on the joint Gaussian of x_t and x_r."""
    g, process = golden("bridges_cdbm"), PROCESSES[name]
    mean = g["m0"] + (g["xT"] - g["mT"]) @ g["G"].T
    for i, (t, r) in enumerate(g[f"{name}_pairs"] / process.clock_scale):
        p, q = process.point(t), process.point(r)
        total = p["b"] ** 2 * g["Sc"] + p["c"] ** 2 * np.eye(3)
        cross = p["b"] * q["b"] * g["Sc"] + p["c"] * q["c"] * np.eye(3)
        centred = g[f"{name}_xt"][i] - p["a"] * g["xT"] - p["b"] * mean
        expected = q["a"] * g["xT"] + q["b"] * mean + centred @ np.linalg.solve(total, cross)
        wanted = g[f"{name}_xr_ode1"][i]
        np.testing.assert_allclose(expected, wanted, rtol=0, atol=1e-11 * np.abs(wanted).max())


# A scalar bridge whose conditional law of x0 is N(0.4, 0.5^2), and 24 x 24 Gauss-Hermite nodes of (x0, eps).
VP_BRIDGE, SOURCE, MEAN, SPREAD = VPBridge(), -0.8, 0.4, 0.5


@functools.cache
def nodes():
    z, w = np.polynomial.hermite_e.hermegauss(24)
    x0, eps = (v.reshape(-1, 1) for v in np.meshgrid(MEAN + SPREAD * z, z))
    return x0, eps, np.outer(w, w).reshape(-1) / w.sum() ** 2


def scalar_denoise(x, point):
    a, b, c = (jnp.reshape(point[n], (-1, 1)) for n in "abc")
    gain = b * SPREAD**2 / (b**2 * SPREAD**2 + c**2)
    return MEAN + gain * (x - a * SOURCE - b * MEAN)


class Teacher:
    """The exact denoiser of the scalar bridge."""

    at = staticmethod(scalar_denoise)

    def __call__(self, x, t):
        return scalar_denoise(x, VP_BRIDGE.point(t))


class Student:
    """A network that is not exact, smooth in x and t."""

    def __init__(self, params):
        self.params = params

    def at(self, x, point):
        p = self.params
        t = jnp.reshape(point["t"], (-1, 1))
        return p[0] * jnp.tanh(p[1] * x + p[2]) + p[3] * t * x + p[4]

    def __call__(self, x, t):
        return self.at(x, VP_BRIDGE.point(t))


PARAMS = np.array([0.7, 0.9, 0.1, 0.2, 0.15])


def expected_loss(params, target, t, gap, distils, order=1, distance="squared_l2"):
    """The loss integrated over x0 and eps."""
    x0, eps, weights = (jnp.asarray(v) for v in nodes())
    source = jnp.full_like(x0, SOURCE)
    corrupt = lambda _, t: VP_BRIDGE.corrupt(x0, source, eps, t)
    pair = pieces.training_pair(corrupt)
    if distils:
        step = bridge_ode_map(Teacher(), VP_BRIDGE, source, order)
        pair = pieces.distillation_pair(corrupt, step)
    losses, _ = pieces.consistency(
        VP_BRIDGE,
        bridge_consistency(Student(params), VP_BRIDGE, source),
        bridge_consistency(Student(target), VP_BRIDGE, source),
        pair,
        jax.random.key(0),
        x0,
        gap=lambda t, step, t_end: t - gap,
        weight="constant",
        distance=distance,
        times=lambda process, key, index, total: (jnp.full(index.shape, t), None),
    )
    return (weights * losses).sum()


@pytest.mark.parametrize("t", [0.9, 0.5])
def test_gradients_of_training_and_distillation_agree_to_first_order(t, x64):
    """The gradients are O(gap), their difference O(gap^2)."""
    slope = jax.jit(jax.grad(expected_loss), static_argnums=4)
    gaps = np.array([0.04, 0.02, 0.01])
    both = [[slope(PARAMS, PARAMS, t, gap, d) for gap in gaps] for d in (False, True)]
    size = np.linalg.norm(both[1], axis=1)
    apart = np.linalg.norm(np.subtract(*both), axis=1)
    np.testing.assert_allclose(np.diff(np.log2(size)), -1.0, atol=0.2)
    np.testing.assert_allclose(np.diff(np.log2(apart)), -2.0, atol=0.35)
    assert apart[-1] < 0.1 * size[-1]


def test_no_gradient_reaches_the_target(x64):
    for distils in (False, True):
        slopes = jax.grad(expected_loss, argnums=(0, 1))(PARAMS, PARAMS, 0.6, 0.1, distils)
        assert np.abs(slopes[0]).max() > 1e-4
        np.testing.assert_array_equal(slopes[1], 0.0)
        # one array for both: the student's gradient alone
        tied = jax.grad(lambda p, d: expected_loss(p, p, 0.6, 0.1, d))(PARAMS, distils)
        np.testing.assert_allclose(tied, slopes[0], rtol=1e-12)


class Ideal:
    """The x0_hat with which the consistency function is the exact map to t_min: linear in x."""

    def at(self, x, point):
        a, b, c = (jnp.reshape(point[n], (-1, 1)) for n in "abc")
        end = VP_BRIDGE.point(VP_BRIDGE.t_min)
        total = lambda b, c: b**2 * SPREAD**2 + c**2
        centred = x - a * SOURCE - b * MEAN
        moved = jnp.sqrt(total(end["b"], end["c"]) / total(b, c)) * centred
        h, k = end["a"] * SOURCE + end["b"] * MEAN + moved, end["c"] / c
        return (h - k * x - (end["a"] - k * a) * SOURCE) / (end["b"] - k * b)

    def __call__(self, x, t):
        return self.at(x, VP_BRIDGE.point(t))


@pytest.mark.parametrize(("order", "power"), [(1, 4.0), (2, 6.0)])
def test_the_exact_function_has_no_distillation_loss_in_the_limit(order, power, x64, monkeypatch):
    """Squared error O(gap^(2 order + 2)): below rounding of any network soon."""
    monkeypatch.setitem(globals(), "Student", lambda params: Ideal())
    gaps = np.array([0.04, 0.02, 0.01])
    losses = [float(expected_loss(None, None, 0.6, gap, True, order)) for gap in gaps]
    assert losses[-1] < 1e-7
    np.testing.assert_allclose(np.diff(np.log2(losses)), -power, atol=0.5)


def test_gaps(x64):
    t = jnp.linspace(0.02, 1.0, 50)
    np.testing.assert_allclose(
        pieces.build_gap("constant", dt=0.1)(t, 0, 0.01), np.maximum(t - 0.1, 0.01)
    )
    gap = pieces.build_gap("shrinking", interval=100, q=2.0, k=8.0, b=3.0)
    # the first stage is denoising where its factor is above 1; later ones halve the gap
    first = 0.5 * (1.0 + 8.0 / (1.0 + np.exp(3.0 * t)))
    assert (first > 1).sum() > 20
    np.testing.assert_allclose(gap(t, 0, 0.01), np.maximum(t * (1.0 - first), 0.01), rtol=1e-12)
    np.testing.assert_array_equal(gap(t, 0, 0.01)[first > 1], 0.01)
    relative = {s: (t - gap(t, s, 0.0)) / t for s in (400, 499, 500, 600)}
    wanted = (1.0 + 8.0 / (1.0 + np.exp(3.0 * t))) / 2.0**5
    np.testing.assert_allclose(relative[400], wanted, rtol=1e-12)
    np.testing.assert_array_equal(relative[400], relative[499])
    np.testing.assert_allclose(relative[500], wanted / 2, rtol=1e-12)
    np.testing.assert_allclose(relative[600], wanted / 4, rtol=1e-12)
    later = pieces.build_gap("shrinking", interval=100, b=3.0, first=4)
    np.testing.assert_allclose(later(t, 100, 0.0), gap(t, 400, 0.0), rtol=1e-12)


def test_the_step_is_traced():
    gap, traces = pieces.build_gap("shrinking", interval=10), []

    @jax.jit
    def run(step):
        traces.append(1)
        return gap(jnp.full(3, 0.5), step, 1e-4)

    ends = [float(run(jnp.int32(s))[0]) for s in (0, 35, 60)]
    assert len(traces) == 1 and ends[0] < ends[1] < ends[2] < 0.5


def test_distances():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 4, 3)).astype(np.float32)
    square = ((x - y).astype(np.float64) ** 2).sum(axis=(1, 2))
    np.testing.assert_allclose(pieces.build_distance("squared_l2")(x, y), square, rtol=1e-6)
    c = 0.03 * np.sqrt(12)
    huber = pieces.build_distance("pseudo_huber")
    np.testing.assert_allclose(huber(x, y), np.sqrt(square + c**2) - c, rtol=1e-6)
    wide = pieces.build_distance("pseudo_huber", scale=2.0)
    np.testing.assert_allclose(wide(x, y), np.sqrt(square + 48.0) - np.sqrt(48.0), rtol=1e-5)
    # tiny differences keep their digits, and equal arguments have gradient 0
    tiny = huber(x, x + np.float32(1e-4))
    np.testing.assert_allclose(tiny, 12 * 1e-8 / (2 * c), rtol=0.02)
    np.testing.assert_array_equal(jax.grad(lambda v: huber(v, x).sum())(x), 0.0)
    own = lambda x, y: jnp.abs(x - y).reshape(len(x), -1).sum(axis=1)
    assert pieces.build_distance(own) is own


def test_weights():
    t, r = jnp.asarray([0.5, 0.2]), jnp.asarray([0.4, 0.2])
    for name, wanted in (
        ("constant", [1.0, 1.0]),
        ("inverse_gap", [10.0, 0.0]),
        ("relative_gap", [5.0, 0.0]),
    ):
        np.testing.assert_allclose(pieces.build_weight(name)(t, r), wanted, rtol=1e-5)


def draw(size, index=None, total=None, process=VP_BRIDGE, **options):
    rng = np.random.default_rng(0)
    x0, x1 = rng.standard_normal((2, size, 3)).astype(np.float32)
    take = slice(None) if index is None else index
    x0, x1 = jnp.asarray(x0[take]), jnp.asarray(x1[take])
    h = bridge_consistency(lambda x, t: 0.5 * jnp.tanh(x), process, x1)
    pair = pieces.training_pair(lambda eps, t: process.corrupt(x0, x1, eps, t))
    return pieces.consistency(
        process,
        h,
        h,
        pair,
        jax.random.key(1),
        x0,
        gap=options.pop("gap", pieces.build_gap("constant", dt=0.1)),
        index=index,
        total=total,
        **options,
    )


def test_an_example_does_not_know_its_batch():
    whole, aux = draw(8)
    assert whole.shape == (8,) and {k: v.shape for k, v in aux.items()} == {
        k: (8,) for k in ("t", "r", "distance", "error")
    }
    for half in (jnp.arange(4), jnp.asarray([7, 5, 6, 4])):
        part, _ = draw(8, half, 8)
        np.testing.assert_allclose(part, whole[half], rtol=1e-5, atol=1e-6)


def test_times_stay_between_the_ends():
    _, aux = draw(64, t_start=0.9, t_end=0.2)
    assert aux["t"].max() <= 0.9 and aux["r"].min() >= np.float32(0.2)
    assert (aux["r"] <= aux["t"]).all()
    losses, _ = draw(8, t_start=0.2, t_end=0.2, weight="inverse_gap")
    np.testing.assert_array_equal(losses, 0.0)  # no gap: nothing to learn, and no division by 0


def test_a_share_of_the_examples_begins_at_the_start():
    _, aux = draw(600, t_start=0.9, start_share=0.3)
    share = float((aux["t"] == np.float32(0.9)).mean())
    above = 0.1  # of uniform times, cut to t_start
    assert abs(share - (0.3 + 0.7 * above)) < 0.08
    rest = aux["t"][aux["t"] < 0.9]
    np.testing.assert_allclose(rest.mean(), 0.45, atol=0.05)
    # chosen for each example by itself
    _, part = draw(600, jnp.asarray([5, 3, 500]), 600, t_start=0.9, start_share=0.3)
    np.testing.assert_allclose(part["t"], aux["t"][jnp.asarray([5, 3, 500])], rtol=1e-6)


def test_a_gaussian_process_needs_nothing_more():
    """The same pieces on VP noise, with the deterministic DDIM step as h: data of one point are exact."""
    process, point = VP(), jnp.asarray([0.3, -0.6], jnp.float32)
    x0 = jnp.tile(point, (16, 1))

    def h(x, t):
        end = process.point(process.t_min)
        here = process.point(t)
        ratio = (end["sigma"] / here["sigma"])[:, None]
        alpha = (here["alpha"])[:, None]
        return ratio * x + (end["alpha"] - ratio * alpha) * point

    losses, aux = pieces.consistency(
        process,
        h,
        h,
        pieces.training_pair(lambda eps, t: process.corrupt(x0, eps, t)),
        jax.random.key(0),
        x0,
        gap=pieces.build_gap("shrinking", interval=1, first=2),
        weight="constant",
    )
    assert aux["t"].min() >= process.t_min
    np.testing.assert_allclose(losses, 0.0, atol=1e-9)


def test_errors():
    with pytest.raises(ValueError, match="gap must be one of constant, shrinking; got"):
        pieces.build_gap("constnat")
    with pytest.raises(ValueError, match=r"q must exceed 1, got 1\.0"):
        pieces.build_gap("shrinking", interval=10, q=1.0)
    with pytest.raises(ValueError, match=r"gap 'shrinking'.*interval"):
        pieces.build_gap("shrinking")
    with pytest.raises(ValueError, match=r"gap 'constant'.*interval"):
        pieces.build_gap("constant", interval=10)
    with pytest.raises(ValueError, match="distance must be one of squared_l2, pseudo_huber; got"):
        pieces.build_distance("l2")
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        pieces.build_distance("pseudo_huber", scale=0)
    with pytest.raises(ValueError, match="weight must be one of constant"):
        pieces.build_weight("snr")
    with pytest.raises(ValueError, match="returned shape"):
        like = jnp.zeros((4, 3))
        pair = pieces.training_pair(lambda eps, t: eps)
        pieces.consistency(
            VP_BRIDGE,
            lambda x, t: x[:, :2],
            lambda x, t: x,
            pair,
            jax.random.key(0),
            like,
            gap=pieces.build_gap("constant"),
        )
    with pytest.raises(ValueError, match="index has shape"):
        pieces.consistency(
            VP_BRIDGE,
            lambda x, t: x,
            lambda x, t: x,
            pieces.training_pair(lambda eps, t: eps),
            jax.random.key(0),
            jnp.zeros((4, 3)),
            gap=pieces.build_gap("constant"),
            index=jnp.arange(3),
        )
