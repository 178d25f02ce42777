import numpy as np
import pytest
from sklearn.datasets import load_digits

from diffusion_jax import data


def test_normalisation_and_labels():
    everything = data.digits(split="all")
    pixels, labels = load_digits(return_X_y=True)
    taken = everything.take(np.arange(1797))
    np.testing.assert_array_equal((taken["image"].reshape(1797, 64) + 1) * 8, pixels)
    np.testing.assert_array_equal(taken["label"], labels)
    assert taken["image"].min() == -1 and taken["image"].max() == 1
    assert everything.spec.num_classes == 10 and everything.spec.class_names[3] == "3"


def test_split_is_disjoint_complete_and_stratified():
    train, test = data.digits(split="train"), data.digits(split="test")
    assert (len(train), len(test)) == (1497, 300)

    def rows(source):
        taken = source.take(np.arange(len(source)))
        return sorted(zip(map(bytes, taken["image"]), taken["label"].tolist())), taken["label"]

    (a, _), (b, labels_b) = rows(train), rows(test)
    everything, labels = rows(data.digits(split="all"))
    assert sorted(a + b) == everything
    assert len(set(everything)) == 1797  # no two digits are alike, so the parts share none
    expected = 300 * np.bincount(labels) / 1797
    assert np.abs(np.bincount(labels_b) - expected).max() < 1


def test_tokens_are_the_same_digits():
    for split in ("train", "test"):
        images, tokens = data.digits(split=split), data.digits_tokens(split=split)
        rows = np.arange(len(images))
        a, b = images.take(rows), tokens.take(rows)
        np.testing.assert_array_equal((a["image"].reshape(-1, 64) + 1) * 8, b["tokens"])
        np.testing.assert_array_equal(a["label"], b["label"])
        shown = tokens.spec.decode(b["tokens"]).astype(int) - images.spec.decode(a["image"])
        assert np.abs(shown).max() <= 1  # level * 255 / 16, rounded twice
    assert tokens.spec.vocab_size == 17 and b["tokens"].max() == 16


@pytest.mark.parametrize("build", [data.digits, data.digits_tokens])
def test_unknown_split(build):
    with pytest.raises(ValueError, match="unknown split 'valid'; valid: train, test, all"):
        build(split="valid")
