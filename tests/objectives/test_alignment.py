"""Monotonic alignment against enumeration, durations against `numpy.repeat`."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.objectives import alignment

RNG = np.random.default_rng(0)


def paths(symbols, frames):
    """Every monotonic path: the frames at which the symbol goes on by one."""
    for moves in itertools.combinations(range(1, frames), symbols - 1):
        yield np.searchsorted(np.array(moves), np.arange(frames), side="right")


def by_enumeration(scores, symbols, frames):
    totals = {tuple(path): scores[np.arange(frames), path].sum() for path in paths(symbols, frames)}
    return max(totals, key=totals.get)


CASES = [(1, 1), (1, 5), (2, 2), (2, 7), (3, 7), (4, 4), (4, 7), (4, 6)]


@pytest.fixture(scope="module")
def solved():
    scores = RNG.standard_normal((len(CASES), 7, 4)).astype(np.float32)
    padded = scores.copy()
    for row, (symbols, frames) in zip(padded, CASES):
        row[frames:], row[:, symbols:] = np.nan, np.nan  # nothing may be read there
    lengths = (jnp.array(v) for v in zip(*CASES))
    index, durations = jax.jit(alignment.monotonic_alignment)(padded, *lengths)
    return scores, np.asarray(index), np.asarray(durations)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_alignment_is_the_best_path(solved, case):
    scores, index, durations = (v[case] for v in solved)
    symbols, frames = CASES[case]
    expected = by_enumeration(scores, symbols, frames)
    np.testing.assert_array_equal(index[:frames], expected)
    np.testing.assert_array_equal(index[frames:], 4)
    np.testing.assert_array_equal(durations, np.bincount(expected, minlength=4))


def test_fewer_frames_than_symbols_and_ties():
    index, durations = alignment.monotonic_alignment(
        jnp.zeros((2, 3, 5)), jnp.array([5, 2]), jnp.array([3, 3])
    )
    np.testing.assert_array_equal(durations, [[1, 1, 1, 0, 0], [1, 2, 0, 0, 0]])
    np.testing.assert_array_equal(index, [[0, 1, 2], [0, 1, 1]])


def test_scores_are_those_of_unit_gaussians():
    mean, x = RNG.standard_normal((2, 3, 4)), RNG.standard_normal((2, 5, 4))
    got = alignment.unit_gaussian_scores(jnp.asarray(mean), jnp.asarray(x))
    full = -0.5 * np.square(x[:, :, None] - mean[:, None]).sum(axis=-1)
    # up to a term of the frame alone
    np.testing.assert_allclose(got - got[..., :1], full - full[..., :1], rtol=1e-5, atol=1e-5)


def test_alignment_is_a_constant():
    def cost(scores):
        _, durations = alignment.monotonic_alignment(scores, jnp.array([2]), jnp.array([4]))
        return scores[0, 0, 0] * durations[0, 0]

    scores = jnp.asarray(RNG.standard_normal((1, 4, 2)), jnp.float32)
    _, durations = alignment.monotonic_alignment(scores, jnp.array([2]), jnp.array([4]))
    slope = np.zeros((1, 4, 2))
    slope[0, 0, 0] = durations[0, 0]
    np.testing.assert_allclose(jax.grad(cost)(scores), slope)


def test_regulate_repeats_by_durations():
    values = RNG.standard_normal((3, 4, 2)).astype(np.float32)
    durations = np.array([[2, 0, 3, 1], [1, 1, 0, 0], [5, 4, 2, 1]])
    got, frames = alignment.regulate(jnp.asarray(values), jnp.asarray(durations), 8)
    np.testing.assert_array_equal(frames, [6, 2, 8])  # the third is cut off
    for row, value, count in zip(got, values, durations):
        expected = np.repeat(value, count, axis=0)[:8]
        np.testing.assert_array_equal(row, np.pad(expected, ((0, 8 - len(expected)), (0, 0))))
    index = alignment.index_of(jnp.asarray(durations), 12)
    np.testing.assert_array_equal(alignment.durations_of(index, 4), durations)


def test_durations_are_fitted_to_the_frames():
    weights = jnp.array([[1.0, 2.0, 1.0, 0.0], [3.0, 0.5, 0.25, 7.0]])
    frames = jnp.array([8, 23])
    fitted = alignment.fit_durations(weights, frames)
    np.testing.assert_array_equal(fitted[0], [2, 4, 2, 0])
    np.testing.assert_array_equal(fitted.sum(axis=1), frames)
    exact = weights * (frames / weights.sum(axis=1))[:, None]
    assert (abs(fitted - exact) <= 1.0).all()
    even = alignment.even_durations(jnp.array([3, 2]), jnp.array([7, 7]), 4)
    np.testing.assert_array_equal(even, [[2, 3, 2, 0], [4, 3, 0, 0]])


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"scores must be \[B, T, L\] .* got shapes \(2, 3\)"):
        alignment.monotonic_alignment(jnp.zeros((2, 3)), jnp.ones(2), jnp.ones(2))
