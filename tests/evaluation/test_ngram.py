import collections

import numpy as np
import pytest

from diffusion_jax.evaluation import NGramJudge


def by_hand(train, row, place, order, vocab_size, strength):
    """The recursion of the module, with dictionaries and text."""
    p = 1.0 / vocab_size
    for n in range(1, order + 1):
        if place - n + 1 < 0:
            break
        grams, contexts = collections.Counter(), collections.Counter()
        for one in train:
            for i in range(len(one) - n + 1):
                gram = tuple(one[i : i + n])
                grams[gram] += 1
                contexts[gram[:-1]] += 1
        gram = tuple(row[place - n + 1 : place + 1])
        p = (grams[gram] + strength * p) / (contexts[gram[:-1]] + strength)
    return -np.log(p)


def test_against_counting_by_hand():
    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 3, (8, 7)), rng.integers(0, 3, (3, 6))
    judge = NGramJudge(train, 3, order=3, strength=1.5)
    found = judge.token_nats(test)
    lists = train.tolist()
    expected = [[by_hand(lists, r, i, 3, 3, 1.5) for i in range(6)] for r in test.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert judge.nats(test) == pytest.approx(found.mean())


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(1)
    judge = NGramJudge(rng.integers(0, 5, (4, 9)), 5, order=4)
    context = rng.integers(0, 5, 6)
    rows = np.array([[*context, v] for v in range(5)])
    assert np.exp(-judge.token_nats(rows)[:, -1]).sum() == pytest.approx(1.0, abs=1e-12)


def test_longer_contexts_know_more():
    rng = np.random.default_rng(2)
    steps = rng.integers(1, 3, (400, 32)).cumsum(axis=1) % 7  # a Markov chain of two branches
    train, test = steps[:300], steps[300:]
    nats = [NGramJudge(train, 7, order=order).nats(test) for order in (1, 2, 3)]
    assert nats[0] == pytest.approx(np.log(7), abs=0.05)
    assert nats[1] == pytest.approx(np.log(2), abs=0.08)
    assert abs(nats[2] - nats[1]) < 0.05


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(order=0), "order must be in 1"),
        (dict(order=9), "order must be in 1"),
        (dict(strength=0.0), "strength must be positive"),
        (dict(vocab_size=2), "must be in 0"),
        (dict(vocab_size=2**40, order=2), "63 bits"),
    ],
)
def test_mistakes(arguments, message):
    train = np.arange(24).reshape(3, 8) % 4
    with pytest.raises(ValueError, match=message):
        NGramJudge(**{"train": train, "vocab_size": 4, **arguments})
    with pytest.raises(ValueError, match="must be integers"):
        NGramJudge(train, 4).nats(train * 0.5)
