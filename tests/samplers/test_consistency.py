"""Consistency sampling of bridges: goldens, laws, calls, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import AffineBridge, affine_law, place_noise, plain_run

from diffusion_jax import processes
from diffusion_jax.samplers import Pinned, build_sampler, consistency_bridge, dbim, sample

PROCESSES = {"vp": processes.VPBridge(), "ve": processes.VEBridge()}


def problem(name):
    """Golden arrays, the process and the exact mean and spectrum of x0 given x1."""
    g, process = golden("bridges_cdbm"), PROCESSES[name]
    mean = g["m0"] + (g["xT"] - g["mT"]) @ g["G"].T
    return g, process, mean, np.linalg.eigh(g["Sc"])


def exact_network(process, source, mean, spectrum):
    """The x0_hat with which h is the exact map to t_min, and at the source the mean."""
    values, basis = spectrum
    end = process.point(process.t_min)

    def denoise(x, point):
        a, b, c = (float(point[n]) for n in "abc")
        if c == 0:
            return np.broadcast_to(mean, x.shape)
        ratio = np.sqrt((end["b"] ** 2 * values + end["c"] ** 2) / (b**2 * values + c**2))
        moved = ((x - a * source - b * mean) @ basis * ratio) @ basis.T
        h = end["a"] * source + end["b"] * mean + moved
        k = end["c"] / c
        return (h - k * x - (end["a"] - k * a) * source) / (end["b"] - k * b)

    return denoise


@pytest.mark.parametrize("name", PROCESSES)
def test_two_calls_of_an_ideal_model(name):
    g, process, mean, spectrum = problem(name)
    sampler = consistency_bridge(process, 2)
    assert sampler.nfe == 2 and sampler.times[0] == process.t_max
    denoise = exact_network(process, g["xT"], mean, spectrum)
    path = plain_run(sampler, denoise, g["xT"], place_noise(sampler, g["z"][None], [0]))
    scale = np.abs(g[f"{name}_boot"]).max()
    np.testing.assert_allclose(path[1], g[f"{name}_boot"], rtol=0, atol=1e-11 * scale)
    wanted = g[f"{name}_two_nfe_exact"]
    # the network here is a quotient of differences that shrink with 1 - t
    np.testing.assert_allclose(path[2], wanted, rtol=0, atol=1e-9 * np.abs(wanted).max())


@pytest.mark.parametrize("name", PROCESSES)
def test_more_calls_keep_the_law_of_an_ideal_model(name):
    """From an exact h the result's law is q(x | x1) at t_min for any times of noising."""
    g, process, means, spectrum = problem(name)
    source, mean, end = g["xT"][0], means[0], process.point(process.t_min)
    denoise = exact_network(process, source, mean, spectrum)
    wanted = end["a"] * source + end["b"] * mean
    covariance = end["b"] ** 2 * g["Sc"] + end["c"] ** 2 * np.eye(3)
    for n, grid in ((3, None), (4, "uniform"), (5, "log_snr")):
        sampler = consistency_bridge(process, n, grid=grid)
        got_mean, got = affine_law(sampler, denoise, source, np.zeros((3, 3)))
        np.testing.assert_allclose(got_mean, wanted, rtol=0, atol=1e-8)
        # what the boot lacks, b^2 Sc at t_1, is all that is missing
        np.testing.assert_allclose(got, covariance, rtol=0, atol=1e-3)


def test_with_the_truth_as_prediction_every_law_is_exact():
    """D = x0: the result is a draw of q(x | x0, x1) at t_end, noise of t_end included."""
    process, source, x0 = processes.VPBridge(), np.array([1.0, -2.0]), np.array([0.3, 0.7])
    for n, t_end in ((2, 1e-4), (3, 0.05), (6, 0.2)):
        sampler = consistency_bridge(process, n, t_end=t_end)
        truth = lambda x, point: np.broadcast_to(x0, x.shape)
        mean, covariance = affine_law(sampler, truth, source, np.zeros((2, 2)))
        end = process.point(t_end)
        np.testing.assert_allclose(mean, end["a"] * source + end["b"] * x0, atol=1e-13)
        np.testing.assert_allclose(covariance, end["c"] ** 2 * np.eye(2), atol=1e-13)


@pytest.mark.parametrize("name", [*PROCESSES, "brownian", "i2sb"])
def test_two_calls_are_those_of_dbim(name):
    makers = {"brownian": processes.BrownianBridge, "i2sb": processes.I2SB}
    process = PROCESSES[name] if name in PROCESSES else makers[name]()
    rng = np.random.default_rng(0)
    source, noise = rng.standard_normal((2, 5, 3))
    bend = lambda x, point: np.tanh(x) * (1.0 + float(point["t"]))
    ours, theirs = consistency_bridge(process, 2), dbim(process, 2)
    draws = place_noise(ours, noise[None], [0])
    ends = [plain_run(s, bend, source, draws)[-1] for s in (ours, theirs)]
    np.testing.assert_allclose(*ends, rtol=0, atol=1e-12)


