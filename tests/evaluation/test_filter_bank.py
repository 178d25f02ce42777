"""Figures without classes: what the fixed features see, and what `ImageQuality` makes of them."""

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.signal

from diffusion_jax import data
from diffusion_jax.data import corruptions
from diffusion_jax.evaluation.filter_bank import FilterBank, feature_count, raw_features
from diffusion_jax.evaluation.quality import ImageQuality, noise_images


def colour_images(count=3, shape=(16, 12, 3), seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, *shape)).astype(np.float32)


def by_hand(image):
    """The features of one RGB image, in NumPy's own words and float64."""
    r, g, b = np.moveaxis(image.astype(np.float64), -1, 0)
    planes = [0.299 * r + 0.587 * g + 0.114 * b, (r - g) / 2, (r - b) / 2]
    height, width = r.shape
    halves = (
        [np.s_[: height // 2], np.s_[height // 2 :]],
        [np.s_[: width // 2], np.s_[width // 2 :]],
    )
    found = [[p.mean() for p in planes], [np.log(0.01 + p.std()) for p in planes]]
    found += [[p[y, x].mean() for p in planes] for y in halves[0] for x in halves[1]]
    kernels = (
        np.array([[-1, 1], [-1, 1]]) / 2,
        np.array([[-1, -1], [1, 1]]) / 2,
        np.array([[-1, 0], [0, 1]]),
        np.array([[0, -1], [1, 0]]),
    )
    for scale in range(2):
        if scale:
            taps = np.array([1, 4, 6, 4, 1]) / 16
            window = np.outer(taps, taps)
            planes = [scipy.ndimage.correlate(p, window, mode="nearest") for p in planes]
            planes = [p[::2, ::2] for p in planes]
        for kernel in kernels:
            slopes = [scipy.signal.correlate2d(p, kernel, "valid") for p in planes]
            found.append([np.log(0.01 + np.sqrt((s**2).mean())) for s in slopes])
    return np.array(found).ravel()


def test_features_by_hand():
    images = colour_images()
    expected = np.stack([by_hand(image) for image in images])
    assert expected.shape[1] == feature_count((16, 12, 3)) == 42
    np.testing.assert_allclose(raw_features(images), expected, atol=2e-5)


@pytest.mark.parametrize("shape, count", [((4, 9, 1), 10), ((8, 8, 2), 28), ((32, 32, 3), 54)])
def test_sizes(shape, count):
    bank = FilterBank(colour_images(5, shape))
    assert feature_count(shape) == count
    features = bank.features(colour_images(600, shape, seed=1))
    assert features.shape == (600, count) and features.dtype == np.float32
    part = bank.features(colour_images(600, shape, seed=1)[590:])
    np.testing.assert_allclose(part, features[590:], atol=2e-4)


def test_features_are_scaled_on_the_training_images():
    images = colour_images(50)
    features = FilterBank(images).features(images)
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(0), 1, atol=1e-3)
    flat = np.zeros((4, 8, 8, 1), np.float32)
    assert np.isfinite(FilterBank(flat).features(flat + 0.5)).all()


def test_the_checksum_names_the_space():
    images = colour_images(9)
    assert FilterBank(images).checksum == FilterBank(images).checksum
    assert FilterBank(images).checksum != FilterBank(images[::-1] * 0.9).checksum


@pytest.fixture(scope="module")
def rows():
    train, test = (data.photos(split, size=16, stride=8) for split in ("train", "test"))
    images = train.take(range(len(train)))["image"]
    judge = ImageQuality(images, None, jax.random.key(0))
    held = test.take(range(len(test)))["image"]
    every = np.arange(len(held))
    rng = np.random.default_rng(0)
    grain = rng.normal(size=held.shape).astype(np.float32)
    noise = noise_images(jax.random.key(1), len(held), held.shape[1:])
    sets = {
        "held-out": held,
        "faint grain": held + 0.05 * grain,
        "grain": held + 0.2 * grain,
        "slight blur": corruptions.blur(held, every, sigma=0.7),
        "blur": corruptions.blur(held, every, sigma=2.0),
        "grey": corruptions.grey(held, every),
        "upside down": held[:, ::-1],
        "noise": noise,
    }
    return {row["name"]: row for row in judge.compare({k: (v, None) for k, v in sets.items()})}


@pytest.mark.parametrize("figure", ["frechet", "kernel_distance"])
@pytest.mark.parametrize(
    "order",
    [
        ("held-out", "faint grain", "grain", "noise"),
        ("held-out", "slight blur", "blur", "noise"),
        ("held-out", "grey"),
        ("held-out", "upside down", "noise"),
    ],
)
def test_distances_grow_with_what_is_done_to_photographs(rows, figure, order):
    values = [rows[name][figure] for name in order]
    assert values == sorted(values) and values[-1] > 1.3 * values[0]


def test_rows_without_classes(rows):
    row = rows["held-out"]
    assert row["texture"] is row["accuracy"] is row["class_tv"] is None
    assert row["features"] == 54 and len(row["feature_checksum"]) == 16


def test_refusals():
    bank = FilterBank(colour_images(60))
    with pytest.raises(ValueError, match=r"of shape \(16, 12, 3\); got \(2, 8, 8, 1\)"):
        bank.features(colour_images(2, (8, 8, 1)))
    with pytest.raises(ValueError, match="1 of 3 images hold NaN"):
        bank.features(np.where(np.arange(3)[:, None, None, None] == 1, np.nan, colour_images()))
    with pytest.raises(ValueError, match="H and W at least 4"):
        FilterBank(colour_images(5, (3, 9, 1)))
    with pytest.raises(ValueError, match="two training images"):
        FilterBank(colour_images(1))
    judge = ImageQuality(colour_images(60), None, jax.random.key(0))
    with pytest.raises(ValueError, match="training images have no classes"):
        judge.evaluate(colour_images(60), np.zeros(60, int))
