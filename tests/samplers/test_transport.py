"""Semi-discrete transport against the authors' numbers and exact solutions, and DPM-OT built on it."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from scipy.optimize import linear_sum_assignment
from solver_checks import plain_run

from diffusion_jax import oracles, processes
from diffusion_jax.samplers import build_sampler, sample
from diffusion_jax.samplers import transport as module
from diffusion_jax.samplers.dpm_ot import (
    annealed_langevin,
    dpm_ot,
    late_states,
    transport_sampler,
)
from diffusion_jax.samplers.transport import (
    TransportMap,
    cells,
    init_potential,
    semi_discrete_transport,
    update_potential,
)


def golden_masses(state, draws, targets):
    picked = cells(draws.reshape(-1, 2), targets, state.potential)
    return jnp.bincount(picked, length=len(targets)) / (draws.size // 2)


def six_updates(dtype):
    stored = golden("solvers_mmd_ot")
    targets, draws = (jnp.asarray(stored[n], dtype) for n in ("ot_targets", "ot_uniform"))
    state = init_potential(len(targets), float(stored["ot_lr"]), dtype)
    for i in range(6):
        masses = golden_masses(state, draws[2 * i : 2 * i + 2], targets).astype(dtype)
        state = update_potential(state, masses)
    return stored, targets, masses, state


def test_six_updates_of_the_official_code(x64):
    stored, targets, masses, state = six_updates(jnp.float64)
    np.testing.assert_allclose(state.potential, stored["ot_h_after_6"], rtol=0, atol=1e-13)
    np.testing.assert_allclose(masses, stored["ot_last_measure"], rtol=0, atol=1e-15)
    mapped = TransportMap(state.potential, targets)(jnp.asarray(stored["ot_source"]))
    np.testing.assert_array_equal(mapped, stored["ot_map"])


def test_six_updates_in_float32():
    stored, targets, _, state = six_updates(jnp.float32)
    np.testing.assert_allclose(state.potential, stored["ot_h_after_6"], rtol=0, atol=2e-5)
    mapped = TransportMap(state.potential, targets)(jnp.asarray(stored["ot_source"], jnp.float32))
    np.testing.assert_allclose(mapped, stored["ot_map"], atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 7, 16, 17])
def test_chunks_find_the_same_cells(chunk):
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(17, 3)).astype(np.float32)
    targets[11] = targets[4]  # a tie: the first of equals
    x, h = rng.normal(size=(200, 3)).astype(np.float32), np.zeros(17, np.float32)
    h[[4, 11]] = 1.5
    wanted = (x.astype(np.float64) @ targets.T.astype(np.float64) + h).argmax(axis=1)
    assert (wanted == 4).any() and not (wanted == 11).any()
    np.testing.assert_array_equal(cells(x, targets, h, chunk), wanted)


def test_cells_on_the_line_are_intervals_of_equal_mass():
    """On the line the map is monotone: the source's quantiles j / n are the cells' ends."""
    targets = np.array([2.0, -1.0, 0.3, 0.5, -3.0])[:, None].astype(np.float32)
    for source, quantile in (
        ("normal", jax.scipy.stats.norm.ppf),
        ("uniform", lambda p: p),
    ):
        fitted = semi_discrete_transport(
            jax.random.key(0),
            targets,
            source,
            draws=20_000,
            batch_size=5000,
            learning_rate=0.02,
            max_doublings=2,
            patience=30,
            tolerance=1e-3,
        )
        order = np.argsort(targets[:, 0])
        points = np.asarray(targets[order, 0], np.float64)
        h = np.asarray(fitted.potential, np.float64)[order]
        ends = -np.diff(h) / np.diff(points)  # where two neighbours score alike
        np.testing.assert_allclose(ends, quantile(np.arange(1, 5) / 5), atol=0.03)
        x = np.linspace(-1.5, 1.5, 301, dtype=np.float32)[:, None]
        assert (np.diff(fitted(x)[:, 0]) >= 0).all()
        np.testing.assert_allclose(fitted.masses, 0.2, atol=0.02)
        assert abs(float(np.mean(fitted.potential))) < 1e-5 and fitted.steps > 1


def test_as_many_sources_as_targets_is_the_optimal_assignment():
    rng = np.random.default_rng(5)
    n = 9
    sources = rng.normal(size=(n, 2)).astype(np.float32)
    targets = rng.normal(size=(n, 2)).astype(np.float32) + 0.5
    cost = ((sources[:, None] - targets[None]) ** 2).sum(-1)
    rows, columns = linear_sum_assignment(cost)
    # every source equally often: the masses are exact
    whole = lambda key, count: jnp.tile(jnp.asarray(sources), (count // n, 1))
    fitted = semi_discrete_transport(
        jax.random.key(0), targets, whole, draws=n, batch_size=n, learning_rate=0.05, tolerance=1e-6
    )
    assert fitted.source == "custom" and fitted.grad_norm < 1e-6
    np.testing.assert_array_equal(fitted.cells(sources)[rows], columns)
    nearest = cost.argmin(axis=1)
    assert len(np.unique(nearest)) < n  # the assignment is not mere nearness


def test_stop_rule_and_doublings(monkeypatch):
    """Draws and rate follow the rule that a plain loop over the same measurements says."""
    rng = np.random.default_rng(2)
    targets = jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)
    counted = []

    def source(key, count):
        jax.debug.callback(lambda: counted.append(count))
        return jax.random.normal(key, (count, 2))

    options = dict(draws=60, batch_size=30, patience=4, max_doublings=2, learning_rate=0.3)
    fitted = semi_discrete_transport(jax.random.key(1), targets, source, **options)
    jax.effects_barrier()

    h, m, v, rate = np.zeros(6), np.zeros(6), np.zeros(6), 0.3
    batches, best, bad, doublings, calls = 2, np.inf, 0, 0, 0
    for step in range(10_000):
        key = jax.random.fold_in(jax.random.key(1), step)
        picked = []
        for i in range(batches):
            x = np.asarray(jax.random.normal(jax.random.fold_in(key, i), (30, 2)), np.float64)
            picked.append((x @ np.asarray(targets, np.float64).T + h).argmax(1))
        calls += batches
        masses = np.bincount(np.concatenate(picked), minlength=6) / (30 * batches)
        g = masses - 1 / 6
        norm = np.linalg.norm(g)
        bad = 0 if norm < best else bad + 1
        best = min(best, norm)
        failed = bad > 4
        if (norm < 8e-4 and masses.min() > 0) or (failed and doublings == 2):
            break
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        h = h - rate * m / (np.sqrt(v) + 1e-8)
        h = h - h.mean()
        if failed:
            batches, best, bad, doublings, rate = 2 * batches, np.inf, 0, doublings + 1, 0.8 * rate
    assert fitted.steps == step and doublings == 2 and len(counted) == calls
    np.testing.assert_allclose(fitted.potential, h, atol=1e-4)
    assert fitted.grad_norm == pytest.approx(norm, rel=1e-4)


def test_most_steps():
    targets = np.eye(3, dtype=np.float32)
    fitted = semi_discrete_transport(jax.random.key(0), targets, max_steps=7, tolerance=0.0)
    assert fitted.steps == 7


def test_memory_does_not_grow_with_the_draws_or_the_targets():
    """The compiled fit holds one block of scores: batch_size times chunk."""

    def memory(n, batches):
        draw = lambda key, count: jax.random.normal(key, (count, 4))
        fit = jax.jit(
            lambda key, flat: module._fit(key, flat, draw, 0.1, 1e-3, batches, 64, 5, 3, 50, 128)
        )
        flat = jax.ShapeDtypeStruct((n, 4), jnp.float32)
        return fit.lower(jax.random.key(0), flat).compile().memory_analysis().temp_size_in_bytes

    small, many_draws, many_targets = memory(1024, 4), memory(1024, 400), memory(8192, 4)
    assert many_draws <= small + 1024
    assert many_targets < small + 8192 * 4 * 16  # a few vectors [n], where scores would be [64, n]


def test_save_and_load(tmp_path):
    fitted = semi_discrete_transport(
        jax.random.key(0), np.eye(3, dtype=np.float32), "uniform", max_steps=3, t=0.2, chunk=2
    )
    path = fitted.save(tmp_path / "deep" / "ot.npz")
    with np.load(path, allow_pickle=False) as file:
        assert {"potential", "targets", "masses"} <= set(file.files)
    back = TransportMap.load(path)
    assert (back.t, back.source, back.chunk, back.steps) == (0.2, "uniform", 2, 3)
    for a, b in zip(jax.tree.leaves(fitted), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(a, b)
    assert os.listdir(tmp_path / "deep") == ["ot.npz"]
    (tmp_path / "x.npz").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"x\.npz is damaged or holds no transport map"):
        TransportMap.load(tmp_path / "x.npz")
    with pytest.raises(FileNotFoundError, match=r"no file of transport map: .*none\.npz"):
        TransportMap.load(tmp_path / "none.npz")


# DPM-OT: start late from the mapped noise

DATA = np.array([[-3.0, 0.0], [3.0, 0.5], [0.0, 3.0], [0.5, -3.0]], np.float32)
VP = processes.VP()


def exact(process, spread=0.05):
    eye = spread**2 * np.eye(2)
    return oracles.GaussianMixture(process, np.full(4, 0.25), DATA, np.tile(eye, (4, 1, 1)))


def test_late_states_have_the_law_of_the_process():
    data = np.tile(DATA[:1], (4000, 1))
    x = np.asarray(late_states(jax.random.key(0), VP, data, 0.3))
    error = VP.sigma(0.3) / np.sqrt(4000)
    np.testing.assert_allclose(x.mean(0), VP.alpha(0.3) * DATA[0], atol=5 * error)
    np.testing.assert_allclose(x.std(0), VP.sigma(0.3), rtol=0.06)


@pytest.mark.parametrize("source", ["normal", "uniform"])
@pytest.mark.parametrize("process", [VP, processes.VE()], ids=["vp", "ve"])
def test_every_mode_gets_its_share_in_four_calls(process, source):
    """One target a mode: the noise is split into equal parts, and each part ends in its own mode."""
    t = 0.1
    transport, sampler = transport_sampler(
        jax.random.key(0),
        process,
        DATA,
        t=t,
        num_steps=4,
        source=source,
        draws=4000,
        learning_rate=0.05,
        max_doublings=1,
        patience=20,
    )
    assert sampler.nfe == 4 and sampler.times[0] == t and transport.t == t
    noise = process.prior(jax.random.key(1), (800, 2))
    x = np.asarray(sample(sampler, exact(process), None, noise))
    distance = np.linalg.norm(x[:, None] - DATA, axis=-1)
    assert distance.min(axis=1).max() < 0.3
    shares = np.bincount(distance.argmin(axis=1), minlength=4) / 800
    np.testing.assert_allclose(shares, 0.25, atol=0.07)
    # the states are those of the inner sampler, begun at the mapped points
    inner = build_sampler(process, "ddim", 4, t_start=t)
    z = noise / process.prior_std
    mapped = transport(jax.scipy.stats.norm.cdf(z) if source == "uniform" else z)
    np.testing.assert_allclose(sample(inner, exact(process), None, mapped), x, atol=1e-5)


def test_any_sampler_finishes(tmp_path):
    transport = TransportMap(np.zeros(4, np.float32), DATA, t=0.2)
    transport.save(tmp_path / "ot.npz")
    from_file = dpm_ot(VP, 5, transport=str(tmp_path / "ot.npz"))
    noise = VP.prior(jax.random.key(1), (6, 2))
    other = dpm_ot(VP, 5, transport=transport, sampler="dpmpp_2m", grid="uniform")
    a, b = (np.asarray(sample(s, exact(VP), None, noise)) for s in (from_file, other))
    assert (from_file.nfe, other.nfe) == (5, 5) and np.abs(a - b).max() > 1e-4
    assert dpm_ot(VP, 3, transport=transport, sampler="heun").nfe == 6  # steps, not calls
    noisy = dpm_ot(VP, 5, transport=transport, sampler="ddpm")
    assert noisy.stochastic and not from_file.stochastic
    assert np.isfinite(sample(noisy, exact(VP), jax.random.key(2), noise)).all()
    _, path = sample(from_file, exact(VP), None, noise, trajectory=True)
    np.testing.assert_allclose(path[0], transport(noise))
    assert path.shape == (6, 6, 2)


def test_langevin_keeps_the_law_of_each_level():
    """For Gaussian data the recursion of mean and variance is explicit; so is the last call."""
    process, mean, spread = processes.VE(), 0.7, 0.3
    sampler = annealed_langevin(process, 11, t_start=0.2, t_end=0.1)
    assert sampler.nfe == 11 and sampler.stochastic
    u = np.asarray(process.sigma(np.array([0.2, 0.1])))
    calls = [float(process.sigma(t)) for t in sampler.times]
    np.testing.assert_allclose(calls, [*[u[0]] * 5, *[u[1]] * 6])

    def denoise(x, point):
        gain = spread**2 / (spread**2 + point["sigma"] ** 2)
        return mean + gain * (x - mean)

    start = np.array([[0.2], [1.5]])
    path = plain_run(sampler, denoise, start)
    expected = start
    for sigma in calls[:-1]:
        expected = expected + 0.062 * sigma**2 * (mean - expected) / (spread**2 + sigma**2)
    np.testing.assert_allclose(path[-2], expected, rtol=1e-12)
    gain = spread**2 / (spread**2 + u[1] ** 2)
    np.testing.assert_allclose(path[-1], mean + gain * (expected - mean), rtol=1e-12)
    # noise: variance 2 rate sigma^2 a step
    unit = np.zeros((12, 2, 1))
    unit[1] = 1.0
    moved = plain_run(sampler, denoise, start, unit)[1] - path[1]
    np.testing.assert_allclose(moved, u[0] * np.sqrt(0.124), rtol=1e-12)


def test_langevin_on_vp_is_langevin_in_x_over_alpha():
    sampler = annealed_langevin(VP, 7, per_level=3, t_start=0.2, t_end=0.1)
    ve = processes.VE()
    u = np.asarray(VP.noise_level(np.array([0.2, 0.1])))
    twin = annealed_langevin(ve, 7, per_level=3, grid=np.asarray(ve.t_of_noise_level(u)))
    noise = np.random.default_rng(0).normal(size=(8, 5, 2))
    x0 = lambda y, point: np.tanh(y / point["alpha"])
    start = np.random.default_rng(1).normal(size=(5, 2))
    a = plain_run(sampler, x0, start, noise)[-1]
    b = plain_run(twin, x0, start / VP.alpha(0.2), noise)[-1]
    np.testing.assert_allclose(a, b, rtol=1e-10)


def test_a_whole_run_with_langevin():
    _, sampler = transport_sampler(
        jax.random.key(0), VP, DATA, t=0.02, num_steps=11, sampler="langevin", max_steps=200
    )
    x = sample(sampler, exact(VP), jax.random.key(3), VP.prior(jax.random.key(1), (50, 2)))
    assert np.linalg.norm(np.asarray(x)[:, None] - DATA, axis=-1).min(axis=1).max() < 0.5


PLAIN = TransportMap(np.zeros(4, np.float32), DATA, t=0.2)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: semi_discrete_transport(jax.random.key(0), DATA, "norml"),
            "did you mean 'normal'",
        ),
        (
            lambda: semi_discrete_transport(jax.random.key(0), DATA[:1]),
            r"n >= 2, got float32 \(1, 2\)",
        ),
        (lambda: semi_discrete_transport(jax.random.key(0), DATA.astype(int)), "floating"),
        (
            lambda: semi_discrete_transport(jax.random.key(0), DATA, draws=0),
            "draws must be a positive",
        ),
        (
            lambda: semi_discrete_transport(jax.random.key(0), DATA, learning_rate=0.0),
            "learning_rate",
        ),
        (
            lambda: semi_discrete_transport(
                jax.random.key(0), DATA, lambda k, n: jnp.zeros((n, 3))
            ),
            r"draws shape \(40, 3\) for 40 points, targets have 2",
        ),
        (lambda: PLAIN(jnp.zeros((3, 4))), r"takes points \(2,\), got \(4,\)"),
        (
            lambda: dpm_ot(VP, 3, transport=TransportMap(np.zeros(4), DATA)),
            "does not say which time",
        ),
        (
            lambda: dpm_ot(VP, 3, transport=PLAIN, t_start=0.5),
            "targets are at t = 0.2, t_start = 0.5",
        ),
        (
            lambda: dpm_ot(
                VP, 3, transport=TransportMap(np.zeros(4), DATA, t=0.2, source="custom")
            ),
            "custom source",
        ),
        (lambda: dpm_ot(VP, 3, transport=PLAIN, sampler="dbim"), "'dbim' is not for a Gaussian"),
        (lambda: dpm_ot(VP, 3, transport=PLAIN, sampler="dimm"), "unknown sampler 'dimm'"),
        (lambda: dpm_ot(VP, 10, transport=PLAIN, sampler="langevin"), "11, 16, ...; got 10"),
        (lambda: annealed_langevin(VP, 11, rate=1.0), "rate must lie between 0 and 1, got 1.0"),
        (
            lambda: transport_sampler(jax.random.key(0), VP, DATA, t=1.5),
            r"t must lie in \(0.001, 1.0\]",
        ),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
