"""The commands of docs/launch.md: all are parsed, and those marked to be run are run."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from training.toy import free_port

from diffusion_jax import commands
from diffusion_jax.__main__ import build_parser
from diffusion_jax.run import train_config

ROOT = pathlib.Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "launch.md").read_text()
BLOCKS = re.findall(r"(<!-- run -->\n)?```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
RUN = [block for mark, block in BLOCKS if mark]
TINY = " ".join(
    [
        "--config.train.steps=2",
        "--config.train.batch_size=16",
        "--config.train.sample_every=0",
        "--config.train.progress=false",
        "--config.train.tensorboard=false",
        "--config.train.optimizer.schedule.warmup_steps=1",
        "--config.network.width=16",
        "--config.network.depth=1",
    ]
)


def words_of(block):
    """The arguments of each `python -m diffusion_jax` command of a block."""
    for line in block.replace("\\\n", " ").splitlines():
        for found in re.finditer(r"-m diffusion_jax ([^#;&>']*)", line):
            yield [re.sub(r"\$\w+", "1", word) for word in found[1].split()]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_command_is_one_that_exists(number):
    for words in words_of(BLOCKS[number][1]):
        arguments, rest = build_parser().parse_known_args(words)
        if arguments.command in ("train", "inspect"):
            train_config(commands.load_config(rest))
        else:
            assert not rest, words


def test_the_guide_covers_what_it_promises():
    assert len(RUN) == 5
    for name in ("workstation", "Several GPUs", "Several machines", "SLURM", "TPU pod", "Colab"):
        assert re.search(rf"^## .*{name}", GUIDE, flags=re.MULTILINE), name
    assert "were **not** run" in GUIDE


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The blocks share what they compile."""
    return tmp_path_factory.mktemp("compiled")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RUN)))
def test_blocks_marked_to_be_run(number, tmp_path, cache):
    for name in ("configs", "diffusion_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    block = re.sub(r"(--config=\S+)", rf"\1 {TINY}", RUN[number])
    block = re.sub(r"127\.0\.0\.1:\d+", lambda _: f"127.0.0.1:{free_port()}", block)
    block = re.sub(r"\bpython -m", f"{sys.executable} -m", block)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("XLA_FLAGS")}
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_PORT": str(free_port())}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run(
        ["bash", "-e", "-c", block],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "diffusion_jax: " not in output, output
    for folder in re.findall(r"train .*--workdir=([^\s;]+)", block.replace("\\\n", " ")):
        assert (tmp_path / folder / "checkpoints" / "2").is_dir(), output
        assert "finished after 2 steps" in output
    for file in re.findall(r"--out=(\S+)", block):
        assert (tmp_path / file).is_file(), output
    if "runs/hand" in block:
        one = [sys.executable, "-m", "diffusion_jax", "sample", "--workdir=runs/hand"]
        one += ["--num=10", "--nfe=3", "--out=runs/alone.npz"]
        subprocess.run(one, cwd=tmp_path, env=environment, check=True, timeout=300)
        alone, together = (np.load(tmp_path / "runs" / f"{n}.npz") for n in ("alone", "hand"))
        np.testing.assert_allclose(alone["samples"], together["samples"], atol=1e-5)
        assert (tmp_path / "runs" / "hand" / "evaluation.json").is_file()
