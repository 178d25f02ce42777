"""Streamed statistics and the figures made of them, against formulas on all images at once."""

import json

import jax
import numpy as np
import pytest
import scipy.linalg

from diffusion_jax.array_files import write_arrays
from diffusion_jax.evaluation import feature_statistics as stats
from diffusion_jax.evaluation import reference_files
from diffusion_jax.evaluation.kernel import kernel_distance
from diffusion_jax.evaluation.neighbours import precision_recall
from diffusion_jax.evaluation.sharded import ShardedFunction, over_processes, rows_of_process

SIZES = {"pool": 6, "spatial": 4, "unbiased": 9}


def features(seed, count=200):
    """What a network would give of `count` images, correlated and with an offset."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal((count, n)) @ rng.standard_normal((n, n)) + 3 * rng.random(n)
        ).astype(np.float32)
        for name, n in SIZES.items()
    }


def collect(found, **options):
    """Images are their own numbers here; the network looks their features up."""
    asked = []

    def read(rows):
        asked.append(np.asarray(rows))
        return np.asarray(rows)

    def outputs_of(batches):
        for rows in batches:
            yield {name: value[rows] for name, value in found.items()}

    count = len(found["pool"])
    return stats.collect(outputs_of, read, count, **options), asked


def reference(statistics, **about):
    return reference_files.reference_of(statistics, about)


def test_moments_and_kept_features_are_those_of_all_images_at_once():
    found = features(0)
    whole, _ = collect(found, batch_size=7, keep=50)
    for name in stats.KINDS:
        np.testing.assert_allclose(
            whole.moments[name].covariance, np.cov(found[name].T), rtol=1e-5, atol=1e-6
        )
        np.testing.assert_allclose(whole.moments[name].mean, found[name].mean(0), rtol=1e-5)
    assert whole.count == 200 and len(whole.kept) == 50
    kept = stats.plan(200, keep=50).kept
    np.testing.assert_array_equal(whole.kept, found["pool"][kept])


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 64}, {"batch_size": 500}])
def test_batches_change_nothing(options):
    found = features(0)
    one, _ = collect(found, batch_size=7)
    other, _ = collect(found, **options)
    for name, value in stats.to_arrays(one).items():
        np.testing.assert_allclose(stats.to_arrays(other)[name], value, rtol=1e-12, atol=1e-9)


def test_processes_change_nothing():
    found = features(0)
    whole, _ = collect(found, batch_size=16)
    parts = [collect(found, rows=rows, batch_size=16)[0] for rows in np.split(np.arange(200), [70])]
    both = stats.merge(*(stats.from_arrays(stats.to_arrays(part)) for part in parts))
    for name, value in stats.to_arrays(whole).items():
        np.testing.assert_allclose(stats.to_arrays(both)[name], value, rtol=1e-12, atol=1e-9)


def test_the_fid_is_that_of_the_reference_formula():
    real, fake = features(1), features(2)
    row = stats.figures(reference(collect(real)[0]), collect(fake)[0])
    for title, name in (("fid", "pool"), ("sfid", "spatial")):
        a, b = real[name].astype(np.float64), fake[name].astype(np.float64)
        root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
        spread = np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
        expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + spread
        assert row[title] == pytest.approx(expected, rel=1e-6)
    assert row["kid"] == pytest.approx(kernel_distance(real["pool"], fake["pool"]), rel=1e-5)
    assert row["kid_std"] is None and row["n_kept"] == [200, 200]
    assert (row["precision"], row["recall"]) == precision_recall(real["pool"], fake["pool"])
    json.dumps(row)


def test_the_inception_score_is_that_of_its_definition():
    found = features(3)
    whole, _ = collect(found, parts=4)
    logits = found["unbiased"].astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    part = stats.plan(200, parts=4).part
    assert np.bincount(part).tolist() == [50] * 4
    scores = []
    for s in range(4):
        q = p[part == s]
        scores.append(np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0))), axis=1))))
    mean, deviation = whole.scores.value()
    assert mean == pytest.approx(np.mean(scores), rel=1e-6)
    assert deviation == pytest.approx(np.std(scores), rel=1e-5)


def test_an_order_by_class_does_no_harm():
    """Ten sure classes, in order or in turn: a score of ten, and kept images of all of them."""
    for labels in (np.repeat(np.arange(10), 100), np.tile(np.arange(10), 100)):
        logits = (50.0 * np.eye(10)[labels]).astype(np.float32)
        whole, _ = collect({"pool": np.eye(10)[labels], "unbiased": logits}, keep=200)
        assert whole.scores.value()[0] == pytest.approx(10.0, rel=0.1)
        assert np.count_nonzero(whole.kept.sum(axis=0) > 5) == 10


def test_the_same_images_are_at_no_distance():
    whole, _ = collect(features(4))
    row = stats.figures(reference(whole), whole)
    assert row["fid"] == pytest.approx(0.0, abs=1e-6) and row["precision"] == row["recall"] == 1.0


def test_what_is_missing_is_none():
    whole, _ = collect({"pool": features(5)["pool"]})
    real = reference(whole)._replace(kept=None, count=None)
    row = stats.figures(real, whole)
    names = ("sfid", "kid", "precision", "recall", "inception_score", "n_real")
    assert all(row[name] is None for name in names) and row["fid"] is not None
    alone = stats.figures(None, collect(features(5))[0])
    assert alone["inception_score"] > 1 and all(alone[name] is None for name in ("fid", "n_real"))


def test_subsets_of_the_kept_images_give_the_kid():
    real, fake = collect(features(1))[0], collect(features(2))[0]
    row = stats.figures(reference(real), fake, subset_size=50)
    whole = kernel_distance(real.kept, fake.kept)
    assert row["kid_std"] > 0 and row["kid"] == pytest.approx(whole, abs=row["kid_std"])


def test_an_interrupted_pass_goes_on(tmp_path):
    found, path = features(0), tmp_path / "part.npz"
    whole, _ = collect(found, batch_size=8)

    class Stopped(Exception):
        pass

    def stop(done):
        if done == 80:
            raise Stopped

    options = {"batch_size": 8, "resume": path, "identity": {"of": "a"}, "save_seconds": 0.0}
    with pytest.raises(Stopped):
        collect(found, progress=stop, **options)
    assert path.is_file()
    kept = path.read_bytes()
    again, asked = collect(found, **options)
    assert asked[0][0] == 72 and not path.exists()
    for name, value in stats.to_arrays(whole).items():
        np.testing.assert_array_equal(stats.to_arrays(again)[name], value)
    # what is of another set, or damaged, is not taken up
    path.write_bytes(kept)
    assert collect(found, **options | {"identity": {"of": "b"}})[1][0][0] == 0
    path.write_bytes(kept[:-100])
    assert collect(found, **options)[1][0][0] == 0


def test_features_that_are_not_finite_are_refused():
    found = features(0)
    found["pool"][3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        collect(found)


def test_our_files_keep_everything(tmp_path):
    whole, _ = collect(features(0))
    path = reference_files.write_reference(tmp_path / "a.npz", reference(whole, checksum="c"))
    assert reference_files.has_statistics(path)
    back = reference_files.read_reference(path, {"pool": 6, "spatial": 4})
    assert back.count == 200 and back.about == {"checksum": "c"}
    np.testing.assert_array_equal(back.kept, whole.kept)
    np.testing.assert_allclose(back.gaussians["pool"][1], whole.moments["pool"].covariance)
    assert stats.figures(back, whole)["fid"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_published_files_are_read(tmp_path, spatial, dtype):
    real, fake = collect(features(1))[0], collect(features(2))[0]
    arrays = {}
    for name, end in (("pool", ""), ("spatial", "_s"))[: 1 + spatial]:
        arrays |= {f"mu{end}": real.moments[name].mean.astype(dtype)}
        arrays |= {f"sigma{end}": real.moments[name].covariance.astype(dtype)}
    np.savez(tmp_path / "theirs.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), **arrays)
    found = reference_files.read_reference(tmp_path / "theirs.npz")
    assert found.count is None and found.kept is None
    row, expected = (stats.figures(r, fake) for r in (found, reference(real)))
    assert row["fid"] == pytest.approx(expected["fid"], rel=1e-4)
    assert (row["sfid"] is None) != spatial


def test_bad_files_are_refused(tmp_path):
    read = reference_files.read_reference
    mu, sigma = np.zeros(6), np.eye(6)
    with pytest.raises(ValueError, match="no file of statistics"):
        read(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"pickle.*numpy\.savez"):
        read(tmp_path / "edm2.pkl")
    with pytest.raises(ValueError, match=r"statistics are written as \.npz"):
        reference_files.write_reference(tmp_path / "a.bin", reference(collect(features(0))[0]))
    np.savez(tmp_path / "six.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match="6 features where 'pool' has 2048"):
        read(tmp_path / "six.npz", {"pool": 2048})
    cases = {
        "mu and sigma are missing; it has arr_0": {"arr_0": mu},
        r"mu has shape \(6,\) and sigma \(5, 5\)": {"mu": mu, "sigma": np.eye(5)},
        "not symmetric": {"mu": mu, "sigma": np.triu(np.ones((6, 6)))},
        "NaN": {"mu": mu * np.nan, "sigma": sigma},
        "allow_pickle=False": {"mu": np.array([{}], object), "sigma": sigma},
    }
    for message, arrays in cases.items():
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "bad.npz")
    whole = (tmp_path / "six.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read(tmp_path / "cut.npz")
    write_arrays(tmp_path / "kind.npz", "other", {}, {"mu": mu, "sigma": sigma})
    with pytest.raises(ValueError, match="another kind"):
        read(tmp_path / "kind.npz")


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_a_function_sees_batches_of_one_size(count):
    traced = []

    def function(params, x, y):
        traced.append(x.shape)
        return {"sum": params * x + y[:, None]}

    call = ShardedFunction(function, np.float32(2.0), batch_size=4)
    x, y = np.arange(2.0 * count).reshape(count, 2), np.arange(float(count))
    np.testing.assert_allclose(call(x, y)["sum"], 2 * x + y[:, None])
    assert traced == [(4, 2)]
    with pytest.raises(ValueError, match="1 to 4 rows, got 5"):
        list(call.stream([(np.zeros((5, 2)), np.zeros(5))]))


def test_one_process_has_all_rows():
    assert rows_of_process(5).tolist() == list(range(5)) and jax.process_count() == 1
    [alone] = over_processes({"a": np.float64([np.pi])})
    assert alone["a"][0] == np.pi
