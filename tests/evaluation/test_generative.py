"""Texts under a language model: windows, perplexities, entropies, MAUVE."""

import builtins

import numpy as np
import pytest

from diffusion_jax.evaluation import generative as g

TABLE = np.log(np.random.default_rng(0).dirichlet(np.ones(7), size=7))


def bigram(tokens, last):
    """A language model that sees one token back, and counts what it is asked."""
    nats = np.zeros(tokens.shape)
    nats[:, 1:] = -TABLE[tokens[:, :-1], tokens[:, 1:]]
    return {"nats": nats, "features": np.stack([tokens[:, 0], last], axis=1).astype(np.float32)}


def texts(*lengths):
    rng = np.random.default_rng(1)
    return [rng.integers(0, 6, n) for n in lengths]


def test_windows_cover_every_token_once():
    some = texts(10, 3, 0, 8)
    parts = g.cut(some, 4)
    assert parts.text.tolist() == [0, 0, 0, 1, 3, 3] and parts.last.tolist() == [3, 3, 1, 2, 3, 3]
    for n, text in enumerate(some):
        rows = parts.text == n
        kept = np.concatenate(
            [t[: e + 1] for t, e in zip(parts.tokens[rows], parts.last[rows])] or [[]]
        )
        np.testing.assert_array_equal(kept, text)
    # the first token of each window has nothing before it
    assert parts.scored.sum() == (10 - 3) + (3 - 1) + (8 - 2)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_overlapping_windows_score_every_token_but_the_first_once(stride):
    some = texts(11, 4, 1, 5)
    found = g.score(bigram, some, 4, 2, stride=stride)
    assert found.tokens.tolist() == [10, 3, 0, 4]
    for text, nats in zip(some, found.nats):
        assert nats == pytest.approx(-TABLE[text[:-1], text[1:]].sum(), abs=1e-9)


def test_only_the_first_end_of_a_document_is_scored():
    text = np.array([1, 2, 6, 3, 6, 6, 0])
    found = g.score(bigram, [text], 8, 2, separator=6)
    pairs = [(1, 2), (2, 6), (6, 3), (6, 0)]
    assert found.tokens.tolist() == [4]
    assert found.nats[0] == pytest.approx(-sum(TABLE[pair] for pair in pairs))


def test_a_summary_is_over_all_tokens():
    some = texts(9, 30, 17)
    row = g.summary(g.score(bigram, some, 64, 2))
    each = np.concatenate([-TABLE[t[:-1], t[1:]] for t in some])
    assert row["tokens"] == 53 and row["texts"] == 3
    assert row["generative_perplexity"] == pytest.approx(np.exp(each.mean()))
    entropies = []
    for text in some:
        p = np.bincount(text) / len(text)
        entropies.append(-sum(q * np.log(q) for q in p if q))
    assert row["entropy"] == pytest.approx(np.mean(entropies))


def test_the_standard_error_is_the_spread_over_draws():
    rng = np.random.default_rng(2)
    rows = []
    for _ in range(200):
        some = [rng.integers(0, 6, n) for n in rng.integers(5, 40, 30)]
        rows.append(g.summary(g.score(bigram, some, 64, 2)))
    spread = np.std([row["nats_per_token"] for row in rows])
    assert np.mean([row["standard_error"] for row in rows]) == pytest.approx(spread, rel=0.2)


def test_features_are_of_the_first_window():
    found = g.score(bigram, texts(10, 3, 0), 4, 2)
    assert found.features[:, 1].tolist() == [3, 2, 0] and np.isnan(found.entropy[2])


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="window >= 2"):
        g.cut(texts(3), 1)
    with pytest.raises(ValueError, match=r"stride in 1\.\.window"):
        g.cut(texts(3), 4, stride=5)
    with pytest.raises(ValueError, match="no token"):
        g.summary(g.score(bigram, texts(1, 0), 4, 2))
    broken = lambda tokens, last: bigram(tokens, last) | {"nats": np.full(tokens.shape, np.nan)}
    with pytest.raises(ValueError, match="not finite"):
        g.score(broken, texts(5), 4, 2)


def test_mauve_without_its_library_names_the_extra(monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "mauve":
            raise ImportError(name)
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    features = np.random.default_rng(0).standard_normal((30, 4))
    with pytest.raises(ImportError, match=r"diffusion_jax\[mauve\]"):
        g.mauve(features, features)
    with pytest.raises(ValueError, match="20 texts or more"):
        g.mauve(features[:5], features)
    with pytest.raises(ValueError, match="differ in shape"):
        g.mauve(features, features[:, :3])


def test_mauve_tells_near_from_far():
    pytest.importorskip("mauve")
    rng = np.random.default_rng(0)
    real, near, far = (rng.standard_normal((200, 4)) + shift for shift in (0, 0, 6))
    assert g.mauve(real, near) > 0.9 > 0.1 > g.mauve(real, far)
