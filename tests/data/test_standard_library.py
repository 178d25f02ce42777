"""Characters of Python's standard library."""

import numpy as np
import pytest

from diffusion_jax.data.standard_library import ALPHABET, standard_library


def text_of(source):
    rows = source.take(np.arange(len(source)))["tokens"]
    return "".join(source.spec.decode(rows))


def test_the_running_python():
    train, test = (standard_library(64, split=split) for split in ("train", "test"))
    assert train.spec.vocab_size == len(ALPHABET) == 96
    assert len(train) > 40_000 and 0.03 < len(test) / len(train) < 0.3
    assert "import" in text_of(test)


def test_whole_modules_are_held_out(tmp_path):
    for i in range(20):
        (tmp_path / f"m{i:02}.py").write_text(f"{chr(97 + i)}" * 10)
    parts = {
        split: text_of(standard_library(5, split=split, folder=tmp_path, test_fraction=0.2))
        for split in ("train", "test", "all")
    }
    assert sorted(set(parts["test"])) == list("ejot")
    assert sorted(parts["train"] + parts["test"]) == sorted(parts["all"])
    assert parts["all"] == "".join(chr(97 + i) * 10 for i in range(20))


def test_what_is_left_out_and_replaced(tmp_path):
    (tmp_path / "a.py").write_bytes(b"if x:\r\n\ty\f")
    (tmp_path / "b.py").write_text("\N{GREEK SMALL LETTER ALPHA}" * 50)
    (tmp_path / "c.txt").write_text("no module")
    (tmp_path / "d.py").write_text("")
    source = standard_library(1, split="all", folder=tmp_path)
    assert text_of(source) == "if x:\n    y"


def test_windows_overlap_by_the_stride():
    every, some = standard_library(8, stride=1, split="test"), standard_library(8, split="test")
    np.testing.assert_array_equal(every[16]["tokens"], some[2]["tokens"])


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"length": 0}, "length=0 must be a positive integer"),
        ({"stride": -1}, "stride=-1 must be a positive integer"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"test_fraction": 1.5}, "test_fraction=1.5"),
        ({"folder": "nowhere"}, "'nowhere' has 0 characters, fewer than length=64"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words):
    with pytest.raises(ValueError, match=words):
        standard_library(**arguments)
