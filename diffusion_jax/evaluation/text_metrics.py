"""Figures for token sequences: baselines in nats, entropies, n-gram overlap and diversity.

A masked or autoregressive model reports nats per token. Three models that need no training give the
scale: one histogram for all tokens (order 0), one histogram per position, and a bigram table. Their
counts come from training sequences and are smoothed, so no held-out token has zero probability.

Everything is NumPy in float64 on the host; sequences are integers [N, L] in 0 .. V-1. Tokenised
images count as sequences of their pixels, and nats per token is then nats per pixel.
"""

import numpy as np

_NATS_PER_BIT = float(np.log(2.0))


def check_tokens(tokens, vocab_size: int | None = None, name: str = "tokens") -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"{name} must be a non-empty [N, L] array, got shape {tokens.shape}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{name} must be integers, got {tokens.dtype}")
    tokens = tokens.astype(np.int64)
    if vocab_size is not None and (tokens.min() < 0 or tokens.max() >= vocab_size):
        raise ValueError(
            f"{name} must be in 0 .. {vocab_size - 1}, got {tokens.min()} .. {tokens.max()}"
        )
    return tokens


def _check_smoothing(smoothing: float) -> None:
    if not smoothing > 0:
        raise ValueError(
            f"smoothing must be positive (an unseen token costs infinity), got {smoothing}"
        )


def _summary(log_probabilities: np.ndarray, train: np.ndarray) -> dict:
    nats = float(-log_probabilities.mean())
    return {
        "nats_per_token": nats,
        "bits_per_token": nats / _NATS_PER_BIT,
        "tokens": int(log_probabilities.size),
        "train_tokens": int(train.size),
    }


def token_counts(tokens, vocab_size: int) -> np.ndarray:
    """How often each token occurs, int64 [V].

    Raises:
      ValueError: tokens are not integers [N, L] in 0 .. V-1.
    """
    return np.bincount(check_tokens(tokens, vocab_size).ravel(), minlength=vocab_size)


def entropy(counts, *, axis: int = -1) -> np.ndarray:
    """Entropy in nats of the empirical distribution of counts [..., V], float64 [...].

    The plug-in estimate: too low by about (V - 1) / (2 n) nats for n tokens.

    Raises:
      ValueError: a negative count or a row without any.
    """
    counts = np.asarray(counts, np.float64)
    total = counts.sum(axis=axis, keepdims=True)
    if counts.size == 0 or counts.min() < 0 or total.min() <= 0:
        raise ValueError("counts must be non-negative and every row must hold at least one")
    p = counts / total
    return -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=axis)


def histogram_baseline(train, test, vocab_size: int, *, smoothing: float = 1.0) -> dict:
    """Nats per held-out token of one histogram p(v) = (c(v) + s) / (n + s V) for all positions.

    Args:
      train: [N, L] sequences that give the counts.
      test: [M, K] sequences that are scored.
      vocab_size: V.
      smoothing: s, pseudo-count per token.

    Returns:
      {"nats_per_token", "bits_per_token", "tokens", "train_tokens"}.

    Raises:
      ValueError: tokens out of range or smoothing <= 0.
    """
    _check_smoothing(smoothing)
    train, test = check_tokens(train, vocab_size, "train"), check_tokens(test, vocab_size, "test")
    counts = token_counts(train, vocab_size) + smoothing
    return _summary(np.log(counts / counts.sum())[test], train)


def position_baseline(train, test, vocab_size: int, *, smoothing: float = 1.0) -> dict:
    """As `histogram_baseline` with one histogram per position (both sets of the same length L).

    Raises:
      ValueError: lengths differ, tokens out of range or smoothing <= 0.
    """
    _check_smoothing(smoothing)
    train, test = check_tokens(train, vocab_size, "train"), check_tokens(test, vocab_size, "test")
    length = train.shape[1]
    if test.shape[1] != length:
        raise ValueError(f"train and test must have one length, got {length} and {test.shape[1]}")
    positions = np.arange(length)
    flat = (positions * vocab_size + train).ravel()
    counts = np.bincount(flat, minlength=length * vocab_size).reshape(length, vocab_size)
    probabilities = (counts + smoothing) / (len(train) + smoothing * vocab_size)
    return _summary(np.log(probabilities)[positions, test], train)


