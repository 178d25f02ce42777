"""The processes of a distributed run: do they run the same thing, and is each of them still there?

All of it goes through the key-value store of JAX's coordination service, which lives in process 0
and needs no port of its own. Every process leaves a sign of life there and reads those of the others:

  - a process without a sign of life for `heartbeat_timeout_seconds`, or one that fails alone, ends
    the others with one line that names it and exit status `LOST`. Collectives that wait for it cannot
    be woken up, so the process is ended from a thread. (JAX by itself aborts with a dump of its own
    stack, here after twice that time, and does not notice a process that hangs in its clean-up.)
  - processes that were started differently are told so before anything is written.
"""

import atexit
import contextlib
import ctypes
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_jax.training.agreement import ProcessesDiffer, difference
from diffusion_jax.training.config import plain
from diffusion_jax.training.runfolder import config_leaves

LOST = 4
HEARTBEAT = 60
_GRACE = 3.0  # seconds in which a process may come to the same error as another by itself
_LAST = 1.0  # seconds that process 0, which holds the store, leaves later than the others
_PATIENCE = 3600.0  # for a process that loads its data for long; a lost one is noticed much earlier
_ROOT = "diffusion_jax"
_LOG = logging.getLogger(__name__)


class Watch:
    """Signs of life of this process, and an eye on those of the others.

    Args:
      client: key-value store: `key_value_set`, `key_value_dir_get`, `blocking_key_value_get`.
      process: index of this process.
      count: number of processes.
      timeout: seconds without a sign of life after which a process counts as lost.
      address: of the coordination service, "host:port"; the connection to it tells at once when
        process 0 is gone.
      leave: ends the process with a status; another one in tests.
    """

    def __init__(
        self,
        client: Any,
        process: int,
        count: int,
        timeout: float = HEARTBEAT,
        address: str | None = None,
        leave: Callable[[int], Any] = os._exit,
    ):
        self.process, self.count, self.timeout = process, count, float(timeout)
        self.interval = min(self.timeout / 12, 5.0)
        self._client, self._address, self._leave = client, address, leave
        self._name = f"{socket.gethostname()}, pid {os.getpid()}"
        self._over, self._ending = threading.Event(), threading.Lock()
        self._beats: dict[int, tuple[str, float]] = {}
        self._names: dict[int, str] = {}
        self._number = self._depth = self._agreements = 0
        self._answered = time.monotonic()
        self._failing, self._round = False, 0  # a failure that was caught everywhere ends a round

    def start(self) -> None:
        """Starts the threads."""
        self._beat()
        targets = [self._keep_beating, self._listen]
        if self._address and self.process:
            targets.append(self._hold_on)
        for target in targets:
            threading.Thread(target=target, name=f"{_ROOT}{target.__name__}", daemon=True).start()

    def close(self) -> None:
        """Ends the watch; the others know that this process has come to its end."""
        if self._over.is_set():
            return
        self._over.set()
        with contextlib.suppress(Exception):
            self._set_state("failed" if self._failing else "done")
            self._set(f"end/{self._round}/{self.process}", "")
            if self._failing and not self._all_failed():
                self._flush_and_leave(1)  # JAX would wait for the others in its clean-up, and abort

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """An exception that leaves the outermost guard ends the other processes, which would wait.

        An exception of a collective is first held back until it is known whether all are there.
        """
        if self._failing and self._depth == 0:
            before, self._round, self._failing = self._round, self._round + 1, False
            self._set(f"end/{before}/{self.process}", "")  # `_listen` goes on to the new round
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._depth == 1 and not self._over.is_set():
                self._failed(error)
            raise
        finally:
            self._depth -= 1

    def agree(self, about: Mapping[str, Any], remedy: str = "") -> None:
        """Compares nested plain data across the processes; all must call it, in the same order.

        Args:
          about: what must be equal everywhere.
          remedy: what the error ends with.

        Raises:
          ProcessesDiffer: it is not equal: on all processes, naming the first field that differs.
        """
        self._agreements += 1
        here = f"agree/{self._agreements}"
        leaves = [[name, json.dumps(value)] for name, value in config_leaves(plain(about))]
        self._set(f"{here}/{self.process}", json.dumps(leaves))
        if self.process == 0:
            told = [json.loads(self._get(f"{here}/{i}")) for i in range(self.count)]
            self._set(f"{here}/verdict", difference(told))
        verdict = self._get(f"{here}/verdict")
        if verdict:
            raise ProcessesDiffer(f"the processes of this run differ: {verdict}{remedy}")

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(f"{_ROOT}/{key}", value, allow_overwrite=True)

    def _get(self, key: str, seconds: float = _PATIENCE) -> str:
        return self._client.blocking_key_value_get(f"{_ROOT}/{key}", int(1000 * seconds))

    def _all(self, key: str) -> dict[int, str]:
        found = self._client.key_value_dir_get(f"{_ROOT}/{key}/")
        return {int(name.rsplit("/", 1)[1]): value for name, value in found}

    def _set_state(self, state: str) -> None:
        self._set(f"state/{self._round}/{self.process}", state)

    def _states(self) -> dict[int, str]:
        """How processes came to their end: "done", "failed" or "stopped"; the others are left out."""
        return self._all(f"state/{self._round}")

    def _beat(self) -> None:
        """Leaves a sign of life and reads those of the others."""
        self._number += 1
        self._set(f"beat/{self.process}", f"{self._number} {self._name}")
        now = time.monotonic()
        for process, value in self._all("beat").items():
            number, name = value.split(" ", 1)
            if self._beats.get(process, ("", 0.0))[0] != number:
                self._beats[process], self._names[process] = (number, now), name
        self._answered = now

    def _keep_beating(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self.interval):
            try:
                self._beat()
                states = self._states()
            except Exception:  # where process 0 is gone, `_hold_on` tells
                continue
            now = time.monotonic()
            if now - last > self.timeout / 2:  # this process was asleep, not the others
                self._beats = {i: (number, now) for i, (number, _) in self._beats.items()}
            last = now
            for i, (_, seen) in self._beats.items():
                if i not in (self.process, *states) and now - seen > self.timeout:
                    self._end(
                        f"{self._who(i)} vanished: no sign of life for {self.timeout:g} s",
                        tell=True,
                    )

    def _listen(self) -> None:
        while not self._over.is_set():
            heard = self._round
            try:
                message = self._get(f"end/{heard}/{self.process}")
            except Exception as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                if not self._over.is_set():
                    self._end(f"{self._who(0)} vanished", alone=True)
                return
            kind, _, text = message.partition(" ")
            if kind == "failed":
                time.sleep(_GRACE)
            if heard != self._round:
                continue
            if self._over.is_set() or (kind == "failed" and self._failing):
                self._over.wait(self.interval)
                continue
            self._end(text)
            return

    def _hold_on(self) -> None:
        """A connection to the service's port, which breaks when process 0 ends.

        JAX's own client is locked while it aborts this process for that.
        """
        host, _, port = self._address.rpartition(":")
        while not self._over.is_set():
            try:
                with socket.create_connection((host.strip("[]"), int(port)), 10) as connection:
                    connection.settimeout(1.0)
                    while not self._over.is_set():
                        self._check_answers()
                        with contextlib.suppress(TimeoutError):
                            if not connection.recv(4096):
                                break  # a connection that says nothing is closed after minutes
            except TimeoutError:
                self._check_answers()
            except OSError:
                if not self._over.is_set():
                    self._end(f"{self._who(0)} vanished", alone=True)
                return

    def _check_answers(self) -> None:
        silent = time.monotonic() - self._answered
        if silent > self.timeout + 10 and not self._over.is_set():
            self._end(f"{self._who(0)} vanished: no answer for {silent:.0f} s", alone=True)

    def _who(self, process: int) -> str:
        name = self._names.get(process)
        return f"process {process} of {self.count}" + (f" ({name})" if name else "")

    def _tell(self, message: str) -> None:
        with contextlib.suppress(Exception):
            for i in range(self.count):
                if i != self.process:
                    self._set(f"end/{self._round}/{i}", message)

    def _end(self, message: str, tell: bool = False, alone: bool = False) -> None:
        """Ends this process, which cannot go on, with a line on standard error."""
        with self._ending:
            line = (
                f"diffusion_jax: {message}; process {self.process} stops too. Start all processes"
                " again, and the run goes on from its newest checkpoint\n"
            )
            os.write(2, line.encode())
            if alone:  # JAX is about to abort this process: nothing may wait now
                self._leave(LOST)
                return
            if tell:
                self._tell(f"lost {message}")
            with contextlib.suppress(Exception):
                self._set_state("stopped")
            self._flush_and_leave(LOST)

    def _flush_and_leave(self, status: int) -> None:
        def flush() -> None:
            sys.stdout.flush()
            sys.stderr.flush()

        flushing = threading.Thread(target=flush, daemon=True)  # the main thread may hold the locks
        flushing.start()
        flushing.join(1.0)
        if self.process == 0:
            time.sleep(_LAST)  # the service goes down with this process: the others leave first
        self._leave(status)

    def _failed(self, error: BaseException) -> None:
        """Tells the others of this process's failure, unless it is only a sign of another's."""
        if _of_collectives(error):
            self._wait_for_a_cause()
        self._failing = True
        said = " ".join(str(error).split())[:300]
        with contextlib.suppress(Exception):
            self._set_state("failed")
        self._tell(f"failed {self._who(self.process)} failed: {type(error).__name__}: {said}")

    def _wait_for_a_cause(self) -> None:
        """Until all have given two more signs of life; a thread ends the process if one has not."""
        before, deadline = dict(self._beats), time.monotonic() + self.timeout + 10 * self.interval
        told = lambda: any(state != "done" for state in self._states().values())
        with contextlib.suppress(Exception):
            while time.monotonic() < deadline:
                time.sleep(self.interval)
                if told():  # another one failed first: `_listen` has the line
                    time.sleep(2 * _GRACE)
                    return
                now = dict(self._beats)
                signs = [
                    int(now.get(i, (0,))[0]) - int(before.get(i, (0,))[0])
                    for i in range(self.count)
                ]
                if min(signs) >= 2:
                    return

    def _all_failed(self) -> bool:
        """Whether the others came to an end by themselves too; waits for those that hang."""
        deadline = time.monotonic() + self.timeout
        while time.monotonic() < deadline:
            states = self._states()
            if len(states) == self.count or "stopped" in states.values():
                return "stopped" not in states.values()
            time.sleep(0.1)
        return False


