"""Fitting a solver, its parametrisation, and tables on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import mixture_mean, plain_run

from diffusion_jax import oracles, processes, samplers
from diffusion_jax.samplers import (
    build_sampler,
    ddim,
    dpm_solver_pp,
    edm_heun,
    fit_table,
    load_table,
    sample,
    save_table,
    with_noise,
)
from diffusion_jax.samplers.table_form import table_form, unroll

MODEL = golden("solvers_model")
VP = processes.VP()
MIXTURE = oracles.GaussianMixture(VP, MODEL["w"], MODEL["means"], MODEL["covs"])
ENDS = {"t_start": 1.0, "t_end": 1e-3}


def shrink(x, point):
    return 0.7 * np.tanh(x) * (1.0 - 0.5 * point["t"])


def starts(num, seed=1, dtype=None):
    return jax.random.normal(jax.random.key(seed), (num, 2), dtype)


@pytest.mark.parametrize("name", ("ddim", "dpmpp_3m", "dpm_3m", "unipc_3", "deis_tab3"))
def test_unrolled_tables_are_the_tables(name):
    """The closed expression of the end in x and the predictions, against a run of the table."""
    sampler = build_sampler(VP, name, 6)
    x, outputs = np.random.default_rng(0).standard_normal((5, 2)), []

    def record(y, point):
        outputs.append(shrink(y, point))
        return outputs[-1]

    path = plain_run(sampler, record, x)
    a, w = unroll(sampler)
    for i in range(7):
        expected = a[i] * x + sum((w[i, j] * outputs[j] for j in range(i)), np.zeros_like(x))
        np.testing.assert_allclose(path[i], expected, rtol=0, atol=1e-12)
        assert not w[i, i:].any()


@pytest.mark.parametrize("process", ("vp", "edm", "rectified_flow", "cosine"))
@pytest.mark.parametrize("name", ("dpmpp_2m", "deis_tab3", "unipc_2"))
def test_the_parametrisation_holds_the_start(name, process):
    """With the whole history the vector of a table is that table, infinite ends of lam included."""
    process = samplers.build.entry("process", process).build()
    start = build_sampler(process, name, 5, grid="uniform")
    form, vector = table_form(process, start, None, False, True)
    x = np.random.default_rng(0).standard_normal((5, 2)) * process.prior_std
    again = form.sampler(vector, "again")
    np.testing.assert_allclose(again.times, start.times, rtol=0, atol=2e-4)
    assert again.nfe == 5 and not again.stochastic
    ends = [plain_run(s, lambda y, p: 0.7 * np.tanh(y), x)[-1] for s in (start, again)]
    np.testing.assert_allclose(*ends, rtol=0, atol=5e-3)
    assert np.isfinite(form(vector + 0.3)[2]).all()


def test_consistent_tables_carry_constant_predictions_exactly():
    form, vector = table_form(VP, dpm_solver_pp(VP, 6, **ENDS), 3, True, True)
    moved = form.sampler(vector + np.random.default_rng(0).normal(size=vector.shape), "moved")
    assert np.abs(moved.times - form.sampler(vector, "start").times).max() > 0.01
    assert (np.diff(moved.times) < 0).all()
    x = np.random.default_rng(1).standard_normal((4, 2))
    end = plain_run(moved, lambda y, p: np.full_like(y, 0.3), x)[-1]
    eps = (x - VP.alpha(1.0) * 0.3) / VP.sigma(1.0)
    np.testing.assert_allclose(end, VP.alpha(1e-3) * 0.3 + VP.sigma(1e-3) * eps, atol=1e-12)


def test_one_call_becomes_exact_for_isotropic_gaussian_data(x64):
    """One step c x + B D can be the affine flow of N(m, s^2): both coefficients are known."""
    mean, variance = np.array([0.6, 0.6]), 0.3
    model = oracles.Gaussian(VP, mean, variance * np.eye(2))
    x = starts(64)
    target = oracles.gaussian_flow(VP, mean, variance * np.eye(2), x, 1.0, 1e-3)
    start = ddim(VP, 1, **ENDS)
    fitted, report = fit_table(VP, model, jax.random.key(0), x, nfe=1, start=start, target=target)
    assert report.start_held_out > 0.3 and report.held_out < 1e-7
    a, b = VP.alpha(1.0), VP.alpha(1e-3)
    ratio = np.sqrt(
        (b**2 * variance + VP.sigma(1e-3) ** 2) / (a**2 * variance + VP.sigma(1.0) ** 2)
    )
    gain = a * variance / (a**2 * variance + VP.sigma(1.0) ** 2)
    weight = (b - ratio * a) / (1.0 - gain * a)  # y' = c y + weight D with D = m + gain (y - a m)
    (c,), (w,) = unroll(fitted)[0][1:], unroll(fitted)[1][1]
    np.testing.assert_allclose([c, w], [ratio - weight * gain, weight], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def fitted():
    with jax.enable_x64(True):
        x = starts(600, dtype=np.float64)
        return fit_table(VP, MIXTURE, jax.random.key(0), x, nfe=5, steps=20)


def test_five_calls_on_the_mixture(fitted, x64):
    """Far below its start on held-out starts, and below every solver known on the 16 fixed ones."""
    sampler, report = fitted
    assert sampler.nfe == 5 and not sampler.stochastic and report.best > 0
    assert report.held_out < 0.2 * report.start_held_out
    assert len(report.history) <= 20 and report.history[report.best - 1][1] == report.held_out
    assert min(held_out for _, held_out in report.history) == report.held_out
    end = plain_run(
        sampler,
        lambda x, p: mixture_mean(x, p, MODEL["w"], MODEL["means"], MODEL["covs"]),
        MODEL["z16"],
    )[-1]
    error = np.sqrt(np.mean((end - MODEL["vp_exact_t_end"]) ** 2))
    assert error < 0.02  # DPM-Solver-v3 with corrector: 0.045
    np.testing.assert_allclose(sample(sampler, MIXTURE, None, MODEL["z16"]), end, atol=1e-9)


def test_a_saved_table_comes_back_bit_for_bit(fitted, tmp_path):
    path = tmp_path / "tables" / "five.npz"
    save_table(path, VP, fitted[0])
    again = load_table(path, processes.VP(t_min=1e-4), nfe=5, shape=(2,))
    assert jax.tree.structure(again) == jax.tree.structure(fitted[0])
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(fitted[0]), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert (again.name, again.order) == (fitted[0].name, None)
    x = starts(8)
    np.testing.assert_array_equal(
        sample(again, MIXTURE, None, x), sample(fitted[0], MIXTURE, None, x)
    )


def test_a_saved_table_is_a_sampler_by_name(fitted, tmp_path):
    path = tmp_path / "five.npz"
    save_table(path, VP, fitted[0])
    for sampler in (build_sampler(VP, str(path)), build_sampler(VP, str(path), 5)):
        np.testing.assert_array_equal(sampler.times, fitted[0].times)
    with pytest.raises(ValueError, match="makes 5 network calls, 8 are asked for"):
        build_sampler(VP, str(path), 8)
    with pytest.raises(ValueError, match="a saved table takes no options, got grid"):
        build_sampler(VP, str(path), grid="karras")


@pytest.mark.parametrize(
    "build", (lambda: ddim(VP, 4, eta=1.0), lambda: edm_heun(VP, 3, s_churn=9))
)
def test_tables_with_noise_and_init_rows_are_kept_too(build, tmp_path):
    sampler = build()
    save_table(tmp_path / "a.npz", VP, sampler)
    again = load_table(tmp_path / "a.npz", VP)
    assert again.stochastic and again.order == sampler.order
    ends = [sample(s, MIXTURE, jax.random.key(1), starts(4)) for s in (sampler, again)]
    np.testing.assert_array_equal(*ends)


def test_what_cannot_be_saved_or_loaded(fitted, tmp_path):
    path = tmp_path / "five.npz"
    save_table(path, VP, fitted[0])
    with pytest.raises(ValueError, match=r"beta_max=20.0.*not for.*beta_max=12.0"):
        load_table(path, processes.VP(beta_max=12.0))
    with pytest.raises(ValueError, match="makes 5 network calls, 6 are asked for"):
        load_table(path, VP, nfe=6)
    with pytest.raises(FileNotFoundError, match="no file of solver table"):
        load_table(tmp_path / "none.npz", VP)
    with pytest.raises(ValueError, match="needs a Gaussian process, got VPBridge"):
        load_table(path, processes.VPBridge())
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:300] + b"xx" + whole[302:], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or holds no solver table"):
            load_table(path, VP)
    np.savez(path, weights=np.ones(3))
    with pytest.raises(ValueError, match="another kind or version"):
        load_table(path, VP)
    noisy = ddim(VP, 4, eta=1.0)
    with pytest.raises(ValueError, match="draws of its own"):
        save_table(path, VP, with_noise(noisy, np.zeros((5, 3, 2))))
    with pytest.raises(ValueError, match="is not a table"):
        save_table(path, VP, build_sampler(processes.Absorbing(5), "first_hitting", length=3))


def test_coefficients_with_data_axes_name_their_shape(tmp_path):
    rows, point = samplers.Rows(), VP.point(0.5)
    rows.add(point, samplers.Form({"y": 0.5, "D": np.array([0.1, 0.2])}))
    save_table(tmp_path / "a.npz", VP, rows.sampler(VP.point(0.1), name="own"))
    assert load_table(tmp_path / "a.npz", VP, shape=(4, 2)).xs["arrays"][0].shape == (1, 2)
    with pytest.raises(ValueError, match=r"made for examples \(2,\), not \(4, 3\)"):
        load_table(tmp_path / "a.npz", VP, shape=(4, 3))


def labelled(batch):
    """A conditional model: another shrinkage for each label."""
    gain = 0.4 + 0.2 * batch["label"][:, None]

    def denoise(x, t):
        return gain * jnp.tanh(x) * (1.0 - 0.5 * jnp.reshape(t, (-1, 1)))

    return denoise


@pytest.mark.slow
def test_conditions_chunks_and_directions_agree():
    """Conditional starts in chunks are the same fit; the same key gives the same table again."""
    x = starts(64)
    batch = {"label": np.arange(64, dtype=np.int32) % 3}
    options = {"nfe": 3, "steps": 4, "batch": batch, "held_out": 0.5}
    fits = [
        fit_table(VP, labelled, jax.random.key(0), x, **options, **more)
        for more in ({}, {"chunk": 16}, {"chunk": 16}, {"directions": 1})
    ]
    ends = [sample(s, labelled(batch), None, x) for s, _ in fits]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=2e-3)
    np.testing.assert_array_equal(ends[1], ends[2])
    assert fits[1][1].history == fits[2][1].history
    for _, report in fits:
        assert report.held_out < 0.5 * report.start_held_out
    assert (np.asarray(ends[0]) != np.asarray(ends[3])).any()


@pytest.mark.slow
def test_features_decide_what_is_compared():
    """Half of every coordinate is the same problem at half the error; a constant leaves nothing to fit."""
    x, options = starts(64), {"nfe": 2, "steps": 3, "start": dpm_solver_pp(VP, 2, **ENDS)}
    _, plain = fit_table(VP, MIXTURE, jax.random.key(0), x, **options)
    _, half = fit_table(VP, MIXTURE, jax.random.key(0), x, features=lambda x: 0.5 * x, **options)
    assert 0 < half.held_out < half.start_held_out
    np.testing.assert_allclose(half[1:5], 0.5 * np.array(plain[1:5]), rtol=1e-2)
    same, none = fit_table(VP, MIXTURE, jax.random.key(0), x, features=lambda x: 0.0 * x, **options)
    assert none.best == 0 and same is options["start"]


def test_wrong_arguments():
    x, key = starts(8), jax.random.key(0)

    def fit(process=VP, x=x, **options):
        return fit_table(process, MIXTURE, key, x, **{"nfe": 3, **options})

    with pytest.raises(ValueError, match="nfe must be an int of at least 1, got 0"):
        fit(nfe=0)
    with pytest.raises(ValueError, match="history must be an int of at least 1, got 0"):
        fit(history=0)
    with pytest.raises(ValueError, match="needs a Gaussian process, got VPBridge"):
        fit(process=processes.VPBridge())
    with pytest.raises(ValueError, match="x_init must be floating-point starts"):
        fit(x=np.ones((8, 2), np.int32))
    with pytest.raises(ValueError, match=r"held_out = 0.01 of 8 starts leaves none"):
        fit(held_out=0.01)
    with pytest.raises(ValueError, match="chunk = 3 must divide the number of starts, 8"):
        fit(chunk=3)
    with pytest.raises(ValueError, match="makes 4 calls, nfe is 3"):
        fit(start=ddim(VP, 4))
    with pytest.raises(ValueError, match="decreasing times"):
        fit(start=samplers.heun(VP, 2, t_end=0.0))
    with pytest.raises(ValueError, match="only deterministic tables"):
        fit(start=ddim(VP, 3, eta=1.0))
    with pytest.raises(ValueError, match=r"target has shape \(8, 3\), x_init \(8, 2\)"):
        fit(target=np.zeros((8, 3)))
    with pytest.raises(ValueError, match="end points are not finite"):
        fit(target=np.full((8, 2), np.nan))
