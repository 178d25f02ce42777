"""Text models on the command line: prompts, and the vocabulary that a run folder keeps."""

import json

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.__main__ import main
from diffusion_jax.run import open_run

TEXT = "to be, or not to be: that is the question. " * 40
SMALL = (
    "--config=configs/text/characters.py",
    "--config.data.length=16",
    "--config.network.width=16",
    "--config.network.depth=1",
    "--config.network.heads=2",
    "--config.train.steps=1",
    "--config.train.batch_size=4",
    "--config.train.optimizer.schedule.warmup_steps=0",
    "--config.train.sample_every=0",
    "--config.train.tensorboard=False",
    "--config.train.progress=False",
)


def train(workdir, *more):
    return main(["train", f"--workdir={workdir}", *SMALL, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("characters")
    (folder / "text.txt").write_text(TEXT)
    assert train(folder / "run", f"--config.data.path={folder / 'text.txt'}") == 0
    return folder / "run"


def sample(workdir, out, *more):
    return main(["sample", f"--workdir={workdir}", f"--out={out}", "--num=3", *more])


def test_a_prompt_stays_and_the_rest_is_filled(trained, tmp_path):
    out = tmp_path / "samples.txt"
    assert sample(trained, out, "--prompt=to be, _ or") == 0
    lines = out.read_text().removesuffix("\n").split("\n")
    assert len(lines) == 3 and all(len(line) == 16 and "_" not in line for line in lines)
    assert all(line[:7] == "to be, " and line[8:11] == " or" for line in lines)
    assert json.loads((tmp_path / "samples.txt.json").read_text())["prompt"] == "to be, _ or"


def test_prompts_of_a_file_in_turn(trained, tmp_path):
    (tmp_path / "prompts.txt").write_text("to\n\nbe*not\n")
    out = tmp_path / "samples.npz"
    file = f"--prompt_file={tmp_path / 'prompts.txt'}"
    assert sample(trained, out, file, "--mask_symbol=*") == 0
    drawn = np.load(out)
    texts = open_run(trained).spec.decode(drawn["samples"])
    assert [t[:2] for t in texts] == ["to", "be", "to"] and texts[1][3:6] == "not"
    assert (drawn["prompt"] == len(set(TEXT))).sum(axis=1).tolist() == [14, 11, 14]


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--prompt=to be?"], "'?' at position 5"),
        (["--prompt=" + "to be" * 4], "has 20 tokens, more than the model's length 16"),
        (["--prompt=a", "--prompt_file=b"], "either --prompt or --prompt_file"),
        (["--prompt_file=nowhere.txt"], "'nowhere.txt' is not a file"),
        (["--prompt=a", "--mask_symbol=ab"], "single character"),
    ],
)
def test_mistakes(trained, tmp_path, arguments, named, capsys):
    assert sample(trained, tmp_path / "a.txt", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1


def test_another_vocabulary_is_refused(trained, tmp_path, capsys):
    (tmp_path / "other.txt").write_text(TEXT.upper())
    (tmp_path / "more.txt").write_text(TEXT + "xyz" * 200)
    for name, what in (("other", "number other symbols"), ("more", "vocabulary of")):
        assert train(trained, f"--config.data.path={tmp_path / name}.txt") == 2
        error = capsys.readouterr().err
        assert what in error and error.count("\n") == 1
    new = [f"--config.train.init_from={trained}", f"--config.data.path={tmp_path / 'other.txt'}"]
    assert train(tmp_path / "new", *new) == 2
    assert "number other symbols" in capsys.readouterr().err and not (tmp_path / "new").exists()
    run = open_run(trained)
    run.config["data"]["path"] = str(tmp_path / "other.txt")
    with pytest.raises(ValueError, match="the first that differ: 'A' for 'a'"):
        run.source("test")


@pytest.mark.slow
def test_a_run_folder_keeps_its_tokenizer(tiny_tokenizer, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    file = tiny_tokenizer(tmp_path, TEXT)
    workdir = tmp_path / "run"
    options = (
        f"--config.data.path={tmp_path / 'text.txt'}",
        "--config.data.unit=tokens",
        f"--config.data.tokenizer={file}",
    )
    assert train(workdir, *options) == 0
    moved = workdir.rename(tmp_path / "moved")
    file.write_text("{}")  # the user's own may change or go
    out = tmp_path / "samples.txt"
    assert sample(moved, out, "--prompt=to be,") == 0
    assert out.read_text().startswith("to be,")
    assert open_run(moved).spec.vocab_size == 280
    tiny_tokenizer(moved, "other words " * 50)
    capsys.readouterr()
    assert sample(moved, out, "--prompt=to be,") == 2
    assert "is not the file that this was made with" in capsys.readouterr().err


@pytest.mark.slow
def test_puzzles_are_prompts(tmp_path):
    workdir = tmp_path / "run"
    (tmp_path / "config.py").write_text(
        "from configs.text import characters\n"
        "def get_config():\n"
        "    config = characters.get_config()\n"
        "    config.data = {'name': 'sudoku', 'givens': 60, 'bases': 1, 'train_count': 8,"
        " 'test_count': 4}\n"
        "    return config\n"
    )
    arguments = [a for a in SMALL if not a.startswith(("--config=", "--config.data"))]
    config = f"--config={tmp_path / 'config.py'}"
    assert main(["train", f"--workdir={workdir}", config, *arguments]) == 0
    out = tmp_path / "boards.npz"
    assert main(["sample", f"--workdir={workdir}", f"--out={out}", "--num=6"]) == 0
    drawn = np.load(out)
    puzzles = data.sudoku(split="test", givens=60, bases=1, test_count=4).take(np.arange(6) % 4)
    np.testing.assert_array_equal(drawn["prompt"], puzzles["prompt"])
    given = drawn["prompt"] != 9
    assert (drawn["samples"] == drawn["prompt"])[given].all() and drawn["samples"].max() < 9
