import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.evaluation import classifier as module
from diffusion_jax.evaluation.classifier import (
    Classifier,
    Settings,
    apply,
    load_or_train,
    train_classifier,
)
from diffusion_jax.objectives.features import convolve

TINY = Settings(features=5, channels=(3, 4), steps=6, batch_size=8)


def toy(count=40, shape=(6, 7, 2), classes=3):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, size=(count, *shape)).astype(np.float32)
    return images, (np.arange(count) % classes).astype(np.int32)


def leaves(classifier):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(classifier.params)]


@pytest.fixture(scope="module")
def tiny():
    return train_classifier(*toy(), jax.random.key(1), settings=TINY)


def test_knows_held_out_digits(quality, judged_digits):
    held_out = judged_digits.test_images, judged_digits.test_labels
    assert quality.classifier.accuracy(*held_out) >= 0.97
    noise = np.random.default_rng(0).normal(size=held_out[0].shape)
    assert quality.classifier.accuracy(noise, held_out[1]) < 0.3


def test_one_key_gives_the_same_bits(quality, judged_digits):
    train = judged_digits.train_images, judged_digits.train_labels
    again = train_classifier(*train, jax.random.key(0))
    for a, b in zip(leaves(quality.classifier), leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert again.checksum == quality.classifier.checksum
    other = train_classifier(*train, jax.random.key(1))
    assert other.checksum != again.checksum
    assert other.accuracy(judged_digits.test_images, judged_digits.test_labels) >= 0.97


def test_features_are_standardised_on_the_training_images(quality, judged_digits):
    outputs = quality.classifier.outputs(judged_digits.train_images)
    features, texture = (outputs[n].astype(np.float64) for n in ("features", "texture"))
    assert features.shape == (len(judged_digits.train_images), 48) and texture.shape[1] == 24
    np.testing.assert_allclose(features.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(features.std(0), 1, rtol=1e-3)
    np.testing.assert_allclose(texture.mean(0), 0, atol=1e-3)
    assert texture.var(0).mean() == pytest.approx(1, rel=1e-3)
    assert np.linalg.cond(np.cov(features.T)) < 1e4, "statistics must be well conditioned"


def test_convolution_is_the_convolution():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 6, 3)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(27, 5)), jnp.float32)
    bias = jnp.arange(5, dtype=jnp.float32)
    for stride in (1, 2):
        expected = jax.lax.conv_general_dilated(
            x,
            kernel.reshape(3, 3, 3, 5),
            (stride, stride),
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        got = convolve({"kernel": kernel, "bias": bias}, x, stride)
        np.testing.assert_allclose(got, expected + bias.reshape(1, 1, 1, 5), atol=1e-4)


def test_any_number_of_images_gives_the_same_rows(tiny):
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, size=(600, 6, 7, 2)).astype(np.float32)
    whole = tiny.outputs(images)
    assert {k: v.shape for k, v in whole.items()} == {
        "features": (600, 5),
        "texture": (600, 3),
        "logits": (600, 3),
    }
    direct = apply(tiny.params, jnp.asarray(images[500:510]))
    for name, value in direct.items():
        np.testing.assert_allclose(whole[name][500:510], value, atol=1e-4)
    np.testing.assert_array_equal(tiny.features(images[:3]), tiny.outputs(images[:3])["features"])
    assert tiny.classes == 3


def test_transforms_reach_the_features(tiny):
    image = jnp.asarray(toy()[0][0])
    total = lambda x: apply(tiny.params, x[None])["features"].sum()
    gradient = jax.jit(jax.grad(total))(image)
    assert gradient.shape == image.shape and np.abs(gradient).max() > 0


def test_training_is_strict_compiles_once_and_takes_larger_images(monkeypatch):
    images, labels = toy(count=10, shape=(20, 18, 1), classes=2)
    traces, init = [], module._init
    monkeypatch.setattr(module, "_init", lambda *args: traces.append(1) or init(*args))
    with jax.numpy_rank_promotion("raise"), jax.debug_key_reuse(True):
        for seed in range(3):
            settings = dataclasses.replace(TINY)
            big = train_classifier(images, labels, jax.random.key(seed), settings=settings)
    assert len(traces) == 1
    assert big.features(images).shape == (10, 5)
    assert big.params["hidden"]["kernel"].shape == (5 * 5 * 4, 5)


def test_saved_and_loaded(tiny, tmp_path):
    path = tiny.save(tmp_path / "cache" / "judge.npz")
    loaded = Classifier.load(path)
    assert (loaded.shape, loaded.recipe) == (tiny.shape, tiny.recipe)
    assert loaded.checksum == tiny.checksum
    images = toy()[0]
    np.testing.assert_array_equal(loaded.features(images), tiny.features(images))


def test_damage_is_noticed(tiny, tmp_path):
    path = tiny.save(tmp_path / "judge.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["head/bias"] = arrays["head/bias"] + np.float32(1e-6)
    np.savez(path, **arrays)
    with pytest.raises(ValueError, match="damaged"):
        Classifier.load(path)
    path.write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match="not a saved classifier"):
        Classifier.load(path)
    np.savez(path, __meta__=np.array([{"format": 1}], dtype=object))
    with pytest.raises(ValueError, match="not a saved classifier"):
        Classifier.load(path)
    with pytest.raises(FileNotFoundError):
        Classifier.load(tmp_path / "absent.npz")


def test_cache_serves_its_own_recipe_only(tiny, tmp_path, monkeypatch):
    images, labels = toy()
    calls = []

    def train(images, labels, key, *, classes, settings):
        calls.append(1)
        return dataclasses.replace(tiny, recipe=module._recipe(images, labels, key, 3, settings))

    monkeypatch.setattr(module, "train_classifier", train)
    path = tmp_path / "judge.npz"
    get = lambda i, y, seed, s: load_or_train(path, i, y, jax.random.key(seed), settings=s)
    first = get(images, labels, 0, TINY)
    assert get(images, labels, 0, TINY).checksum == first.checksum and len(calls) == 1
    changed = images.copy()
    changed[0, 0, 0, 0] += 0.01
    for other in (
        (changed, labels, 0, TINY),
        (images, labels[::-1].copy(), 0, TINY),
        (images, labels, 1, TINY),
        (images, labels, 1, dataclasses.replace(TINY, learning_rate=1e-3)),
    ):
        before = len(calls)
        get(*other)
        get(*other)
        assert len(calls) == before + 1


def test_refusals(tiny):
    images, labels = toy()
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"typed key: jax.random.key"):
        train_classifier(images, labels, jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="labels must be 40 integers"):
        train_classifier(images, labels[:3], key)
    with pytest.raises(ValueError, match="below classes=2"):
        train_classifier(images, labels, key, classes=2)
    with pytest.raises(ValueError, match="1 of 40 images hold NaN"):
        broken = images.copy()
        broken[3, 0, 0, 0] = np.nan
        train_classifier(broken, labels, key)
    with pytest.raises(ValueError, match=r"takes images \(6, 7, 2\), got \(7, 6, 2\)"):
        tiny.features(np.swapaxes(images, 1, 2))
    with pytest.raises(ValueError, match="channels a pair"):
        Settings(channels=(3, 4, 5))
