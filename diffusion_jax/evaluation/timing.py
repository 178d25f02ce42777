"""Wall-clock time of compiled functions, without the compilation."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Timing(NamedTuple):
    """Seconds per call.

    Attributes:
      first: the first call, with tracing and compilation.
      median, fastest, slowest: of the later calls.
      repeats: number of later calls.
    """

    first: float
    median: float
    fastest: float
    slowest: float
    repeats: int


def _seconds(fn: Callable[..., Any], args: tuple) -> float:
    start = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start


def time_call(fn: Callable[..., Any], *args: Any, repeats: int = 5) -> Timing:
    """Times `fn(*args)`: one call to compile, then `repeats` calls, each until its result is ready.

    Arguments are brought to the device by the caller; donated buffers cannot be passed twice.

    Raises:
      ValueError: repeats < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be 1 or more, got {repeats}")
    jax.block_until_ready(args)
    first = _seconds(fn, args)
    later = [_seconds(fn, args) for _ in range(repeats)]
    return Timing(first, statistics.median(later), min(later), max(later), repeats)


def seconds_per_thousand(fn: Callable[..., Any], n: int, *args: Any, repeats: int = 3) -> float:
    """Seconds per 1,000 samples of `fn(*args)`, which draws n of them; the median of `repeats`.

    Measured after a first call that compiles. State n beside the number: samples per second grow
    with the batch until the device is full.

    Raises:
      ValueError: n < 1 or repeats < 1.
    """
    if n < 1:
        raise ValueError(f"n must be 1 or more, got {n}")
    return time_call(fn, *args, repeats=repeats).median * 1000.0 / n
