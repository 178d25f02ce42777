"""`statistics` on a tiny run, and the sampler that finds its file by itself."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diffusion_jax import judge
from diffusion_jax import run as runs
from diffusion_jax.__main__ import main
from diffusion_jax.samplers import ModelStatistics, model_statistics

TRAIN = [
    "--config.train.batch_size=16",
    "--config.train.sample_every=0",
    "--config.train.checkpoint_every=3",
    "--config.train.progress=false",
    "--config.train.optimizer.schedule.warmup_steps=1",
    "--config.network.depth=1",
    "--config.network.width=32",
]
SMALL = ["--num=12", "--intervals=6", "--batch_size=8"]


def train(family, workdir, steps):
    config = [f"--config=configs/digits/{family}.py", f"--config.train.steps={steps}"]
    return main(["train", *config, *TRAIN, f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("score") / "run"
    assert train("score", workdir, 3) == 0
    return workdir


@pytest.fixture
def measured(trained, capsys):
    assert main(["statistics", f"--workdir={trained}", *SMALL]) == 0
    yield trained, capsys.readouterr().out
    (trained / "statistics.npz").unlink(missing_ok=True)


def sample(workdir, out, *more):
    options = ["--num=3", "--sampler=dpm_solver_v3", "--nfe=4", *more]
    return main(["sample", f"--workdir={workdir}", f"--out={out}", *options])


def test_the_file_and_what_is_printed(measured):
    workdir, printed = measured
    statistics = ModelStatistics.load(workdir / "statistics.npz")
    assert (statistics.num, statistics.intervals, statistics.shape) == (12, 6, (8, 8, 1))
    assert statistics.process == "VP(beta_min=0.1, beta_max=20.0)"
    assert "12 examples" in printed and "6 intervals" in printed and "statistics.npz" in printed
    run = runs.open_run(workdir)
    assert statistics.checksum == runs.checksum(run.params)


@pytest.mark.slow
def test_labels_go_with_their_images(trained):
    """The same numbers from the parts: training images with their own labels, the run's own denoiser."""
    run = runs.open_run(trained)
    leaves, tree = jax.tree.flatten(run.params)  # three steps taught nothing about labels
    rng = np.random.default_rng(1)
    leaves = [v + 0.1 * rng.standard_normal(v.shape).astype(np.float32) for v in leaves]
    run = dataclasses.replace(run, params=tree.unflatten(leaves))
    found = runs.measure_statistics(run, num=12, intervals=6, batch_size=8)
    source = run.source("train")
    data = source.take(np.random.default_rng(0).permutation(len(source))[:12])

    def of(label):
        batch = {"label": label, "index": np.arange(12, dtype=np.int32)}
        denoise = run.method.denoiser(run.params, batch)
        options = {"intervals": 6, "batch_size": 12}
        process = run.method.process
        return model_statistics(process, denoise, jax.random.key(0), data["image"], **options)

    np.testing.assert_allclose(found.l, of(data["label"]).l, rtol=0, atol=1e-5)
    assert np.abs(found.l - of((data["label"] + 1) % 10).l).max() > 1e-3


def test_samplers_find_the_file(measured, tmp_path):
    workdir, _ = measured
    assert sample(workdir, tmp_path / "a.npz") == 0
    sidecar = json.loads((tmp_path / "a.npz.json").read_text())
    assert (sidecar["sampler"], sidecar["nfe"]) == ("dpm_solver_v3", 4)
    assert sample(workdir, tmp_path / "b.npz", "--option", "corrector=false") == 0
    drawn = [np.load(tmp_path / f"{name}.npz")["samples"] for name in "ab"]
    assert np.isfinite(drawn).all() and np.abs(drawn[0] - drawn[1]).max() > 0
    run = runs.open_run(workdir)
    built = judge.build_samplers(run, [{"name": "dpm_solver_v3", "nfe": 5, "order": 2}])
    assert (built[0].name, built[0].nfe) == ("dpm_solver_v3", 5)


def test_another_file_is_named(measured, tmp_path):
    workdir, _ = measured
    out = tmp_path / "more" / "short.npz"
    arguments = [f"--workdir={workdir}", *SMALL, "--t_end=0.01", f"--out={out}"]
    assert main(["statistics", *arguments]) == 0
    assert ModelStatistics.load(out).t_end == 0.01
    options = ["--option", f"statistics={out}", "--option", "t_end=0.01"]
    assert sample(workdir, tmp_path / "a.npz", *options) == 0


def one_line(capsys, *words):
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1
    assert all(word in message for word in words), message


def test_without_the_file_the_error_names_the_command(trained, tmp_path, capsys):
    command = f"python -m diffusion_jax statistics --workdir={trained}"
    assert sample(trained, tmp_path / "x.npz") == 2
    one_line(capsys, "statistics.npz", command)
    arguments = ["--sampler=dpm_solver_v3", "--nfe=4"]
    assert main(["evaluate", f"--workdir={trained}", *arguments]) == 2
    one_line(capsys, "statistics.npz", command)
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_fit(measured, tmp_path, capsys):
    workdir, _ = measured
    command = "diffusion_jax statistics --workdir="
    assert sample(workdir, tmp_path / "x.npz", "--weights=params") == 2
    one_line(capsys, runs.checksum(runs.open_run(workdir).params), command, "--weights=params")
    path = workdir / "statistics.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert sample(workdir, tmp_path / "x.npz") == 2
    one_line(capsys, "damaged", command)
    path.write_bytes(whole)
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"vp"', '"cosine"'))
    try:
        assert sample(workdir, tmp_path / "x.npz") == 2
    finally:
        (workdir / "config.json").write_text(config)
    one_line(capsys, "VP(", "Cosine(", command)
    assert sample(workdir, tmp_path / "x.npz", "--option", "t_end=0.0001") == 2
    one_line(capsys, "0.0001", "cover")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--num=1"], ["num", "1"]),
        (["--intervals=0"], ["intervals", "0"]),
        (["--probes=0"], ["probes", "0"]),
        (["--t_end=2"], ["t_end=2"]),
        (["--out=x.png"], [".npz", "x.png"]),
        (["--weights=ema_0.5"], ["ema_0.5"]),
        (["--nfe=3"], ["--nfe=3"]),
    ],
)
def test_mistakes(trained, arguments, named, capsys):
    assert main(["statistics", f"--workdir={trained}", *SMALL, *arguments]) == 2
    one_line(capsys, *named)
    assert not (trained / "statistics.npz").exists()


@pytest.mark.slow
def test_a_model_without_a_gaussian_process(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train("bridge", workdir, 2) == 0
    capsys.readouterr()
    assert main(["statistics", f"--workdir={workdir}", *SMALL]) == 2
    one_line(capsys, "Gaussian process", "Bridge")
