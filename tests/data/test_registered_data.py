"""What every registered data set keeps, whatever its origin."""

import itertools
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from diffusion_jax import registry
from diffusion_jax.data import Pipeline
from diffusion_jax.data.audio import write_wav

NAMES = (
    "arrays",
    "checkerboard",
    "chorales",
    "descriptions",
    "digits",
    "digits_tokens",
    "documents",
    "formants",
    "image_folder",
    "ljspeech",
    "pair_folders",
    "paired",
    "photos",
    "sequences",
    "spoken_digits",
    "standard_library",
    "sudoku",
    "text",
    "tfds",
    "tfds_text",
)


@pytest.fixture
def build(tmp_path, request):
    def make(name):
        if name == "arrays":
            return {
                "arrays": {"image": np.zeros((20, 4, 4, 3), np.uint8), "label": np.arange(20) % 3}
            }
        if name == "image_folder":
            for index in range(20):
                folder = tmp_path / "images" / f"class{index % 2}"
                folder.mkdir(parents=True, exist_ok=True)
                pixels = np.full((5, 6, 3), 10 * index, np.uint8)
                PIL.Image.fromarray(pixels).save(folder / f"{index:02}.png")
            return {"root": tmp_path / "images"}
        if name == "pair_folders":
            for index, part in itertools.product(range(20), ("image", "source")):
                (tmp_path / "pairs" / part).mkdir(parents=True, exist_ok=True)
                pixels = np.full((5, 6, 3), 10 * index, np.uint8)
                PIL.Image.fromarray(pixels).save(tmp_path / "pairs" / part / f"{index:02}.png")
            return {"root": tmp_path / "pairs"}
        if name == "text":
            (tmp_path / "text.txt").write_text("to be or not to be, " * 50, encoding="utf-8")
            return {"path": tmp_path / "text.txt", "length": 16}
        if name == "checkerboard":
            return {"train_count": 20, "test_count": 10}
        if name in ("formants", "ljspeech", "spoken_digits"):
            pytest.importorskip("librosa")
        if name == "formants":
            return {"train_count": 20, "test_count": 10}
        if name == "chorales":
            notes = np.random.default_rng(0).integers(40, 70, (60, 4))
            np.savez(tmp_path / "notes.npz", train_notes=notes, train_offsets=[0, 40, 60])
            return {"path": tmp_path / "notes.npz", "steps": 4}
        if name == "sequences":
            (tmp_path / "genes.txt").write_text("ACGT\nTTA\n" * 20)
            return {"path": tmp_path / "genes.txt", "length": 4}
        if name == "documents":
            (tmp_path / "lines.txt").write_text("to be\nor not\n" * 20)
            return {"path": tmp_path / "lines.txt", "length": 8}
        if name == "tfds_text":
            folder = request.getfixturevalue("tiny_text")(tmp_path, ["to be", "or not"] * 10)
            return {"dataset": "tiny_text", "data_dir": folder, "length": 8, "unit": "bytes"}
        if name == "sudoku":
            return {"train_count": 20, "test_count": 10, "bases": 2}
        if name == "spoken_digits":
            for index in range(20):
                path = tmp_path / "spoken" / f"{index % 10}_ann{index % 2}_{5 + index // 10}.wav"
                write_wav(path, np.sin(np.arange(800 + 40 * index)), 8_000)
            return {"root": tmp_path / "spoken"}
        if name == "ljspeech":
            for index in range(20):
                wave = np.sin(0.3 * np.arange(2_000 + 100 * index))
                write_wav(tmp_path / "lj" / "wavs" / f"LJ{index:02}.wav", wave, 22_050)
            lines = [f"LJ{i:02}|Take {i}.|Take number {'x' * i}." for i in range(20)]
            (tmp_path / "lj" / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
            return {"root": tmp_path / "lj", "max_frames": 32, "test_fraction": 0.3}
        if name == "tfds":
            return {
                "dataset": "tiny_set",
                "data_dir": request.getfixturevalue("tiny_tfds")(tmp_path),
            }
        return {}

    return lambda name, **kwargs: registry.get("data", name)(**make(name), **kwargs)


def test_all_are_listed_here():
    assert registry.names("data", examples=None) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_examples_match_the_spec(name, build):
    source = build(name)
    batch = Pipeline(source, 6, seed=1).batch(3)
    zeros = source.spec.zeros(6)
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in zeros.items()
    }
    assert source.spec.kind in registry.entry("data", name).meta["kinds"]
    if source.spec.kind == "image":
        assert batch["image"].min() >= -1 and batch["image"].max() <= 1
    if source.spec.kind == "tokens":
        assert batch["tokens"].min() >= 0 and batch["tokens"].max() < source.spec.vocab_size
    if "label" in batch:
        assert 0 <= batch["label"].min() and batch["label"].max() < source.spec.num_classes
    decoded = source.spec.decode(batch[source.spec.kind])
    assert len(decoded) == 6
    again = source.take([4, 2, 4])
    for key, values in again.items():
        np.testing.assert_array_equal(values[0], values[2])
        np.testing.assert_array_equal(values[1], source[2][key])
    empty = source.take([])
    assert {k: v.shape for k, v in empty.items()} == {
        k: (0, *e.shape) for k, e in source.spec.elements.items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_unknown_split_names_it(name, build):
    with pytest.raises(ValueError, match=r"split.*'tset'"):
        build(name, split="tset")


def test_importing_needs_numpy_alone():
    code = (
        "import sys, diffusion_jax.data\n"
        "heavy = ('PIL', 'sklearn', 'tensorflow', 'tensorflow_datasets', 'grain', 'flax', 'jax')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
