import numpy as np
import pytest

from diffusion_jax.evaluation import text_metrics as tm


def test_entropy_closed_forms():
    np.testing.assert_allclose(tm.entropy([[1, 1, 1, 1], [5, 0, 0, 0]]), [np.log(4), 0.0])
    assert tm.entropy([3, 1]) == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_histogram_baseline_by_hand():
    # counts 3, 1, 0 plus one each: 4/7, 2/7, 1/7.
    got = tm.histogram_baseline([[0, 0], [0, 1]], [[2, 0, 1]], vocab_size=3)
    expected = -np.log(np.array([1, 4, 2]) / 7).mean()
    assert got["nats_per_token"] == pytest.approx(expected)
    assert got["bits_per_token"] == pytest.approx(expected / np.log(2))
    assert (got["tokens"], got["train_tokens"]) == (3, 4)


def test_baselines_reach_the_entropy_they_can_see():
    # Position 0 is always 0; then a chain that stays with probability 0.9.
    rng = np.random.default_rng(0)
    flips = rng.random((4000, 30)) < 0.1
    flips[:, 0] = False
    tokens = np.cumsum(flips, axis=1) % 2
    train, test = tokens[:2000], tokens[2000:]
    conditional = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))
    order0 = tm.histogram_baseline(train, test, 2)["nats_per_token"]
    position = tm.position_baseline(train, test, 2)["nats_per_token"]
    bigram = tm.bigram_baseline(train, test, 2)["nats_per_token"]
    p1 = (1 - 0.8 ** np.arange(30)) / 2
    marginal = -(p1 * np.log(np.maximum(p1, 1e-300)) + (1 - p1) * np.log(1 - p1))
    share = p1.mean()
    assert order0 == pytest.approx(
        -share * np.log(share) - (1 - share) * np.log(1 - share), rel=0.02
    )
    assert position == pytest.approx(marginal.mean(), rel=0.02)
    first = -np.log(1 - share)
    assert bigram == pytest.approx((29 * conditional + first) / 30, rel=0.03)
    assert bigram < position < order0


@pytest.mark.parametrize("name", ["histogram", "position", "bigram"])
def test_baselines_are_distributions_over_sequences(name):
    baseline = getattr(tm, f"{name}_baseline")
    train, vocabulary = np.array([[0, 1, 1], [2, 1, 0]]), 4
    every = np.stack(np.meshgrid(*[np.arange(vocabulary)] * 3), axis=-1).reshape(-1, 3)
    scores = [3 * baseline(train, row[None], vocabulary)["nats_per_token"] for row in every]
    assert np.exp(-np.array(scores)).sum() == pytest.approx(1.0)


def test_unseen_tokens_cost_a_finite_amount():
    for baseline in (tm.histogram_baseline, tm.position_baseline, tm.bigram_baseline):
        assert 0 < baseline([[0, 0]], [[1, 1]], vocab_size=2)["nats_per_token"] < 3
        with pytest.raises(ValueError, match="smoothing must be positive"):
            baseline([[0, 0]], [[1, 1]], vocab_size=2, smoothing=0)


def test_counts_and_ngrams():
    tokens = np.array([[0, 1, 0, 1], [0, 1, 2, 2]])
    np.testing.assert_array_equal(tm.token_counts(tokens, 4), [3, 3, 2, 0])
    # bigrams: 01 10 01 | 01 12 22
    assert tm.distinct_ngrams(tokens, 2) == pytest.approx(4 / 6)
    assert tm.distinct_ngrams(tokens, 4) == 1.0
    assert tm.ngram_overlap(tokens, [[3, 0, 1, 3]], 2) == pytest.approx(3 / 6)
    assert tm.ngram_overlap(tokens, tokens, 4) == 1.0
    assert tm.unique_fraction([[1, 2], [1, 2], [2, 1], [1, 2]]) == 0.5


def test_ngrams_do_not_cross_sequences():
    assert tm.ngram_overlap([[0, 1], [2, 3]], [[1, 2], [3, 0]], 2) == 0.0


def test_divergence_limits():
    same = np.array([[0, 1, 2, 0, 1, 2]])
    assert tm.ngram_divergence(same, np.repeat(same, 3, axis=0)) == pytest.approx(0, abs=1e-12)
    assert tm.ngram_divergence([[0, 1, 0]], [[2, 3, 2]]) == pytest.approx(np.log(2))
    # p = (1/2, 1/2), q = (1, 0)
    expected = tm.entropy([3, 1]) - tm.entropy([1, 1]) / 2
    assert tm.ngram_divergence([[0, 1]], [[0, 0]], n=1) == pytest.approx(float(expected))


def test_refusals():
    with pytest.raises(ValueError, match=r"test must be in 0 \.\. 1, got 0 \.\. 2"):
        tm.histogram_baseline([[0, 1]], [[0, 2]], vocab_size=2)
    with pytest.raises(ValueError, match="must be integers, got float64"):
        tm.token_counts([[0.0]], 2)
    with pytest.raises(ValueError, match="one length, got 2 and 3"):
        tm.position_baseline([[0, 1]], [[0, 1, 1]], vocab_size=2)
    with pytest.raises(ValueError, match=r"n must be in 1 \.\. 2 .*, got 3"):
        tm.distinct_ngrams([[0, 1]], 3)
    with pytest.raises(ValueError, match="at least one"):
        tm.entropy([0, 0])