def _of_collectives(error: BaseException | None) -> bool:
    """Whether an error may be that of a collective whose partner is gone."""
    codes = "RESOURCE_EXHAUSTED|INVALID_ARGUMENT|UNIMPLEMENTED|NOT_FOUND"
    while error is not None:
        text = str(error)
        if re.match(r"[A-Z_]{4,}: ", text) and not re.match(codes, text):
            return True
        error = error.__cause__ or error.__context__
    return False


_STARTED: list[Watch | None] = []  # one a process, as `jax.distributed` is


def find_watch(timeout: float = HEARTBEAT) -> Watch | None:
    """The watch over the processes of `jax.distributed`, started if need be; None for one process.

    Args:
      timeout: see `Watch`; the first call decides.
    """
    if not jax.distributed.is_initialized():
        return None
    if not _STARTED:
        _STARTED.append(_start(timeout))
    return _STARTED[0]


def _start(timeout: float) -> Watch | None:
    try:
        from jax._src import distributed

        process, count = distributed.global_state.process_id, distributed.global_state.num_processes
        client = distributed.global_state.client
        for method in ("key_value_set", "key_value_dir_get", "blocking_key_value_get"):
            getattr(client, method)
    except (ImportError, AttributeError) as error:
        _LOG.warning("a process that vanishes will be noticed by JAX alone: %s", error)
        return None
    address = getattr(distributed.global_state, "coordinator_address", None)
    if count == 1:
        return None
    watch = Watch(client, process, count, timeout, address)
    watch.start()
    _delay_aborts()
    atexit.register(watch.close)  # runs before JAX's own clean-up, which is registered earlier
    watch.agree({"num_processes": count})
    return watch


