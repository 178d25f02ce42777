"""Processes that vanish, fail, or were started differently; several topologies of one run."""

import json
import signal
import textwrap
import threading
import time

import jax
import numpy as np
import pytest
from training.toy import (
    CONFIG,
    ToyPipeline,
    assert_same_bits,
    finish_together,
    run_python,
    start_together,
    toy_method,
)

from diffusion_jax.data.arrays import arrays
from diffusion_jax.training import (
    Checkpoints,
    ProcessesDiffer,
    initialize_distributed,
    restore_params,
    train,
)
from diffusion_jax.training.agreement import common_config, difference, environment
from diffusion_jax.training.metrics import read_rows
from diffusion_jax.training.processes import (
    LOST,
    Watch,
    _of_collectives,
    joining,
)
from diffusion_jax.training.runfolder import config_leaves


class Store:
    """The key-value store of the coordination service, without the service."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self.changed:
            assert allow_overwrite or key not in self.values
            self.values[key] = value
            self.changed.notify_all()

    def key_value_dir_get(self, key):
        with self.changed:
            return [(k, v) for k, v in self.values.items() if k.startswith(key)]

    def blocking_key_value_get(self, key, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise RuntimeError(f"DEADLINE_EXCEEDED: {key}")
            return self.values[key]


@pytest.fixture
def pair(monkeypatch):
    """Two watches over one store, and the statuses with which they would have ended."""
    monkeypatch.setattr("diffusion_jax.training.processes._GRACE", 0.2)
    monkeypatch.setattr("diffusion_jax.training.processes._LAST", 0.1)
    store, ended = Store(), {}
    watches = [Watch(store, i, 2, 0.4) for i in range(2)]
    for i, watch in enumerate(watches):
        watch._leave = lambda status, i=i: ended.setdefault(i, status)
        watch.start()
    yield watches, ended
    for watch in watches:
        watch._over.set()


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_a_silent_process_ends_the_others(pair, capfd):
    (first, second), ended = pair
    time.sleep(0.6)
    assert ended == {}  # both are alive for longer than the timeout
    second._over.set()  # neither a sign of life nor a good-bye
    wait_for(lambda: ended)
    assert ended == {0: LOST}
    line = capfd.readouterr().err
    assert "process 1 of 2 (" in line and "vanished: no sign of life for 0.4 s" in line
    assert "process 0 stops too" in line and line.count("\n") == 1
    first._over.set()


def test_a_process_that_is_done_may_be_silent(pair):
    (_, second), ended = pair
    second.close()
    time.sleep(0.8)
    assert ended == {}


def test_a_failure_of_one_process_ends_the_other(pair, capfd):
    (_, second), ended = pair
    with pytest.raises(OSError, match=r"^disk full$"), second.guard(), second.guard():
        raise OSError("disk full")
    wait_for(lambda: 0 in ended)
    assert ended == {0: LOST}
    assert "process 1 of 2" in (line := capfd.readouterr().err)
    assert "failed: OSError: disk full; process 0 stops too" in line
    second.close()  # at its exit: it must not wait for a process that is gone
    assert ended == {0: LOST, 1: 1}


def test_the_same_failure_everywhere_ends_nobody(pair):
    watches, ended = pair
    for _ in range(2):  # caught, and met again
        for watch in watches:
            with pytest.raises(ValueError, match="bad"), watch.guard():
                raise ValueError("bad")
        time.sleep(0.5)
    for watch in watches:
        watch.close()
    assert ended == {}


def test_an_error_of_a_collective_waits_for_its_cause(pair, capfd):
    (first, second), ended = pair
    wait_for(lambda: 1 in first._beats)
    second._over.set()
    with pytest.raises(ValueError, match="Gloo"), first.guard():
        raise ValueError("UNKNOWN: Gloo all-reduce failed: connection closed by peer")
    wait_for(lambda: ended == {0: LOST})
    assert "process 1 of 2" in capfd.readouterr().err


def test_errors_of_collectives_are_told_from_others():
    lost = ValueError("UNKNOWN: Gloo all-reduce failed")
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = lost
    assert _of_collectives(lost) and _of_collectives(wrapped)
    for text in (
        "bad",
        "RESOURCE_EXHAUSTED: out of memory",
        "train.seed: 3",
        "INVALID_ARGUMENT: x",
    ):
        assert not _of_collectives(ValueError(text))


def test_processes_agree_or_all_learn_the_first_difference(pair):
    watches, _ = pair

    def ask(*abouts):
        answers = {}

        def one(i):
            try:
                answers[i] = watches[i].agree(abouts[i], "; mend it")
            except ProcessesDiffer as error:
                answers[i] = str(error)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        return answers

    config = {"network": {"width": 8, "depths": [1, 2]}, "seed": 0}
    assert ask(config, dict(config)) == {0: None, 1: None}
    other = {"network": {"width": 8, "depths": [1, 3]}, "seed": 1}
    found = ask(config, other)
    assert found[0] == found[1]
    message = "network.depths is [1, 2] on process 0, [1, 3] on process 1 (and 1 more); mend it"
    assert found[0] == f"the processes of this run differ: {message}"


def test_difference_names_what_is_absent():
    assert difference([[["a", "1"]], [["a", "1"]]]) == ""
    absent = difference([[["a", "1"]], [["a", "1"]], [["a", "1"], ["b", "2"]]])
    assert absent == "b is absent on process 0, 2 on process 2"


def test_the_index_of_a_process_is_no_difference():
    configs = [
        {"train": {"seed": 1, "parallel": {"fsdp": 2, "distributed": {"process_id": i}}}}
        for i in range(2)
    ]
    assert common_config(configs[0]) == common_config(configs[1])
    assert common_config(configs[0])["train"] == {"seed": 1, "parallel": {"fsdp": 2}}


def test_other_data_code_and_versions_are_differences(monkeypatch):
    from diffusion_jax.run import _data

    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (5, 4, 4, 1)).astype(np.float32)

    def told(images, **changes):
        about = {**_data(arrays({"image": images})), **environment(), **changes}
        return [[name, json.dumps(value)] for name, value in config_leaves(about)]

    assert difference([told(images), told(images.copy())]) == ""
    found = difference([told(images), told(images[:4])])
    assert found.startswith("data.examples is 5 on process 0, 4 on process 1")
    other = images.copy()
    other[2] = 0
    assert "data.first, middle and last is" in difference([told(images), told(other)])
    versions = environment()["versions"] | {"jax": "0.9.9"}
    expected = f'versions.jax is "{jax.__version__}" on process 0, "0.9.9" on process 1'
    assert difference([told(images), told(images, versions=versions)]) == expected
    code = environment()["code"] | {"diffusion_jax/training/loop.py": "0" * 12}
    assert "loop.py is" in difference([told(images), told(images, code=code)])


def test_processes_that_do_not_come_are_missed_in_one_line(capfd):
    left = []
    with joining("10.0.0.1:8476", 0.2, left.append):
        time.sleep(0.3)
    with joining("10.0.0.1:8476", 0.2, left.append):
        pass
    time.sleep(0.3)
    assert left == [LOST]
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "at 10.0.0.1:8476 within 0.2 s" in said


def test_an_unknown_option_of_a_cluster_is_refused():
    with pytest.raises(
        ValueError, match=r"'coordinator_adress'; did you mean 'coordinator_address'"
    ):
        initialize_distributed({"coordinator_adress": "10.0.0.1:8476"})


RUN = """
import json, os, signal, sys
from diffusion_jax.training import ProcessesDiffer, make_layout, train
from training.toy import CONFIG, ToyPipeline, toy_method