def bigram_baseline(train, test, vocab_size: int, *, smoothing: float = 1.0) -> dict:
    """Nats per token of p(b | a) = (c(a, b) + s V p0(b)) / (c(a) + s V), p0 the order-0 histogram.

    The first token of a sequence is scored by p0. Memory O(V^2).

    Raises:
      ValueError: tokens out of range or smoothing <= 0.
    """
    _check_smoothing(smoothing)
    train, test = check_tokens(train, vocab_size, "train"), check_tokens(test, vocab_size, "test")
    order0 = token_counts(train, vocab_size) + smoothing
    order0 = order0 / order0.sum()
    pairs = (train[:, :-1] * vocab_size + train[:, 1:]).ravel()
    counts = np.bincount(pairs, minlength=vocab_size**2).reshape(vocab_size, vocab_size)
    weight = smoothing * vocab_size
    table = (counts + weight * order0) / (counts.sum(axis=1, keepdims=True) + weight)
    scores = [np.log(order0)[test[:, :1]], np.log(table)[test[:, :-1], test[:, 1:]]]
    return _summary(np.concatenate(scores, axis=1), train)


def _ngrams(tokens: np.ndarray, n: int) -> np.ndarray:
    """All n-grams of the rows, [N (L - n + 1), n]."""
    if not 1 <= n <= tokens.shape[1]:
        raise ValueError(f"n must be in 1 .. {tokens.shape[1]} (the sequence length), got {n}")
    windows = np.lib.stride_tricks.sliding_window_view(tokens, n, axis=1)
    return windows.reshape(-1, n)


def distinct_ngrams(samples, n: int = 2) -> float:
    """Different n-grams divided by all n-grams of the samples (Li et al., arXiv 1510.03055).

    Falls with the number of samples: compare sets of equal size.

    Raises:
      ValueError: tokens are not integers [N, L], or n is not in 1 .. L.
    """
    grams = _ngrams(check_tokens(samples, name="samples"), n)
    return len(np.unique(grams, axis=0)) / len(grams)


def unique_fraction(samples) -> float:
    """Different sequences divided by all sequences; 1 unless the sampler repeats itself.

    Raises:
      ValueError: tokens are not integers [N, L].
    """
    samples = check_tokens(samples, name="samples")
    return len(np.unique(samples, axis=0)) / len(samples)


def _joint_counts(samples, reference, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Counts of every n-gram that occurs in either set, in one common order."""
    a = _ngrams(check_tokens(samples, name="samples"), n)
    b = _ngrams(check_tokens(reference, name="reference"), n)
    _, index = np.unique(np.concatenate([a, b]), axis=0, return_inverse=True)
    index = index.ravel()
    size = int(index.max()) + 1
    return np.bincount(index[: len(a)], minlength=size), np.bincount(
        index[len(a) :], minlength=size
    )


def ngram_overlap(samples, reference, n: int = 3) -> float:
    """Share of the samples' n-grams (counted with repeats) that occur anywhere in the reference.

    High for small n means plausible local structure; near 1 for large n means copying. Held-out
    sequences give the value to expect.

    Raises:
      ValueError: tokens are not integers [N, L], or n is longer than a sequence.
    """
    a, b = _joint_counts(samples, reference, n)
    return float(a[b > 0].sum() / a.sum())


def ngram_divergence(samples, reference, n: int = 2) -> float:
    """Jensen-Shannon divergence between the n-gram frequencies of two sets, nats in [0, log 2].

    Biased upwards for few samples, as every plug-in estimate of a divergence.

    Raises:
      ValueError: tokens are not integers [N, L], or n is longer than a sequence.
    """
    a, b = _joint_counts(samples, reference, n)
    p, q = a / a.sum(), b / b.sum()
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return float(max(divergence, 0.0))