def on_host(x: jax.Array) -> np.ndarray:
    """The whole of an array that may lie on the devices of several processes; all must call it."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _delay_aborts() -> None:
    """An abort of this process waits for six seconds.

    JAX aborts at once when process 0, and the service with it, is gone: the line that says so may
    come too late. The handler is C's own `sleep`, whose argument is the number of the signal, 6.
    """
    if signal.getsignal(signal.SIGABRT) == signal.SIG_DFL and hasattr(os, "fork"):
        library = ctypes.CDLL(None)
        library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


@contextlib.contextmanager
def joining(address: str | None, timeout: float, leave: Callable[[int], Any] = os._exit):
    """Ends this process with a line when the others do not come, before JAX aborts it for that.

    Args:
      address: of process 0, where it is known.
      timeout: seconds after which JAX gives up.
    """

    def give_up() -> None:
        where = f" at {address}" if address else ""
        line = (
            f"diffusion_jax: not all processes came together{where} within {timeout:g} s; start every"
            " one of them, with the same address and number of processes, a process_id of its own,"
            " and the port open\n"
        )
        os.write(2, line.encode())
        leave(LOST)

    timer = threading.Timer(max(timeout - 1.0, 0.8 * timeout), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def guarded() -> contextlib.AbstractContextManager:
    """`Watch.guard` of the processes' watch, where there is one."""
    watch = find_watch()
    return contextlib.nullcontext() if watch is None else watch.guard()


def agree(about: Callable[[], Mapping[str, Any]], remedy: str = "") -> None:
    """`Watch.agree` where there are several processes; `about` is not called where there is one."""
    watch = find_watch()
    if watch is not None:
        watch.agree(about(), remedy)
