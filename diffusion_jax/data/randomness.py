"""Random numbers that depend on their key alone: not on numpy's version, threads or call order.

Only raw bit streams are used (NEP 19 guarantees those of a BitGenerator; it lets the streams of
`numpy.random.Generator` methods change between versions), so that a run resumed on another machine
sees the same batches.

`hash_rows` and `uniforms` iterate the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast
Splittable Pseudorandom Number Generators"), vectorised over the rows of a batch.
"""

import functools

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@functools.lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..count-1 keyed by (seed, epoch): the sorting order of 64-bit random words.

    Ties (probability below count^2 / 2^65) fall to the smaller row. The last four are kept, as the
    batches of an epoch share one; the array is read-only.

    Returns:
      int64 [count].
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def hash_rows(rows: np.ndarray, *key: int) -> np.ndarray:
    """One random word for each row, keyed by (key..., row).

    Args:
      rows: nonnegative integers [B].
      key: nonnegative integers below 2^64.

    Returns:
      uint64 [B].
    """
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _mix(state + _GOLDEN + np.array([word], np.uint64))
    return _mix(state + _GOLDEN + np.asarray(rows).astype(np.uint64))


def uniforms(words: np.ndarray, draws: int) -> np.ndarray:
    """Independent uniform numbers in [0, 1) from one word per row: uint64 [B] -> float64 [B, draws]."""
    counters = np.arange(1, draws + 1).astype(np.uint64) * _GOLDEN
    bits = _mix(words[:, None] + counters[None, :])
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def normals(words: np.ndarray, draws: int) -> np.ndarray:
    """Independent standard normal numbers (Box and Muller 1958): uint64 [B] -> float32 [B, draws]."""
    half = -(-draws // 2)
    flat = uniforms(words, 2 * half)
    length = np.sqrt(-2 * np.log1p(-flat[:, :half])).astype(np.float32)
    angle = (2 * np.pi * flat[:, half:]).astype(np.float32)
    return np.concatenate([length * np.cos(angle), length * np.sin(angle)], axis=1)[:, :draws]
