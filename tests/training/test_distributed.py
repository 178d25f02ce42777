"""Two real processes of `jax.distributed` on this machine, with two virtual devices each."""

import json
import signal
import socket
import textwrap

import numpy as np
import pytest
from training.toy import CONFIG, ToyPipeline, start_python, toy_method

from diffusion_jax.training import Checkpoints, restore_params, train
from diffusion_jax.training.metrics import read_rows

CODE = """
import sys
from diffusion_jax.training import initialize_distributed, make_layout, train
from training.toy import CONFIG, ToyPipeline, toy_method

address = dict(coordinator_address="127.0.0.1:{port}", num_processes=2, process_id={process})
assert initialize_distributed(address) == 2
import jax

class Loud(ToyPipeline):
    def batch(self, step):
        print("BATCH", step, flush=True)
        return super().batch(step)

for name, parallel in {modes!r}.items():
    host = make_layout(parallel).host
    pipeline = Loud(host=host)
    config = dict(CONFIG, parallel=parallel, **{changes!r})
    sample = lambda params, key, step: jax.random.uniform(key, (2, 4, 4, 1))
    result = train(toy_method(), pipeline, config, {folder!r} + "/" + name, sample_fn=sample)
    print("RESULT", name, host, result.status, result.step, float(result.state.step), flush=True)
"""

MODES = {
    "data": {},
    "fsdp": {"fsdp": 4, "min_size": 8},
    "model": {"model": 4, "rules": [["hidden/kernel", [None, "model"]]]},
    "pmap": {"mode": "pmap"},
}


def start_two(folder, modes, **changes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = dict(port=port, folder=str(folder), modes=modes, changes=changes)
    return [
        start_python(textwrap.dedent(CODE).format(process=n, **options), devices=2) for n in (0, 1)
    ]


def finish(processes):
    outputs = [p.communicate(timeout=240)[0] for p in processes]
    for process, output in zip(processes, outputs):
        assert process.returncode == 0, output
    return [
        [line.split(maxsplit=1)[1] for line in o.splitlines() if "RESULT" in line] for o in outputs
    ]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Folder and result of the same run in one process."""
    folder = tmp_path_factory.mktemp("one")
    return folder, train(toy_method(), ToyPipeline(), CONFIG, folder)


@pytest.mark.parametrize(
    "names", [["data", "pmap"], pytest.param(["fsdp", "model"], marks=pytest.mark.slow)]
)
def test_two_processes_give_the_losses_of_one(one_process, tmp_path, names):
    folder, result = one_process
    modes = {name: MODES[name] for name in names}
    results = finish(start_two(tmp_path, modes, sample_every=12))
    for process, lines in enumerate(results):
        hosts = {n: "(0, 1)" if n == "model" else f"({process}, 2)" for n in names}
        assert lines == [f"{name} {hosts[name]} finished 12 12.0" for name in names]
    expected = read_rows(folder / "metrics.jsonl")
    for name in names:
        found = read_rows(tmp_path / name / "metrics.jsonl")
        assert [row["step"] for row in found] == [4, 8, 12]
        for metric in ("loss", "grad_norm", "param_norm"):
            a, b = ([row[metric] for row in rows] for rows in (found, expected))
            np.testing.assert_allclose(a, b, rtol=2e-6, err_msg=f"{name} {metric}")
        # One process reads back what two have written.
        params = restore_params(tmp_path / name, "params")
        kernel = result.state.params["hidden"]["kernel"]
        np.testing.assert_allclose(params["hidden"]["kernel"], kernel, rtol=1e-4, atol=1e-6)
        assert len(list((tmp_path / name / "samples").iterdir())) == 1
        report = json.loads((tmp_path / name / "report.json").read_text())
        assert (report["processes"], report["mesh"]["fsdp"]) == (2, 4 if name == "fsdp" else 1)


def test_a_signal_to_one_process_ends_both_at_the_same_step(tmp_path):
    processes = start_two(tmp_path, {"data": {}}, steps=1_000_000, log_every=1000)
    for line in processes[1].stdout:
        if line.startswith("BATCH 20"):
            processes[1].send_signal(signal.SIGTERM)
            break
    first, second = finish(processes)
    assert first[0].replace("(0, 2)", "") == second[0].replace("(1, 2)", "")
    name, _, _, status, step, _ = first[0].split()
    assert (name, status) == ("data", "preempted") and int(step) >= 20
    with Checkpoints(tmp_path / "data", read_only=True) as checkpoints:
        assert checkpoints.steps()[-1] == int(step)
