"""A tiny method and a tiny pipeline: noisy regression with a two-layer network."""

import os
import pathlib
import socket
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
BATCH = 16
CONFIG = {
    "steps": 12,
    "batch_size": BATCH,
    "log_every": 4,
    "checkpoint_every": 4,
    "sample_every": 0,
    "ema": (0.9, 0.5),
    "tensorboard": False,
    "optimizer": {"name": "adam", "learning_rate": 1e-2, "clip_norm": 1.0},
}


class ToyMethod(NamedTuple):
    """The two functions of a method that training uses."""

    init: Any
    loss: Any


def toy_method(width=8, noise=0.1, traces=None):
    """Regression of `y` on `x` under input noise drawn per example."""

    def init(key, batch):
        first, second = jax.random.split(key)
        inputs = batch["x"].shape[-1]
        return {
            "hidden": {
                "kernel": jax.random.normal(first, (inputs, width)) / np.sqrt(inputs),
                "bias": jnp.zeros(width),
            },
            "out": {"kernel": jax.random.normal(second, (width, 1)) / np.sqrt(width)},
        }

    def loss(params, key, batch, context):
        if traces is not None:
            traces.append(context.batch_size)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        draw = jax.vmap(lambda k: jax.random.normal(k, batch["x"].shape[1:]))
        x = batch["x"] + noise * draw(keys)
        hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        error = (hidden @ params["out"]["kernel"])[:, 0] - batch["y"]
        return jnp.mean(error**2), {"absolute": jnp.mean(jnp.abs(error))}

    return ToyMethod(init, loss)


class ToyPipeline:
    """`batch(step)`, a pure function of the step; `poison` makes the batch of one step NaN."""

    def __init__(self, size=BATCH, inputs=4, host=(0, 1), poison=None):
        self.size, self.inputs, self.host, self.poison = size, inputs, host, poison

    def batch(self, step):
        x = np.random.default_rng(step).normal(size=(self.size, self.inputs)).astype(np.float32)
        batch = {
            "x": x,
            "y": np.sin(x.sum(axis=1)) * (np.nan if step == self.poison else 1),
            "index": np.arange(self.size, dtype=np.int32),
        }
        index, count = self.host
        rows = slice(index * self.size // count, (index + 1) * self.size // count)
        return {name: value[rows].astype(value.dtype) for name, value in batch.items()}

    def iterate(self, start):
        step = start
        while True:
            yield step, self.batch(step)
            step += 1


def assert_same_bits(a, b):
    """Every leaf of two pytrees is equal, bit for bit."""
    leaves = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*leaves, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def start_python(code, devices=1, **popen):
    """Starts a Python process with the given number of virtual CPU devices."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **popen,
    )


def free_port():
    """A port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_together(code, count, devices=1, heartbeat=4):
    """Starts processes of one `jax.distributed` run; the code may use `PROCESS`."""
    address = {"coordinator_address": f"127.0.0.1:{free_port()}", "num_processes": count}
    address["heartbeat_timeout_seconds"] = heartbeat
    head = "from diffusion_jax.training import initialize_distributed\nPROCESS = {0}\n"
    head += f"initialize_distributed(dict({address!r}, process_id=PROCESS))\n"
    return [start_python(head.replace("{0}", str(i)) + code, devices) for i in range(count)]


def finish_together(processes, statuses=None, timeout=240):
    """Outputs of processes that must end with the given statuses, by default 0."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    found = [process.returncode for process in processes]
    assert found == (statuses or [0] * len(processes)), "\n".join(outputs)
    return outputs


def run_python(code, devices=1, timeout=300):
    """Output of a Python process that must succeed."""
    process = start_python(code, devices)
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output
