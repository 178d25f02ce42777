"""The command line from end to end on a tiny run, and its fail paths: one line, exit status 2."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.__main__ import main

TINY = [
    "--config.train.steps=6",
    "--config.train.batch_size=16",
    "--config.train.log_every=2",
    "--config.train.sample_every=0",
    "--config.train.checkpoint_every=3",
    "--config.train.progress=false",
    "--config.train.optimizer.schedule.warmup_steps=1",
    "--config.network.depth=1",
]
SMALLER = {
    "score": ["--config.network.width=32"],
    "bridge": ["--config.network.width=32"],
    "masked": ["--config.network.width=32", "--config.evaluate.draws=2"],
}


def train(family, workdir, *more):
    config = f"--config=configs/digits/{family}.py"
    return main(["train", config, f"--workdir={workdir}", *TINY, *SMALLER[family], *more])


slow_families = [pytest.param(name, marks=pytest.mark.slow) for name in ("bridge", "masked")]
one_family_is_quick = pytest.mark.parametrize("trained", ["score", *slow_families], indirect=True)


@pytest.fixture(scope="module", params=sorted(SMALLER))
def trained(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    assert train(request.param, workdir) == 0
    return request.param, workdir


def test_train_writes_a_whole_run_folder(trained):
    _, workdir = trained
    found = {p.name for p in workdir.iterdir()}
    assert {"config.json", "spec.json", "versions.json", "metrics.jsonl", "checkpoints"} <= found
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_sample_writes_picture_and_sidecar(trained, tmp_path, capsys):
    family, workdir = trained
    out = tmp_path / "grid.png"
    other = {"score": "ddim", "bridge": "dbim", "masked": "masked_ancestral"}[family]
    assert (
        main(
            ["sample", f"--workdir={workdir}", "--num=6", f"--sampler={other}", "--nfe=4"]
            + ["--batch_size=4", f"--out={out}"]
        )
        == 0
    )
    assert Image.open(out).size[0] > 20
    sidecar = json.loads((tmp_path / "grid.png.json").read_text())
    assert (sidecar["sampler"], sidecar["nfe"], sidecar["weights"]) == (other, 4, "ema_0.99")
    assert len(sidecar["checksum"]) == 12 and len(sidecar["times"]) == 4
    assert "4 network calls" in capsys.readouterr().out


@one_family_is_quick
def test_samples_do_not_depend_on_the_chunks(trained, tmp_path):
    _, workdir = trained
    drawn = []
    for size in (2, 5):
        out = tmp_path / f"{size}.npz"
        arguments = [f"--workdir={workdir}", "--num=5", "--nfe=3", f"--batch_size={size}"]
        if "masked" not in str(workdir):
            arguments += ["--seed=7"]
        assert main(["sample", *arguments, f"--out={out}"]) == 0
        drawn.append(np.load(out)["samples"])
    np.testing.assert_allclose(drawn[0], drawn[1], rtol=0, atol=1e-4)


def test_trajectory_strip(trained, tmp_path):
    _, workdir = trained
    out = tmp_path / "strip.png"
    arguments = [f"--workdir={workdir}", "--num=2", "--nfe=3", "--trajectory", f"--out={out}"]
    assert main(["sample", *arguments]) == 0
    assert out.is_file()


@one_family_is_quick
def test_evaluate_judges_between_floor_and_ceiling(trained, capsys):
    family, workdir = trained
    sampler = {"score": "ddim", "bridge": "dbim", "masked": "masked_ancestral"}[family]
    assert main(["evaluate", f"--workdir={workdir}", f"--sampler={sampler}", "--nfe=2"]) == 0
    printed = capsys.readouterr().out
    assert "held-out data" in printed and "noise" in printed
    report = json.loads((workdir / "evaluation.json").read_text())
    by_name = {row["sampler"]: row for row in report["rows"]}
    floor, ceiling = by_name["held-out data"]["frechet"], by_name["noise"]["frechet"]
    assert floor < 3.0 < 10.0 < ceiling
    # six steps of a tiny network teach nothing: the judge must not be fooled
    assert by_name[sampler]["frechet"] > 3.0 * floor
    if family == "masked":
        assert report["likelihood"]["histogram"] == pytest.approx(2.066, abs=0.02)
        assert report["likelihood"]["nats_per_token"] > 1.0


@one_family_is_quick
def test_train_goes_on_and_refuses_another_model(trained, capsys):
    family, workdir = trained
    assert train(family, workdir, "--config.train.steps=8") == 0
    assert "finished after 8 steps" in capsys.readouterr().out
    assert train(family, workdir, "--config.network.width=48") == 2
    assert "another config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--config=configs/digits/score.py", "--workdir={tmp}/x", "--config.train.stepz=1"], ["stepz", "steps"]),
        (["train", "--config=configs/digits/score.py", "--workdir={tmp}/x", "--config.train.steps=abc"], ["abc"]),
        (["train", "--config=configs/digits/scores.py", "--workdir={tmp}/x"], ["scores.py", "configs/digits/score.py"]),
        (["train", "--workdir={tmp}/x"], ["--config"]),
        (["train", "--config=configs/digits/score.py", "--workdir={tmp}/x", "--config.method.sampler=ddimm"], ["ddimm", "'ddim'"]),
        (["train", "--config=configs/digits/score.py", "--workdir={tmp}/x", "--config.process.name=vq"], ["vq", "vp"]),
        (["train", "--config=configs/digits/score.py", "--workdir={tmp}/x", "--config.train.optimizer.name=adamx"], ["adamx", "adam"]),
        (["train", "--config=configs/images/mnist.py", "--workdir={tmp}/x"], ["mnist", "diffusion_jax.data.prepare"]),
        (["sample", "--workdir={tmp}/nowhere", "--out={tmp}/x.png"], ["nowhere"]),
        (["sample", "--workdir={tmp}", "--out={tmp}/x.png"], ["config.json"]),
        (["evaluate", "--workdir={tmp}/nowhere"], ["nowhere"]),
        (["list", "sampler"], ["sampler", "samplers"]),
        (["doctor", "--wrong"], ["--wrong"]),
    ],
)  # fmt: skip
def test_mistakes_cost_one_line_and_status_2(arguments, named, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no_data"))
    arguments = [a.format(tmp=tmp_path) for a in arguments]
    assert main(arguments) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert all(word in message for word in named), message
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sampler=dpmpp_2n"], ["dpmpp_2n", "dpmpp_2m"]),
        (["--sampler=dbim"], ["dbim", "gaussian"]),
        (["--nfe=0"], ["0"]),
        (["--option", "eta=2", "--sampler=ddim"], ["eta", "[0, 1]"]),
        (["--option", "etta=2", "--sampler=ddim"], ["etta"]),
        (["--label=10"], ["10", "0..9"]),
        (["--num=0"], ["0"]),
        (["--weights=ema_0.5"], ["ema_0.5", "ema_0.99"]),
        (["--step=77"], ["77"]),
        (["--out=x.jpg"], [".jpg", ".png"]),
        (["--out=x.txt"], [".png"]),
    ],
)
@pytest.mark.parametrize("trained", ["score"], indirect=True)
def test_sampling_mistakes(trained, arguments, named, tmp_path, capsys, monkeypatch):
    _, workdir = trained
    monkeypatch.chdir(tmp_path)
    assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path}/x.png", *arguments]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert all(word in message for word in named), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trained", ["score"], indirect=True)
def test_a_checkpoint_that_does_not_fit_names_the_leaf(trained, tmp_path, capsys):
    _, workdir = trained
    path = workdir / "config.json"
    before = path.read_text()
    config = json.loads(before)
    config["network"]["width"] = 40
    path.write_text(json.dumps(config))
    try:
        assert main(["sample", f"--workdir={workdir}", f"--out={tmp_path}/x.png"]) == 2
    finally:
        path.write_text(before)
    message = capsys.readouterr().err
    assert "32" in message and "40" in message and "/" in message
    assert list(tmp_path.iterdir()) == []


def test_inspect_trains_nothing(tmp_path, capsys, monkeypatch):
    assert main(["inspect", "--config=configs/digits/score.py", "--config.network.depth=1"]) == 0
    printed = capsys.readouterr().out
    for word in ("image: float32 [8, 8, 1]", "parameters", "FLOP", "20 network calls"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


def test_list_and_doctor(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for word in ("dpmpp_2m", "first_hitting", "vp_bridge", "karras", "unet", "2405.15885"):
        assert word in printed
    for word in ("size: S/2, S/4", "sedd-medium", "DiT-XL-2-256x256"):
        assert word in printed
    assert main(["doctor"]) == 0
    assert "all well" in capsys.readouterr().out


def test_help_names_every_command():
    shown = subprocess.run(
        [sys.executable, "-m", "diffusion_jax", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = "train sample evaluate likelihood statistics inspect list doctor".split()
    for command in names:
        assert command in shown
