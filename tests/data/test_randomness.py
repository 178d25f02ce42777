import collections
import itertools

import numpy as np
import pytest
import scipy.stats

from diffusion_jax.data import randomness


def test_uniforms_continue_the_published_splitmix64_sequence():
    # The first outputs of SplitMix64 from the state 1234567, as printed by reference programs.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    got = randomness.uniforms(np.array([1234567], np.uint64), 5)[0]
    assert got.tolist() == [(word >> 11) / 2**53 for word in published]


def test_permutation_is_pinned():
    # Resumed runs depend on these bits; they follow from the raw Philox stream alone.
    words = np.random.Philox(key=np.array([3, 1], np.uint64)).random_raw(6).tolist()
    by_hand = sorted(range(6), key=lambda i: words[i])
    assert randomness.permutation(6, 3, 1).tolist() == by_hand
    assert randomness.permutation(10, 0, 0).tolist() == PINNED
    assert not randomness.permutation(10, 0, 0).flags.writeable


PINNED = [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


def test_all_permutations_are_equally_likely():
    counts = collections.Counter(tuple(randomness.permutation(4, s, 5)) for s in range(4800))
    assert set(counts) == set(itertools.permutations(range(4)))
    chi2 = sum((n - 200) ** 2 / 200 for n in counts.values())
    assert chi2 < 55  # 23 degrees of freedom: 23 +- 6.8, so below 4.7 standard deviations


def test_keys_are_independent():
    rows = np.arange(20_000)
    draws = [
        randomness.uniforms(randomness.hash_rows(rows, *key), 2) for key in ((0, 1), (1, 0), (0, 2))
    ]
    columns = np.concatenate(draws, axis=1)
    error = 4 / np.sqrt(len(rows))
    assert np.abs(columns.mean(0) - 0.5).max() < error * np.sqrt(1 / 12)
    assert np.abs(np.corrcoef(columns.T) - np.eye(6)).max() < error
    serial = np.corrcoef(columns[:-1].T, columns[1:].T)[:6, 6:]
    assert np.abs(serial).max() < error


@pytest.mark.parametrize("rows", [np.arange(8), np.arange(8, dtype=np.int32)])
def test_hash_rows_depends_on_the_row_alone(rows):
    whole = randomness.hash_rows(rows, 7, 9)
    assert randomness.hash_rows(rows[3:5], 7, 9).tolist() == whole[3:5].tolist()
    assert len(set(whole.tolist())) == 8


def test_normals_are_normal_and_belong_to_their_word():
    drawn = randomness.normals(randomness.hash_rows(np.arange(2000), 3), 7)
    assert drawn.shape == (2000, 7) and drawn.dtype == np.float32
    assert scipy.stats.kstest(drawn.ravel(), "norm").pvalue > 1e-3
    correlation = np.corrcoef(drawn.T) - np.eye(7)
    assert np.abs(correlation).max() < 5 / np.sqrt(2000)
    part = randomness.normals(randomness.hash_rows(np.array([9, 4]), 3), 7)
    np.testing.assert_array_equal(part, drawn[[9, 4]])
    assert np.isfinite(randomness.normals(np.zeros(1, np.uint64), 1)).all()
