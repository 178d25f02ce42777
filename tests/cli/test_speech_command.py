"""What `sample` and `evaluate` make of a speech model: pictures, wav files, distances.

The model is a stand-in that says the truth, a little blurred or noisy: training one is tested elsewhere.
"""

import json
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("librosa")

from diffusion_jax import data, run
from diffusion_jax.__main__ import main
from diffusion_jax.data.audio import read_wav
from diffusion_jax.judge import judge, table

HOP, FRAMES, BANDS = 160, 32, 20
CONFIG = {
    "data": {
        "name": "formants",
        "train_count": 100,
        "test_count": 50,
        "max_frames": FRAMES,
        "audio": {"hop": HOP, "mels": BANDS},
    },
    "evaluate": {},
}


def stand_in(config, error):
    """A run whose samples are `error(points)` of the truth."""
    source = data.formants(**{k: v for k, v in config["data"].items() if k != "name"})

    def sample(params, key, batch, sampler=None, **options):
        points = np.asarray(batch["points"])
        inside = np.arange(points.shape[1])[:, None] < np.asarray(batch["frames"])[:, None, None]
        x = np.where(inside, error(points), -1.0).astype(np.float32)
        return (x, np.stack([0 * x, x])) if options.get("trajectory") else x

    method = types.SimpleNamespace(
        sample=sample,
        default_sampler=types.SimpleNamespace(name="dbim", nfe=4, times=np.linspace(1, 0, 4)),
        bound=None,
    )
    return lambda workdir, *_: run.Run(
        workdir, config, source.spec, method, {"w": np.zeros(3)}, "params", 7
    )


def blur(points):
    padded = np.pad(points, ((0, 0), (1, 1), (0, 0)), mode="edge")
    return (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3


@pytest.fixture
def opened(monkeypatch):
    def open_with(error=blur, **more):
        made = stand_in({**CONFIG, **more}, error)
        monkeypatch.setattr(run, "open_run", made)
        return made("")

    return open_with


def test_sample_writes_spectrograms_and_wav_files(opened, tmp_path, capsys):
    opened()
    out = tmp_path / "new" / "said.png"
    assert main(["sample", f"--workdir={tmp_path}", "--num=7", f"--out={out}"]) == 0
    assert "new/said_wav" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "new" / "said_wav").iterdir())
    assert len(names) == 7 and names[6] == "006_six_speaker_0.wav"
    wave = read_wav(tmp_path / "new" / "said_wav" / names[6], 8_000)
    assert 10 * HOP < len(wave) <= FRAMES * HOP and np.abs(wave).max() > 0.9
    # two rows of five, truth above sample, enlarged to about 120 pixels
    width, height = Image.open(out).size
    assert width > 5 * 4 * FRAMES and height > 2 * 2 * 4 * BANDS
    assert json.loads(out.with_name("said.png.json").read_text())["nfe"] == 4


def test_one_label_arrays_and_strips(opened, tmp_path, capsys):
    opened()
    out = tmp_path / "x.npz"
    arguments = ["sample", f"--workdir={tmp_path}", "--num=12"]
    assert main([*arguments, "--label=7", f"--out={out}"]) == 0
    stored = np.load(out)
    assert set(stored["label"]) == {7} and stored["samples"].shape == (12, FRAMES, BANDS)
    # five examples of the test split say "seven"; they come round again
    np.testing.assert_array_equal(stored["points"][:5], stored["points"][5:10])
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []
    assert main([*arguments, "--trajectory", f"--out={tmp_path / 'strip.png'}"]) == 0
    assert Image.open(tmp_path / "strip.png").size[0] > 2 * FRAMES
    assert main([*arguments, "--label=10", f"--out={out}"]) == 2
    assert "no example of split 'test' has the label 10" in capsys.readouterr().err
    assert main([*arguments, f"--out={tmp_path / 'x.txt'}"]) == 2


def test_previews_of_training_show_truth_and_sample(opened):
    made = opened()
    batch = run.first_conditions(made.source("train"), 3)
    shown = run.picture(made.spec, batch["points"], batch)
    assert set(shown) == {"samples", "truth"} and shown["truth"].shape == (3, BANDS, FRAMES, 3)


@pytest.mark.slow
def test_judge_measures_distances(opened, tmp_path):
    cache = tmp_path / "classifier.npz"
    close = judge(opened(lambda x: x + 0.02), cache=cache)
    rows = {row["sampler"]: row for row in close["rows"]}
    assert set(rows) == {"dbim", "held-out data", "noise"}
    # 0.02 of 3.7 nats, but silence that is cut off at the floor stays silence; no distortion of shape
    assert rows["dbim"]["mel_l1"] == pytest.approx(0.02 * 3.704, rel=0.01)
    assert rows["dbim"]["frames_error"] < 0.05 and rows["dbim"]["mcd"] < 0.05
    blurred = judge(opened(lambda x: blur(blur(blur(x)))), cache=cache)["rows"][0]
    assert blurred["mcd"] > 10 * rows["dbim"]["mcd"]
    assert blurred["utterance_frechet"] > 2 * rows["held-out data"]["utterance_frechet"]
    assert rows["dbim"]["accuracy"] > 0.9
    printed = table(close["rows"])
    for word in ("mel L1 (nats)", "MCD (dB)", "utterance distance", "held-out data"):
        assert word in printed
    json.dumps(close["rows"])


def test_judge_without_labels(opened, monkeypatch):
    """As a set without digits, such as LJ Speech."""
    made = opened()
    bare = {**made.spec.to_json(), "num_classes": None, "class_names": None}
    del bare["elements"]["label"]
    spec = data.DataSpec.from_json(bare)
    rows = judge(run.Run("", made.config, spec, made.method, made.params, "params", 7), num=20)
    assert [row["sampler"] for row in rows["rows"]] == ["dbim", "held-out data"]
    assert rows["rows"][0]["mel_l1"] > 0
    # 20 utterances are too few for a covariance of 39 features
    assert rows["rows"][0]["utterance_frechet"] is None
    assert rows["rows"][1]["utterance_frechet"] > 0