PARALLEL = {parallel!r}
READ = []

class Part(ToyPipeline):
    killed = None
    def batch(self, step):
        batch = super().batch(step)
        READ.append(len(batch["index"]))
        if self.killed == (step, PROCESS):
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

def run(folder, killed=None, **changes):
    pipeline = Part(host=make_layout(PARALLEL).host)
    pipeline.killed = killed
    config = dict(CONFIG, parallel=PARALLEL, compilation_cache={cache!r}, **changes)
    return train(toy_method(), pipeline, config, folder)
"""
SHARDED = {"fsdp": 2, "min_size": 8}


def code(body, parallel=None, cache=""):
    return textwrap.dedent(RUN).format(parallel=parallel or {}, cache=cache) + textwrap.dedent(body)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Two processes that finish a run, then go on with another, in which one of them is killed."""
    folder = tmp_path_factory.mktemp("killed")
    body = f"""
    run({str(folder / "whole")!r})
    assert set(READ) == {{8}}, READ  # each loads its half alone
    run({str(folder / "cut")!r}, killed=(10, 1))
    """
    begin = time.monotonic()
    outputs = finish_together(
        start_together(code(body, SHARDED, str(folder / "cache")), 2),
        [LOST, -signal.SIGKILL],
        timeout=120,
    )
    return folder, outputs, time.monotonic() - begin


def test_a_killed_process_ends_the_other_with_one_line(killed):
    _, (output, _), seconds = killed
    (line,) = [text for text in output.splitlines() if "diffusion_jax:" in text]
    assert "process 1 of 2" in line and "vanished: no sign of life for 4 s" in line
    assert "goes on from its newest checkpoint" in line
    assert "Check failure stack trace" not in output and "Traceback" not in output
    assert seconds < 90  # two runs and the time that JAX takes to start, on a busy core


