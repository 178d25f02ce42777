"""`evaluate --text_model=FOLDER`: files of texts and a run, under a tiny GPT-2 with its own tokenizer."""

import json

import jax
import numpy as np
import pytest

from configs.text.characters import get_config
from diffusion_jax import judge_text
from diffusion_jax import run as runs
from diffusion_jax.__main__ import main
from diffusion_jax.data.tokenizer import load_tokenizer
from diffusion_jax.interop.files import write_state
from diffusion_jax.interop.gpt2 import abstract, gpt2, read_gpt2
from diffusion_jax.interop.mapping import export_state
from diffusion_jax.networks.gpt2 import GPT2
from tests.cli.untrained import untrained_run

TEXT = "the quick brown fox jumps over the lazy dog. "
CONFIG = {"model_type": "gpt2", "vocab_size": 280, "n_embd": 8, "n_layer": 1, "n_head": 2}
CONFIG |= {"n_positions": 48, "eos_token_id": 0}


@pytest.fixture(autouse=True)
def quick_to_compile():
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    model = tmp_path / "gpt2"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIG))
    module = GPT2(vocab_size=280, width=8, depth=1, heads=2, max_length=48)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape), abstract(module))
    write_state(model / "model.safetensors", export_state(gpt2(module), params))
    tiny_tokenizer(model, TEXT * 5)
    return tmp_path


WORDS = "quick brown fox lazy dog the jumps".split()


def lines(path, count, seed):
    rng = np.random.default_rng(seed)
    found = [" ".join(rng.choice(WORDS, rng.integers(2, 30))) for _ in range(count)]
    path.write_text("\n".join(found) + "\n")
    return found


def test_perplexities_are_those_of_the_model(folder, capsys):
    texts = lines(folder / "a.txt", 7, 0)
    assert main(["evaluate", f"--text_model={folder}/gpt2", f"--texts={folder}/a.txt"]) == 0
    cells = capsys.readouterr().out.splitlines()[-1].split("|")
    # a second way: one text, one window at a time
    model, tokenizer = read_gpt2(folder / "gpt2"), load_tokenizer(folder / "gpt2")
    variables, nats, tokens = {"params": model.params}, 0.0, 0

    @jax.jit
    def log_probabilities(part):
        return jax.nn.log_softmax(model.module.apply(variables, part, method="logits"))

    for text in texts:
        ids = tokenizer.encode(text)
        for part in np.split(ids, range(48, len(ids), 48)):
            log_p = np.asarray(log_probabilities(np.pad(part, (0, 48 - len(part)))[None]))
            nats -= float(np.take_along_axis(log_p[0, : len(part) - 1], part[1:, None], 1).sum())
            tokens += len(part) - 1
    assert int(cells[3]) == tokens and int(cells[2]) == 7
    assert float(cells[4]) == pytest.approx(np.exp(nats / tokens), rel=1e-3)


def test_texts_of_both_kinds_of_files(folder):
    texts = lines(folder / "a.txt", 5, 0)
    rows = [json.dumps({"text": text} if i % 2 else text) for i, text in enumerate(texts)]
    (folder / "b.jsonl").write_text("\n".join(rows) + "\n\n")
    assert judge_text.read_texts(folder / "b.jsonl") == judge_text.read_texts(folder / "a.txt")


def test_batches_change_nothing(folder):
    texts = lines(folder / "a.txt", 7, 0)
    found = [judge_text.TextModel(folder / "gpt2", batch_size=n).score(texts) for n in (2, 8)]
    np.testing.assert_allclose(found[0].nats, found[1].nats, rtol=1e-5)
    np.testing.assert_allclose(found[0].features, found[1].features, atol=1e-5)


def test_mauve_against_a_reference(folder, capsys):
    pytest.importorskip("mauve")
    lines(folder / "a.txt", 40, 0)
    lines(folder / "b.txt", 40, 1)
    line = ["evaluate", f"--text-model={folder}/gpt2", f"--texts={folder}/a.txt", "--mauve"]
    assert main([*line, f"--reference={folder}/b.txt"]) == 0
    rows = [x.split("|") for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert rows[0][-2].strip() == "MAUVE" and 0 < float(rows[2][-2]) <= 1
    assert rows[3][-2].strip() == "–"


def test_a_run_is_judged_beside_its_held_out_data(folder, monkeypatch, capsys):
    (folder / "text.txt").write_text(TEXT * 40)
    (folder / "run").mkdir()
    config = get_config()
    config.data.update(path=str(folder / "text.txt"), length=16)
    config.network.update(width=16, depth=1)
    monkeypatch.setattr(runs, "open_run", lambda path, *_: untrained_run(config, path))
    line = ["evaluate", f"--workdir={folder}/run", f"--text_model={folder}/gpt2", "--num=5"]
    assert main([*line, "--nfe=4"]) == 0
    assert "held-out data" in capsys.readouterr().out
    report = json.loads((folder / "run" / "texts.json").read_text())
    names = [row["set"] for row in report["rows"]]
    assert names[1] == "held-out data" and names[0].endswith(" 4")
    assert all(row["texts"] == 5 and row["entropy"] > 0 for row in report["rows"])
    assert len(report["text_model"]["tokenizer"]) == 64


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text_model=@gpt2"], ["--workdir", "--texts"]),
        (["--text_model=@gpt2", "--texts=@a.txt", "--mauve"], ["--reference"]),
        (["--text_model=@gpt2", "--texts=@no.txt"], ["no.txt"]),
        (["--text_model=@gpt2", "--texts=@empty.txt"], ["empty.txt", "no texts"]),
        (["--text_model=@gpt2", "--texts=@bad.jsonl"], ["bad.jsonl", "no text"]),
        (["--text_model=@none", "--texts=@a.txt"], ["none"]),
        (["--text_model=@small", "--texts=@a.txt"], ["tokenizer has 280 tokens"]),
        (["--text_model=@gpt2", "--texts=@a.txt", "--window=49"], ["window must be in 2..48"]),
        (["--text_model=@gpt2", "--texts=@a.txt", "--stride=0"], ["stride in 1..window"]),
        (["--texts=@a.txt"], ["--texts goes with"]),
    ],
)
def test_mistakes_end_in_one_line(folder, arguments, words, capsys):
    lines(folder / "a.txt", 3, 0)
    (folder / "empty.txt").write_text("\n \n")
    (folder / "bad.jsonl").write_text('{"words": "a"}\n')
    if "small" in arguments[0]:
        small = folder / "small"
        small.mkdir()
        module = GPT2(vocab_size=20, width=8, depth=1, heads=2, max_length=48)
        params = jax.tree.map(lambda x: np.zeros(x.shape), abstract(module))
        write_state(small / "model.safetensors", export_state(gpt2(module), params))
        (small / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 20}))
        (small / "tokenizer.json").write_bytes((folder / "gpt2" / "tokenizer.json").read_bytes())
    assert main(["evaluate", *(word.replace("@", f"{folder}/") for word in arguments)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("diffusion_jax: ")
    for word in words:
        assert word in error, error