def test_h_is_noised_to_the_grid_and_returned_at_the_end():
    """The states between calls against the formulas, written out."""
    process, grid = processes.VPBridge(), np.array([0.99, 0.6, 0.25, 1e-4])
    rng = np.random.default_rng(1)
    source, *noise = rng.standard_normal((4, 5, 3))
    bend = lambda x, point: np.sin(x) + float(point["b"])
    sampler = consistency_bridge(process, 4, grid=grid)
    np.testing.assert_allclose(sampler.times, [1.0, 0.99, 0.6, 0.25])
    draws = place_noise(sampler, np.stack(noise), range(3))
    path = plain_run(sampler, bend, source, draws)
    p, e = [process.point(t) for t in grid], process.point(grid[-1])
    x = p[0]["a"] * source + p[0]["b"] * bend(source, process.point(1.0)) + p[0]["c"] * noise[0]
    for i in range(3):
        np.testing.assert_allclose(path[i + 1], x, atol=1e-13)
        clean = bend(x, p[i])
        rest = (x - p[i]["a"] * source - p[i]["b"] * clean) / p[i]["c"]
        h = e["a"] * source + e["b"] * clean + e["c"] * rest
        if i < 2:
            m = p[i + 1]["b"] / e["b"]
            spread = np.sqrt(p[i + 1]["c"] ** 2 - m**2 * e["c"] ** 2)
            x = m * h + (p[i + 1]["a"] - m * e["a"]) * source + spread * noise[i + 1]
    np.testing.assert_allclose(path[4], h, atol=1e-13)


def test_given_boot():
    process = processes.VPBridge()
    rng = np.random.default_rng(2)
    source, noise = rng.standard_normal((2, 6, 3)).astype(np.float32)
    denoise = lambda x, t: 0.5 * jnp.tanh(x)
    sampler = consistency_bridge(process, 2, booting="given")
    assert not sampler.stochastic and sampler.nfe == 2
    end = sample(sampler, denoise, None, Pinned(source, noise))
    drawn = consistency_bridge(process, 2)
    path = plain_run(
        drawn,
        lambda x, p: 0.5 * np.tanh(x),
        source,
        place_noise(drawn, noise[None].astype(np.float64), [0]),
    )
    np.testing.assert_allclose(end, path[-1], atol=1e-6)
    # 3 calls draw the noise of the second boundary only
    more = consistency_bridge(process, 3, booting="given")
    a, b = (sample(more, denoise, jax.random.key(s), Pinned(source, noise)) for s in (0, 1))
    assert more.stochastic and np.abs(a - b).max() > 0.01
    with pytest.raises(ValueError, match="Pinned"):
        sample(sampler, denoise, None, source)
    with pytest.raises(ValueError, match="the source alone"):
        sample(drawn, denoise, jax.random.key(0), Pinned(source, noise))


def test_calls():
    counted = []

    def denoise(x, t):
        counted.append(float(t))
        return 0.5 * x

    x = jnp.ones((2, 3))
    for nfe in (2, 3, 7):
        sampler = build_sampler(processes.VPBridge(), "consistency_bridge", nfe)
        counted.clear()
        with jax.disable_jit():
            sample(sampler, denoise, jax.random.key(0), x)
        assert len(counted) == sampler.nfe == nfe
        np.testing.assert_allclose(counted, sampler.times, rtol=1e-6)


def test_float32():
    g, process, mean, spectrum = problem("vp")
    denoise = AffineBridge(g["xT"].astype(np.float32), mean, *spectrum)
    sampler = consistency_bridge(process, 4)
    noise = np.random.default_rng(3).standard_normal((5, *g["xT"].shape))
    exact = plain_run(sampler, AffineBridge(g["xT"], mean, *spectrum).at, g["xT"], noise)[-1]
    small = plain_run(sampler, denoise.at, g["xT"], noise, np.float32)[-1]
    np.testing.assert_allclose(small, exact, rtol=0, atol=3e-6)


def test_errors():
    process = processes.VPBridge()
    with pytest.raises(ValueError, match="at least 2 network calls, got num_steps=1"):
        consistency_bridge(process, 1)
    with pytest.raises(ValueError, match="nfe must be a positive int, got 0"):
        build_sampler(process, "consistency_bridge", 0)
    with pytest.raises(ValueError, match="needs a bridge process, got VP"):
        consistency_bridge(processes.VP(), 2)
    with pytest.raises(ValueError, match="booting must be one of draw, given; got 'giveen'"):
        consistency_bridge(process, 2, booting="giveen")
    with pytest.raises(ValueError, match=r"times must decrease strictly"):
        consistency_bridge(process, 3, grid=[0.9, 0.95, 1e-4])
    with pytest.raises(ValueError, match="no noise"):
        consistency_bridge(processes.I2SB(ot_ode=True), 3)