def test_started_again_it_goes_on_to_the_same_bits(killed):
    folder, _, _ = killed
    cut, whole = folder / "cut", folder / "whole"
    with Checkpoints(cut, read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] in (4, 8)
    body = f"""
    import pathlib
    import jax
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name.rsplit("/", 1)[-1]))
    try:
        run({str(folder / "new")!r}, seed=PROCESS)
    except ProcessesDiffer as error:
        print("DIFFER", error, flush=True)
    assert not pathlib.Path({str(folder / "new")!r}).exists()
    result = run({str(cut)!r})
    print("RESULT", result.status, result.step, flush=True)
    print("CACHE", events.count("cache_hits"), events.count("cache_misses"), flush=True)
    """
    outputs = finish_together(start_together(code(body, SHARDED, str(folder / "cache")), 2))
    # The second start finds what the first has compiled, the step above all.
    hits, misses = map(int, outputs[0].split("CACHE")[1].split()[:2])
    assert hits > 0 and misses < hits, (hits, misses)
    for output in outputs:
        said = (
            "the processes of this run differ: config.train.seed is 0 on process 0, 1 on process 1"
        )
        assert f"DIFFER {said}\n" in output
        assert "RESULT finished 12" in output
    assert_same_bits(*(restore_params(run, "params") for run in (cut, whole)))
    leaves = []  # every leaf's checksum: averages and optimiser too
    for run in (cut, whole):
        with Checkpoints(run, read_only=True) as checkpoints:
            leaves.append(checkpoints.meta(12)["leaves"])
    assert leaves[0] == leaves[1] and {"params", "ema_0.9", "ema_0.5", "opt"} <= set(leaves[0])
    rows = [read_rows(run / "metrics.jsonl") for run in (cut, whole)]
    for metric in ("step", "loss", "grad_norm"):
        assert [r[metric] for r in rows[0]] == [r[metric] for r in rows[1]]


def test_one_process_goes_on_where_two_stopped(killed, tmp_path):
    folder, _, _ = killed
    alone = train(toy_method(), ToyPipeline(), CONFIG | {"steps": 16}, tmp_path)
    went_on = train(toy_method(), ToyPipeline(), CONFIG | {"steps": 16}, folder / "whole")
    assert went_on.step == 16
    for a, b in zip(*(jax.tree.leaves(r.state.params) for r in (alone, went_on)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    found, expected = (
        read_rows(run / "metrics.jsonl")[-1]["loss"] for run in (folder / "whole", tmp_path)
    )
    assert found == pytest.approx(expected, rel=2e-6)


@pytest.mark.slow
def test_the_first_process_may_vanish_too(tmp_path):
    body = f"run({str(tmp_path)!r}, killed=(10, 0))"
    outputs = finish_together(start_together(code(body), 2), [-signal.SIGKILL, LOST])
    (line,) = [text for text in outputs[1].splitlines() if "diffusion_jax:" in text]
    assert "process 0 of 2" in line and "vanished" in line


@pytest.mark.slow
def test_a_process_that_fails_alone_says_why(tmp_path):
    body = f"""
    class Broken(Part):
        def batch(self, step):
            if step == 6 and PROCESS == 1:
                raise OSError("no space left on device")
            return super().batch(step)
    train(toy_method(), Broken(host=make_layout({{}}).host), CONFIG, {str(tmp_path)!r})
    """
    first, second = finish_together(start_together(code(body), 2), [LOST, 1])
    assert "process 1 of 2" in first and "failed: OSError: no space left on device" in first
    assert second.rstrip().endswith("OSError: no space left on device")


@pytest.mark.slow
def test_four_processes_two_and_one_take_turns(tmp_path):
    """fsdp over two processes, one process with two devices, then four processes."""
    expected = train(toy_method(), ToyPipeline(), CONFIG | {"steps": 16}, tmp_path / "one")
    folder = str(tmp_path / "turns")
    finish_together(start_together(code(f"run({folder!r}, steps=6)", SHARDED), 2))
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [4, 6]
    run_python("PROCESS = 0\n" + code(f"run({folder!r}, steps=11)", {"data": 2}), devices=2)
    body = f"""
    result = run({folder!r}, steps=16)
    assert set(READ) == {{4}}, READ
    print("RESULT", result.status, result.step, flush=True)
    """
    for output in finish_together(start_together(code(body, {"data": 2, **SHARDED}), 4)):
        assert "RESULT finished 16" in output
    params = restore_params(folder, "params")
    for a, b in zip(*map(jax.tree.leaves, (params, expected.state.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    report = json.loads((tmp_path / "turns" / "report.json").read_text())
    assert (report["processes"], report["mesh"]["fsdp"]) == (4, 2)
    rows = read_rows(tmp_path / "turns" / "metrics.jsonl")
    alone = read_rows(tmp_path / "one" / "metrics.jsonl")
    assert rows[-1]["loss"] == pytest.approx(alone[-1]["loss"], rel=1e-5)
