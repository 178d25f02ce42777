"""What a run shares with its terminal: a progress bar, a clock, signals."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax


class Clock:
    """Steps per second, without the time spent on samples and checkpoints."""

    def __init__(self, step: int):
        self._step, self._begin, self._pause = step, time.perf_counter(), 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        begin = time.perf_counter()
        yield
        self._pause += time.perf_counter() - begin

    def rates(self, step: int, batch_size: int) -> dict[str, float]:
        """`steps_per_second` and `examples_per_second` since the last call."""
        seconds = max(time.perf_counter() - self._begin - self._pause, 1e-9)
        speed = (step - self._step) / seconds
        self._step, self._begin, self._pause = step, time.perf_counter(), 0.0
        return {"steps_per_second": speed, "examples_per_second": speed * batch_size}


@contextlib.contextmanager
def progress_bar(total: int, start: int, show: bool) -> Iterator[Any]:
    """A tqdm bar (`update`, `set_postfix`), or nothing without a terminal or tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not (show and sys.stderr.isatty()):
        yield _NoBar()
        return
    with tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) as bar:
        yield bar


class _NoBar:
    def update(self) -> None: ...

    def set_postfix(self, **values: str) -> None: ...


@contextlib.contextmanager
def catch_signals() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM or SIGINT came; the second one acts as usual.

    In a distributed run all processes must stop at the same step: there SIGTERM belongs to JAX's
    preemption service, whose handler must stay in place.
    """
    caught: list[int] = []
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    old = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in old.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        caught.append(number)
        restore()

    for number in old:
        signal.signal(number, handle)
    try:
        yield lambda: bool(caught)
    finally:
        restore()
