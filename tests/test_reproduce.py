"""Claims: their configs exist, and the stored tables say what their verdicts say."""

import importlib
import json
import pathlib

import numpy as np
import pytest

from experiments import reproduce

ROOT = pathlib.Path(reproduce.__file__).parent
PAPERS = reproduce.papers()


@pytest.mark.parametrize("paper", PAPERS)
def test_a_claim_is_complete(paper):
    claim = importlib.import_module(f"experiments.{paper}.claim")
    assert claim.TITLE and claim.CLAIM and callable(claim.verdicts)
    assert hasattr(claim, "measure") != hasattr(claim, "SAMPLERS")
    assert sorted(claim.CONFIGS) == ["cpu", "full"]
    for module in claim.CONFIGS.values():
        assert "train" in importlib.import_module(module).get_config()


@pytest.mark.parametrize("paper", [p for p in PAPERS if (ROOT / p / "results.json").is_file()])
def test_stored_verdicts_follow_from_the_stored_rows(paper):
    """Nobody writes a figure into a table by hand."""
    claim = importlib.import_module(f"experiments.{paper}.claim")
    stored = json.loads((ROOT / paper / "results.json").read_text())
    found = claim.verdicts(stored["rows"])
    assert [what for what, _, _ in found] == [v["statement"] for v in stored["verdicts"]]
    for (_, measured, holds), verdict in zip(found, stored["verdicts"], strict=True):
        assert bool(holds) == verdict["holds"]
        np.testing.assert_allclose(measured, verdict["measured"], rtol=1e-6)


def test_every_claim_has_a_line_in_the_experiments_readme():
    text = (ROOT / "README.md").read_text()
    for paper in PAPERS:
        assert f"experiments.reproduce {paper}`" in text, paper


def test_equal_error_calls():
    from experiments.solvers.comparison import equal_error_calls

    curve = {5: 1.0, 10: 0.25, 20: 0.0625}  # second order
    assert equal_error_calls(curve, 2.0) == 5.0
    assert equal_error_calls(curve, 0.25) == pytest.approx(10.0)
    assert equal_error_calls(curve, 0.125) == pytest.approx(10.0 * np.sqrt(2.0))
    assert equal_error_calls(curve, 0.01) == np.inf


def test_effective_temperature():
    from experiments.first_hitting.claim import effective_temperature

    log_p = np.log(np.random.default_rng(0).dirichlet(np.ones(9), 50))
    for temperature in (0.5, 1.0, 1.7):
        law = np.exp(log_p / temperature)
        law /= law.sum(axis=1, keepdims=True)
        drawn = (law * log_p).sum(axis=1).mean()
        assert effective_temperature(log_p, drawn) == pytest.approx(temperature, abs=1e-6)


def test_an_unknown_paper_is_named(capsys):
    with pytest.raises(SystemExit) as caught:
        reproduce.main(["dpm_solver_v4"])
    assert caught.value.code == 2
    assert "did you mean 'dpm_solver_v3'" in capsys.readouterr().err


def test_overrides_reach_the_configs_of_a_claim():
    module = "configs.speech.bridge_tts_digits"
    config = reproduce.load(
        module, ("--config.train.steps=7", "--config.data.root=here"), "encoder"
    )
    assert (config.train.steps, config.data.root, config.method.trains) == (7, "here", "encoder")
    assert reproduce.load(module).method.trains == "decoder"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["deis", "--config.train.stepz=7"], "unknown config field 'config.train.stepz'"),
        (["deis", "--step=7"], "unrecognized arguments: --step=7"),
        (["bridge_tts"], "name the folder by --config.data.root=FOLDER, or rehearse"),
        (["bridge_tts", "--config.data.root=nowhere"], "root='nowhere' does not exist"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words, capsys, monkeypatch, tmp_path):
    if arguments[0] == "bridge_tts":
        pytest.importorskip("librosa")
    monkeypatch.delenv("DIFFUSION_JAX_DATA", raising=False)
    with pytest.raises(SystemExit) as caught:
        reproduce.main([*arguments, f"--workdir={tmp_path}", f"--out={tmp_path / 'out.json'}"])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_a_claim_from_training_to_tables(tmp_path, monkeypatch):
    """The whole path on a model of a few steps; no claim is expected to hold."""
    claim = importlib.import_module("experiments.deis.claim")
    module = importlib.import_module(claim.CONFIGS["cpu"])
    config = module.get_config()
    config.train.update(steps=4, batch_size=16, sample_every=0, progress=False, tensorboard=False)
    config.train.optimizer.schedule.warmup_steps = 1
    monkeypatch.setattr(module, "get_config", lambda: config)
    out = tmp_path / "results.json"
    arguments = [f"--workdir={tmp_path / 'runs'}", f"--out={out}", "--seeds=2", "--num=60"]
    assert reproduce.main(["deis", *arguments]) in (0, 1)
    stored = json.loads(out.read_text())
    assert {row["sampler"] for row in stored["rows"]} >= {"DDIM", "DEIS tAB3"}
    assert "DEIS" in out.with_suffix(".md").read_text()
