"""The judge must tell good from bad: orderings on real digits, and both failure modes."""

import jax
import numpy as np
import pytest

from diffusion_jax.evaluation.quality import ImageQuality, noise_images
from diffusion_jax.evaluation.report import read_json, write_json


def blur(images):
    """Binomial blur with edge padding, weights 1 2 1 in both directions."""
    for axis in (1, 2):
        padded = np.pad(images, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
        parts = [np.take(padded, np.arange(images.shape[axis]) + i, axis=axis) for i in range(3)]
        images = (parts[0] + 2 * parts[1] + parts[2]) / 4
    return images


@pytest.fixture(scope="module")
def rows(quality, judged_digits):
    rng = np.random.default_rng(0)
    images, labels = judged_digits.test_images, judged_digits.test_labels
    gentle = 0.7 * images + 0.3 * blur(images)
    shuffled = rng.permuted(images.reshape(len(images), -1), axis=1).reshape(images.shape)
    sets = {
        "held-out": (images, labels),
        "gentle blur": (gentle, labels),
        "blur": (0.4 * images + 0.6 * blur(images), labels),
        "shuffled": (shuffled, labels),
        "noise": (noise_images(jax.random.key(0), len(images), (8, 8, 1)), labels),
        "grainy": (images + 0.2 * rng.normal(size=images.shape), labels),
        "wrong labels": (images, (labels + 1) % 10),
        "copies": (judged_digits.train_images, judged_digits.train_labels),
        "one class": (judged_digits.train_images[judged_digits.train_labels == 3], None),
    }
    smallest = len(sets["one class"][0])
    table = quality.compare({k: v for k, v in sets.items() if k != "one class"})
    table += quality.compare({"one class": sets["one class"]}, size=smallest)
    return {row["name"]: row for row in table}


@pytest.mark.parametrize("figure", ["frechet", "frechet_extrapolated", "kernel_distance"])
def test_distances_order_held_out_blurred_shuffled_noise(rows, figure):
    values = [rows[n][figure] for n in ("held-out", "gentle blur", "blur", "shuffled", "noise")]
    assert values == sorted(values)
    assert values[-1] > 15 * abs(values[0]), "no room between floor and ceiling"
    assert values[2] > 2 * abs(values[0])


def test_grain_shows_in_the_texture(rows):
    assert rows["grainy"]["texture"] > 5 * rows["held-out"]["texture"]
    assert rows["grainy"]["frechet"] > 1.2 * rows["held-out"]["frechet"]
    assert rows["grainy"]["clipped"] > 0.1 > rows["held-out"]["clipped"] == 0.0


def test_accuracy_is_about_the_labels_asked_for(rows):
    assert rows["held-out"]["accuracy"] >= 0.97
    assert rows["wrong labels"]["accuracy"] < 0.03
    assert rows["noise"]["accuracy"] < 0.3
    assert rows["one class"]["accuracy"] is None
    assert rows["wrong labels"]["frechet"] == rows["held-out"]["frechet"]


def test_collapse_and_copies_are_seen(rows):
    collapsed = rows["one class"]
    assert collapsed["frechet"] > 10 * rows["held-out"]["frechet"]
    assert collapsed["recall"] < 0.3 and collapsed["precision"] > 0.9
    assert collapsed["class_tv"] > 0.8 > rows["held-out"]["class_tv"]
    assert rows["copies"]["frechet"] < rows["held-out"]["frechet"]
    assert rows["copies"]["nearest_train"] < 1e-6 < 0.1 < rows["held-out"]["nearest_train"]


def test_precision_and_recall_of_the_extremes(rows):
    assert min(rows["held-out"]["precision"], rows["held-out"]["recall"]) > 0.75
    assert rows["noise"]["precision"] < 0.05 and rows["shuffled"]["precision"] < 0.1


def test_output_says_what_it_was_measured_with(quality, rows, tmp_path):
    row = rows["held-out"]
    assert (row["n_real"], row["n_fake"], row["features"]) == (1497, 300, 48)
    assert row["feature_checksum"] == quality.classifier.checksum
    write_json(tmp_path / "metrics.json", rows)
    assert read_json(tmp_path / "metrics.json")["noise"] == rows["noise"]


def test_floor_and_ceiling(quality, judged_digits, rows):
    floor = quality.floor(judged_digits.test_images, judged_digits.test_labels)
    assert floor == {k: v for k, v in rows["held-out"].items() if k != "name"}
    ceiling = quality.ceiling(noise_images(jax.random.key(0), 300, (8, 8, 1)))
    assert ceiling["frechet"] == rows["noise"]["frechet"] and ceiling["accuracy"] is None
    with pytest.raises(ValueError, match="these are the training images"):
        quality.floor(judged_digits.train_images[:60])


def test_compare_thins_to_one_size(quality, judged_digits):
    a, b = judged_digits.test_images, judged_digits.train_images
    got = quality.compare({"a": (a, None), "b": (b, judged_digits.train_labels)}, size=120, seed=3)
    assert [row["n_fake"] for row in got] == [120, 120]
    assert got[1]["accuracy"] > 0.97, "labels must follow their images"
    with pytest.raises(ValueError, match="'a' has 300 images, 301 were asked for"):
        quality.compare({"a": (a, None), "b": (b, None)}, size=301)
    with pytest.raises(ValueError, match="at least one set"):
        quality.compare({})


def test_few_images_have_no_extrapolation_and_fewer_are_refused(quality, judged_digits):
    assert quality.evaluate(judged_digits.test_images[:60])["frechet_extrapolated"] is None
    with pytest.raises(ValueError, match=r"48 fake vectors .* at least 49"):
        quality.evaluate(judged_digits.test_images[:48])


def test_refusals(quality, judged_digits):
    images = judged_digits.test_images[:60].copy()
    with pytest.raises(ValueError, match="labels must be 60 integers"):
        quality.evaluate(images, np.zeros(3, int))
    with pytest.raises(ValueError, match="takes images"):
        quality.evaluate(images[:, :7])
    images[0, 0, 0, 0] = np.inf
    with pytest.raises(ValueError, match="1 pixel values are infinite"):
        quality.evaluate(images)
    images[0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="hold NaN"):
        quality.evaluate(images)
    with pytest.raises(ValueError, match="value_range"):
        ImageQuality(images, np.zeros(60, int), jax.random.key(0), value_range=(1, -1))
