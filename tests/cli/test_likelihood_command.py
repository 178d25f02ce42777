"""`python -m diffusion_jax likelihood` on a tiny run, and its refusals: one line, exit status 2."""

import json

import numpy as np
import pytest

from diffusion_jax.__main__ import main

TINY = [
    "--config.train.steps=4",
    "--config.train.batch_size=16",
    "--config.train.sample_every=0",
    "--config.train.progress=false",
    "--config.train.optimizer.schedule.warmup_steps=1",
    "--config.network.depth=1",
    "--config.network.width=16",
]


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    made = {}
    for family in ("score", "masked"):
        made[family] = tmp_path_factory.mktemp(family) / "run"
        config = [f"--config=configs/digits/{family}.py", f"--workdir={made[family]}"]
        assert main(["train", *config, *TINY]) == 0
    return made


def test_likelihood_of_a_run(workdirs, tmp_path, capsys):
    workdir, out = workdirs["score"], tmp_path / "latents.npz"
    line = ["likelihood", f"--workdir={workdir}", "--num=5", "--batch_size=3", "--rtol=1e-3"]
    assert main([*line, "--atol=1e-3", "--draws=2", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "bits per dimension" in printed and "network calls" in printed
    report = json.loads((workdir / "likelihood.json").read_text())
    assert (report["num"], report["levels"], report["draws"]) == (5, 17, 2)
    assert report["divergence"] == "hutchinson" and report["nfe"] > 10
    with np.load(out) as stored:
        assert stored["latents"].shape == (5, 8, 8, 1) and stored["log_p"].shape == (2, 5)
        bits = -stored["log_p"].mean() / (64 * np.log(2)) + 3
    assert report["bits_per_dim"] == pytest.approx(bits)
    assert report["importance_bits"] <= report["bits_per_dim"]
    assert report["standard_error"] > 0 and report["round_trip"] < 1.0


REFUSED = [
    ("score", ["--sampler=ddpm"], ["'ddpm'", "probability-flow", "dopri5"]),
    ("score", ["--solver=rk45"], ["'rk45'", "dopri5"]),
    ("score", ["--divergence=trace"], ["'trace'", "exact", "hutchinson"]),
    ("score", ["--dequantisation=flow"], ["'flow'", "centred"]),
    ("score", ["--num=0"], ["num", "0"]),
    ("score", ["--probes=0"], ["probes", "0"]),
    ("score", ["--levels=1"], ["levels", "1"]),
    ("score", ["--out=latents.txt"], [".npz", "latents.txt"]),
    ("score", ["--wrong"], ["--wrong"]),
    ("masked", [], ["tokens", "Gaussian"]),
]


@pytest.mark.parametrize("family, more, parts", REFUSED)
def test_refusals(family, more, parts, workdirs, capsys):
    capsys.readouterr()
    assert main(["likelihood", f"--workdir={workdirs[family]}", *more]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and all(part in message for part in parts), message
