"""Averages with power-function profiles, and projections after the update (EDM2, arXiv 2312.02696)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate
from training.toy import BATCH, CONFIG, ToyPipeline, assert_same_bits, toy_method

from diffusion_jax.networks import magnitude_preserving
from diffusion_jax.training import create_state, make_optimizer, restore_params, train
from diffusion_jax.training.power_ema import (
    combination,
    combine,
    exponent,
    overlap,
    power_rate,
    reconstruct_run,
    width,
)
from diffusion_jax.training.state import ema_rate
from diffusion_jax.training.step import make_train_step

ADAM = {"name": "adam", "learning_rate": 1e-2}


class Projected(NamedTuple):
    init: Any
    loss: Any
    project: Any = magnitude_preserving.project


def states(steps, decays, optimizer=ADAM, method=None):
    method, pipeline = method or toy_method(), ToyPipeline()
    optimizer, key = make_optimizer(optimizer), jax.random.key(0)
    step = jax.jit(
        make_train_step(method, optimizer, batch_size=BATCH, decays=decays, ema_warmup="power")
    )
    found = [create_state(method, optimizer, decays, key, pipeline.batch(0))]
    for n in range(steps):
        found.append(step(found[-1], pipeline.batch(n), key)[0])
    return found


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), a, b)


def profile(g, end):
    return lambda tau: (g + 1) * tau**g / end ** (g + 1)


@pytest.mark.parametrize(("relative", "known"), [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_the_width_is_the_standard_deviation_of_the_profile(relative, known):
    g = exponent(relative)
    assert g == pytest.approx(known, abs=0.005)
    p = profile(g, 1.0)
    mean, square = (integrate.quad(lambda s, n=n: s**n * p(s), 0, 1)[0] for n in (1, 2))
    assert np.sqrt(square - mean**2) == pytest.approx(relative, rel=1e-6)
    assert width(g) == pytest.approx(relative, rel=1e-9)


def test_overlaps_are_integrals():
    for g, s, h, t in ((6.9, 10.0, 17.0, 7.0), (2.0, 3.0, 2.0, 9.0)):
        p, q = profile(g, s), profile(h, t)
        wanted, _ = integrate.quad(lambda x, p=p, q=q: p(x) * q(x), 0, min(s, t))
        assert overlap(g, s, h, t) == pytest.approx(wanted, rel=1e-9)


def test_averages_have_the_weights_of_the_profile():
    """After T updates the parameters of update n weigh (n^(g+1) - (n-1)^(g+1)) / T^(g+1)."""
    decays = (0.2, 0.1)
    found = states(5, decays)
    for decay in decays:
        edges = (np.arange(6) / 5.0) ** (exponent(decay) + 1.0)
        weights = np.diff(edges)
        expected = combine([s.params for s in found[1:]], weights)
        average = found[-1].ema[str(decay)]
        assert_close(average, expected)
    assert_close(found[1].ema["0.1"], found[1].params)  # the first parameters are forgotten


def test_averages_move_with_the_updates_alone():
    found = states(6, (0.2,), {**ADAM, "accumulate": 3})
    assert_same_bits(found[2].ema["0.2"], found[0].params)
    assert_close(found[3].ema["0.2"], found[3].params)
    assert_same_bits(found[5].ema["0.2"], found[3].ema["0.2"])
    rate = 1.0 - 0.5 ** (exponent(0.2) + 1.0)
    before, new, after = (
        s["out"]["kernel"] for s in (found[5].ema["0.2"], found[6].params, found[6].ema["0.2"])
    )
    np.testing.assert_allclose(after, before + rate * (new - before), rtol=1e-5)


def test_any_width_of_stored_averages():
    """A random walk averaged directly, and put together of snapshots of two other widths."""
    rng = np.random.default_rng(0)
    steps, stored, truth, snapshots = 1024, (0.05, 0.1), (0.05, 0.07, 0.13), {}
    walk = {"w": rng.standard_normal((steps, 64)).cumsum(0)}
    averages = {w: np.zeros(64) for w in {*stored, *truth}}
    for n in range(steps):
        for w, average in averages.items():
            beta = (1.0 - 1.0 / (n + 1)) ** (exponent(w) + 1.0)
            averages[w] = beta * average + (1.0 - beta) * walk["w"][n]
        if (n + 1) % 64 == 0:
            snapshots |= {(w, n + 1): averages[w] for w in stored}
    spread = np.linalg.norm(averages[0.05] - averages[0.1])
    for w in truth:
        x = combination(list(snapshots), w)
        found = combine(({"w": a} for a in snapshots.values()), x)["w"]
        assert np.linalg.norm(found - averages[w]) < 0.03 * spread, w
        assert x.sum() == pytest.approx(1.0, abs=0.01)
    exact = combination(list(snapshots), 0.05)
    np.testing.assert_allclose(exact, [k == (0.05, steps) for k in snapshots], atol=1e-6)
    middle = combination(list(snapshots), 0.1, time=512)
    np.testing.assert_allclose(middle, [k == (0.1, 512) for k in snapshots], atol=1e-6)


def test_a_run_gives_any_width(tmp_path):
    config = {**CONFIG, "steps": 64, "checkpoint_every": 8, "keep": 8, "ema_warmup": "power"}
    config |= {"log_every": 64}
    for name, ema in (("pair", (0.1, 0.05)), ("truth", (0.07,))):
        train(toy_method(), ToyPipeline(), {**config, "ema": ema}, tmp_path / name)
    flat = lambda tree: np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)])
    wanted = flat(restore_params(tmp_path / "truth", "ema_0.07"))
    near = flat(restore_params(tmp_path / "pair", "ema_0.05"))
    found = reconstruct_run(tmp_path / "pair", 0.07)
    assert jax.tree.leaves(found)[0].dtype == np.float32
    error = np.linalg.norm(flat(found) - wanted)
    assert error < 0.2 * np.linalg.norm(near - wanted)
    same = flat(reconstruct_run(tmp_path / "pair", 0.05, step=32))
    stored = flat(restore_params(tmp_path / "pair", "ema_0.05", step=32))
    np.testing.assert_allclose(same, stored, atol=1e-5)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text('{"train": {"ema_warmup": false}}')
    with pytest.raises(ValueError, match="no power-function profile"):
        reconstruct_run(tmp_path / "plain", 0.07)


def test_errors():
    for bad in (0.0, -0.1, 0.3):
        with pytest.raises(ValueError, match=r"lies in \(0, 0.2887\], which is uniform; got"):
            exponent(bad)
    with pytest.raises(ValueError, match="lies in"):
        ema_rate(0.999, 3, "power")
    with pytest.raises(ValueError, match="ema_warmup must be one of False, True, power; got 'pow'"):
        ema_rate(0.999, 3, "pow")
    with pytest.raises(ValueError, match="no stored averages"):
        combination([], 0.1)
    with pytest.raises(ValueError, match="times of averages are positive; got 0"):
        combination([(0.1, 0)], 0.1)
    assert float(power_rate(0.1, 0)) == 1.0


def test_projected_parameters_stay_projected():
    found = states(4, (0.1,), {**ADAM, "learning_rate": 0.5}, Projected(*toy_method()))
    plain = states(1, (0.1,))
    for n, state in enumerate(found):
        for layer in ("hidden", "out"):
            rows = np.sqrt(np.mean(np.square(state.params[layer]["kernel"]), axis=0))
            np.testing.assert_allclose(rows, 1.0, atol=1e-3, err_msg=str(n))
    kernels = lambda s: np.asarray(s.params["hidden"]["kernel"])
    before = kernels(plain[0])
    unit = before / np.sqrt(np.mean(before**2, axis=0))
    np.testing.assert_allclose(kernels(found[0]), unit, rtol=1e-3)
    assert np.abs(kernels(found[1]) - kernels(found[0])).max() > 1e-3
    average = np.sqrt(np.mean(np.square(found[-1].ema["0.1"]["hidden"]["kernel"]), axis=0))
    assert average.min() < 0.999  # of unit vectors, and left as it is
    assert jnp.ndim(found[-1].params["hidden"]["bias"]) == 1
