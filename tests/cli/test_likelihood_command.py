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
    made["score"] = tmp_path_factory.mktemp("score") / "run"
    config = ["--config=configs/digits/score.py", f"--workdir={made['score']}"]
    assert main(["train", *config, *TINY]) == 0
    made["text"] = tmp_path_factory.mktemp("text") / "run"
    path = made["text"].with_name("train.txt")
    path.write_text("the quick brown fox jumps over the lazy dog " * 40)
    config = ["--config=configs/text/characters.py", f"--workdir={made['text']}"]
    config += [f"--config.data.path={path}", "--config.data.length=16"]
    assert main(["train", *config, *TINY]) == 0
    return made


@pytest.mark.slow
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


def test_perplexities_of_several_texts(workdirs, tmp_path, capsys):
    workdir, out = workdirs["text"], tmp_path / "nats.npz"
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("the lazy dog jumps over the quick brown fox and more")
    second.write_text("Nothing but NEW words, 7 of them, in this text.\n" * 3)
    line = ["likelihood", f"--workdir={workdir}", f"--text=fox={first}", f"--text={second}"]
    assert main([*line, "--clean=text8", "--draws=4", f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert "| fox" in printed and "| second" in printed and "perplexity" in printed
    report = json.loads((workdir / "likelihood.json").read_text())
    rows = {row["set"]: row for row in report["sets"]}
    assert report["draws"] == 4 and report["clean"] == "text8"
    assert (rows["fox"]["tokens"], rows["fox"]["left_over"]) == (48, 4)
    assert rows["fox"]["perplexity"] == pytest.approx(np.exp(rows["fox"]["nats_per_token"]))
    assert rows["fox"]["bits_per_token"] == pytest.approx(rows["fox"]["nats_per_token"] / np.log(2))
    assert rows["second"]["standard_error"] > 0 and rows["second"]["path"] == str(second)
    with np.load(out) as stored:
        assert stored["fox"].shape == (3,)
        assert stored["fox"].sum() / 48 == pytest.approx(rows["fox"]["nats_per_token"])
    # four steps of training: near the uniform law of its 27 characters
    assert rows["fox"]["nats_per_token"] == pytest.approx(np.log(27), rel=0.2)


def test_held_out_perplexity(workdirs, capsys):
    assert main(["likelihood", f"--workdir={workdirs['text']}", "--num=3", "--draws=2"]) == 0
    row = json.loads((workdirs["text"] / "likelihood.json").read_text())["sets"][0]
    assert (row["set"], row["sequences"], row["tokens"]) == ("held-out", 3, 3 * 16)
    # the same set, as a text
    path = workdirs["text"].with_name("train.txt")
    held_out = path.read_text()[int(44 * 40 * 0.9) :][: 2 * 16 + 16]
    path.with_name("held_out.txt").write_text(held_out)
    line = ["likelihood", f"--workdir={workdirs['text']}", "--draws=2"]
    assert main([*line, f"--text={path.with_name('held_out.txt')}", "--num=3"]) == 0
    again = json.loads((workdirs["text"] / "likelihood.json").read_text())["sets"][0]
    assert again["nats_per_token"] == pytest.approx(row["nats_per_token"], rel=0.1)
    capsys.readouterr()
    # the file has changed since: its characters have other numbers
    before = path.read_text()
    path.write_text("entirely other characters: !?" * 60)
    assert main(["likelihood", f"--workdir={workdirs['text']}"]) == 2
    path.write_text(before)
    assert "the model was trained on" in capsys.readouterr().err


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
    ("score", ["--text=a=b.txt"], ["--text", "image"]),
    ("text", ["--num=0"], ["num", "0"]),
    ("text", ["--draws=0"], ["draws", "0"]),
    ("text", ["--text=a=none.txt"], ["none.txt", "not a file"]),
    ("text", ["--text=a=README.md"], ["'a'", "character", "clean='text8'", "unknown"]),
    ("text", ["--text=a=README.md", "--text=a=Makefile"], ["'a'", "twice"]),
    ("text", ["--text=a="], ["name=path", "'a='"]),
    ("text", ["--text=a=README.md", "--clean=text9"], ["text9", "text8"]),
    ("text", ["--text=a=README.md", "--unknown=%"], ["'%'", "drop"]),
]


@pytest.mark.parametrize("family, more, parts", REFUSED)
def test_refusals(family, more, parts, workdirs, capsys):
    capsys.readouterr()
    assert main(["likelihood", f"--workdir={workdirs[family]}", *more]) == 2
    message = capsys.readouterr().err.strip()
    assert "\n" not in message and all(part in message for part in parts), message
