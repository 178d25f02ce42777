"""Countdown: sequences in which a number is followed by the one below it, and 0 by any number.

    python -m experiments.lsd.countdown countdown.npz

Tokens must agree with their neighbours, so drawing many at once goes wrong in a way that can be counted.
"""

import sys

import numpy as np

VOCAB, LENGTH = 32, 64


def sequences(count: int, seed: int = 0, length: int = LENGTH, vocab: int = VOCAB) -> np.ndarray:
    """`count` sequences, int32 `[count, length]`."""
    rng = np.random.default_rng(seed)
    tokens = np.empty((count, length), np.int32)
    tokens[:, 0] = rng.integers(0, vocab, count)
    for i in range(1, length):
        fresh = rng.integers(0, vocab, count)
        tokens[:, i] = np.where(tokens[:, i - 1] > 0, tokens[:, i - 1] - 1, fresh)
    return tokens


def error_rate(tokens) -> float:
    """Share of the numbers above 0 that are not followed by the one below them."""
    tokens = np.asarray(tokens)
    bound = tokens[:, :-1] > 0
    wrong = bound & (tokens[:, 1:] != tokens[:, :-1] - 1)
    return float(wrong.sum() / max(bound.sum(), 1))


def write(path) -> None:
    """The file that `configs/text/countdown_*.py` read: 20,000 sequences and 1,000 held out."""
    np.savez(path, train_tokens=sequences(20_000, 0), test_tokens=sequences(1000, 1))


if __name__ == "__main__":
    write(sys.argv[1])
