"""A function of batches over all devices of a process, and what several processes found put together.

The function is compiled once, for one batch size; the last batch is filled up and cut again. Processes
work on rows of their own and meet only at the end, so none waits for another in between.
"""

import collections
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class ShardedFunction:
    """`function(params, *arrays) -> dict of arrays`, batch-first, on batches of any size.

    Args:
      function: of parameters and arrays [B, ...], row by row: no row may change another.
      params: a pytree, copied to every device.
      batch_size: rows at a time; rounded up to a multiple of the devices.
      sharding: of a batch, over its leading axis; None runs on the default device.
      replicated: of the parameters; goes with `sharding`.
    """

    def __init__(
        self,
        function: Callable[..., Mapping[str, jax.Array]],
        params: Any,
        *,
        batch_size: int = 64,
        sharding: jax.sharding.Sharding | None = None,
        replicated: jax.sharding.Sharding | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        devices = 1 if sharding is None else len(sharding.device_set)
        self.batch_size = -(-batch_size // devices) * devices
        self._sharding = sharding
        self._params = params if sharding is None else jax.device_put(params, replicated)
        self._function = jax.jit(function)

    def __call__(self, *arrays) -> dict[str, np.ndarray]:
        """The function of arrays [B, ...] with B of any size but 0, as NumPy arrays."""
        size = self.batch_size
        starts = range(0, len(arrays[0]), size)
        parts = list(self.stream(tuple(a[i : i + size] for a in arrays) for i in starts))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def stream(self, batches: Iterable[tuple]) -> Iterator[dict[str, np.ndarray]]:
        """The function of each batch of at most `batch_size` rows; devices work while the next is read."""
        waiting: collections.deque = collections.deque()
        for arrays in batches:
            arrays = [np.asarray(a) for a in arrays]
            count = len(arrays[0])
            if not 1 <= count <= self.batch_size:
                raise ValueError(f"a batch must have 1 to {self.batch_size} rows, got {count}")
            rows = np.minimum(np.arange(self.batch_size), count - 1)
            arrays = [a if count == self.batch_size else a[rows] for a in arrays]
            if self._sharding is None:
                arrays = [jnp.asarray(a) for a in arrays]
            else:
                arrays = jax.device_put(arrays, self._sharding)
            waiting.append((count, self._function(self._params, *arrays)))
            if len(waiting) > 1:
                yield _fetch(*waiting.popleft())
        while waiting:
            yield _fetch(*waiting.popleft())


def _fetch(count: int, outputs: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    return {name: value[:count] for name, value in jax.device_get(dict(outputs)).items()}


def rows_of_process(count: int) -> np.ndarray:
    """Which of `count` rows this process works on: parts that follow each other, as equal as can be."""
    return np.array_split(np.arange(count), jax.process_count())[jax.process_index()]


def over_processes(arrays: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays of every process in turn, on every process; bit for bit, of any shape and dtype.

    All processes must call it and go through it to its end.
    """
    if jax.process_count() == 1:
        yield dict(arrays)
        return
    from jax.experimental import multihost_utils

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    payload = np.frombuffer(buffer.getvalue(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(payload))))
    for process, size in enumerate(sizes):
        # as int32: 64-bit floats would be rounded on the way
        whole = np.zeros(-(-int(size) // 4) * 4, np.uint8)
        if process == jax.process_index():
            whole[: len(payload)] = payload
        sent = multihost_utils.broadcast_one_to_all(
            whole.view(np.int32), is_source=process == jax.process_index()
        )
        received = np.asarray(sent, np.int32).view(np.uint8)[:size]
        with np.load(io.BytesIO(received.tobytes()), allow_pickle=False) as stored:
            yield {name: stored[name] for name in stored.files}
