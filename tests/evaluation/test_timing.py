"""With a clock that only the measured function moves, so a busy machine changes nothing."""

import jax
import jax.numpy as jnp
import pytest

from diffusion_jax.evaluation import timing


class Clock:
    def __init__(self, monkeypatch, durations):
        self.now, self.durations = 0.0, iter(durations)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def block_until_ready(self):
        self.now += next(self.durations)
        return self


def test_first_call_is_kept_apart(monkeypatch):
    clock = Clock(monkeypatch, [9.0, 1.0, 5.0, 2.0])
    # The call itself returns at once, as an asynchronous dispatch does: only waiting takes time.
    got = timing.time_call(lambda: {"y": clock}, repeats=3)
    assert got == timing.Timing(first=9.0, median=2.0, fastest=1.0, slowest=5.0, repeats=3)


def test_seconds_per_thousand_is_the_scaled_median(monkeypatch):
    clock = Clock(monkeypatch, [100.0, 3.0, 1.0, 2.0])
    assert timing.seconds_per_thousand(lambda: clock, 50) == pytest.approx(2.0 * 1000 / 50)


def test_real_functions_compile_once():
    traces = []

    @jax.jit
    def fn(x):
        traces.append(1)
        return {"y": x + 1}

    got = timing.time_call(fn, jnp.zeros(3), repeats=4)
    assert len(traces) == 1
    assert 0 < got.fastest <= got.median <= got.slowest


def test_refusals():
    with pytest.raises(ValueError, match="repeats must be 1 or more, got 0"):
        timing.time_call(lambda: None, repeats=0)
    with pytest.raises(ValueError, match="n must be 1 or more, got 0"):
        timing.seconds_per_thousand(lambda: None, 0)
