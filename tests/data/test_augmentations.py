import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data import augmentations, randomness


def words(count):
    return randomness.hash_rows(np.arange(count), 3)


def batch(count=2000):
    images = np.random.default_rng(0).uniform(-1, 1, (count, 3, 4, 2)).astype(np.float32)
    return {"image": images, "source": -images, "label": np.arange(count)}


def test_flip_mirrors_half_of_the_pairs_alike():
    given = batch()
    got = augmentations.flip(given, words(2000))
    mirrored = (got["image"] == given["image"][:, :, ::-1]).all((1, 2, 3))
    kept = (got["image"] == given["image"]).all((1, 2, 3))
    assert (mirrored ^ kept).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(2000)
    np.testing.assert_array_equal(got["source"], -got["image"])
    assert got["label"] is given["label"]


def test_shift_moves_by_every_offset_equally():
    given = batch(900)
    got = augmentations.shift(given, words(900))
    padded = np.pad(given["image"], ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    counts = {}
    for dy in range(3):
        for dx in range(3):
            moved = padded[:, dy : dy + 3, dx : dx + 4]
            counts[dy, dx] = (got["image"] == moved).all((1, 2, 3)).sum()
    assert sum(counts.values()) == 900
    assert max(abs(n - 100) for n in counts.values()) < 4.5 * np.sqrt(100 * 8 / 9)
    np.testing.assert_array_equal(got["source"], -got["image"])


@pytest.mark.parametrize("augment", ["flip", ["flip", "shift2"], augmentations.flip])
def test_augmented_batches_are_pure_and_agree_across_hosts(augment):
    source = data.digits()
    whole = data.Pipeline(source, 64, seed=9, augment=augment)
    plain = data.Pipeline(source, 64, seed=9)
    for step in (0, 30):
        expected = whole.batch(step)["image"]
        assert (expected != plain.batch(step)["image"]).any()
        np.testing.assert_array_equal(whole.batch(step)["image"], expected)
        parts = [
            data.Pipeline(source, 64, seed=9, augment=augment, host=(h, 4)).batch(step)["image"]
            for h in range(4)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_steps_and_members_draw_anew():
    seen = []

    def record(batch, words):
        seen.append(tuple(words.tolist()))
        return batch

    pipeline = data.Pipeline(data.digits(), 4, augment=[record, record])
    pipeline.batch(0)
    pipeline.batch(1)
    assert len({word for words in seen for word in words}) == 16
