"""Files of weights: what is read, under which names, and what is refused without running it."""

import os
import pickle
import sys

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion_jax.interop import files
from diffusion_jax.interop.files import FileError, read_state, without_prefix, write_state

STATE = {
    "blocks.0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "blocks.0.bias": np.array([0.5, -1.0], np.float32),
    "steps": np.arange(3),
}


def same(found, wanted):
    assert set(found) == set(wanted)
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        np.testing.assert_array_equal(found[name], wanted[name])


def test_safetensors_there_and_back(tmp_path):
    path = write_state(tmp_path / "new" / "w.safetensors", STATE)
    same(read_state(path), STATE)
    fortran = {"w": np.asfortranarray(STATE["blocks.0.weight"])}
    same(read_state(write_state(path, fortran)), fortran)
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_state(tmp_path / "w.safetensors", STATE)

    def broken(arrays, file, metadata):
        file.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(files, "save_file", broken)
    with pytest.raises(OSError, match="no space"):
        write_state(path, {"other": np.ones(2)})
    monkeypatch.undo()
    same(read_state(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_small_floats_become_float32(tmp_path, dtype):
    save_file({"w": np.array([1.5, -0.25], dtype)}, tmp_path / "w.safetensors")
    same(read_state(tmp_path / "w.safetensors"), {"w": np.array([1.5, -0.25], np.float32)})


def test_a_key_of_safetensors_is_the_beginning_of_names(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"ema.a": np.ones(2, np.float32), "model.a": np.zeros(2, np.float32)}, path)
    same(read_state(path, "ema"), {"a": np.ones(2, np.float32)})
    with pytest.raises(FileError, match=r"begin with 'best.'"):
        read_state(path, "best")


def test_prefixes():
    names = ("a.weight", "b.weight", "weight")
    state = {f"net.{name}": 1 for name in names} | {"net.table": 2, "noise.weight": 3}
    inside, outside = without_prefix(state, names)
    assert inside == {"a.weight": 1, "b.weight": 1, "weight": 1, "table": 2}
    assert outside == ["noise.weight"]
    assert without_prefix({"a.weight": 1, "c": 2}, names) == ({"a.weight": 1, "c": 2}, [])
    assert without_prefix({"c": 2}, names) == ({"c": 2}, [])


def test_what_is_no_file_of_weights(tmp_path):
    with pytest.raises(FileError, match=r"no file '.*w.safetensors'"):
        read_state(tmp_path / "w.safetensors")
    with pytest.raises(FileError, match=r"ends in '.h5'; weights are read from .safetensors, .pt"):
        read_state(tmp_path / "w.h5")
    with pytest.raises(FileError, match=r"written as .safetensors"):
        write_state(tmp_path / "w.pt", STATE)


@pytest.mark.parametrize("left", [0, 4, 40, -3])
def test_truncated_safetensors(tmp_path, left):
    path = write_state(tmp_path / "w.safetensors", STATE)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(FileError, match="damaged, or no safetensors file") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite(tmp_path, value):
    path = write_state(tmp_path / "w.safetensors", STATE | {"bad": np.array([1.0, value])})
    with pytest.raises(FileError, match="bad holds numbers that are not finite"):
        read_state(path)


class Harmful:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "network.pkl"
    path.write_bytes(pickle.dumps({"ema": Harmful(tmp_path / "ran")}))
    with pytest.raises(FileError, match=r"runs code when it is read.*convert it once.*network.pt"):
        read_state(path)
    assert not (tmp_path / "ran").exists()
    pickle.loads(path.read_bytes())  # it would have
    assert (tmp_path / "ran").exists()


def test_without_torch_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    path.write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"diffusion_jax\[torch\]"):
        read_state(path)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.mark.parametrize("old", [False, True])
def test_files_of_torch(tmp_path, torch, old):
    state = {name: torch.from_numpy(value) for name, value in STATE.items()}
    state |= {"half": torch.ones(2, dtype=torch.bfloat16)}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=not old)
    same(read_state(tmp_path / "w.pt"), STATE | {"half": np.ones(2, np.float32)})


def test_nested_files_of_torch(tmp_path, torch):
    path = tmp_path / "w.ckpt"
    weights = lambda value: {
        "a.weight": torch.full((2, 3), value),
        "a.bias": torch.full((2,), value),
    }
    optimizer = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}}}
    torch.save({"state_dict": weights(1.0), "step": torch.tensor(4), "optimizer": optimizer}, path)
    assert read_state(path)["a.bias"].tolist() == [1.0, 1.0]

    nested = {"model": weights(1.0), "ema": {"params": weights(2.0), "decay": 0.5}}
    torch.save(nested | {"optimizer": optimizer}, path)
    with pytest.raises(FileError, match=r"choose one with key: model \(2 arrays\), ema.params"):
        read_state(path)
    assert read_state(path, "ema")["a.bias"].tolist() == [2.0, 2.0]
    assert read_state(path, "ema.params")["a.bias"].tolist() == [2.0, 2.0]
    with pytest.raises(FileError, match="no weights under 'modle'; did you mean 'model'"):
        read_state(path, "modle")
    torch.save({"step": 3}, path)
    with pytest.raises(FileError, match="holds no arrays by name"):
        read_state(path)


def test_an_average_kept_as_a_list_takes_the_names_beside_it(tmp_path, torch):
    """In the order of the model's parameters, which is not that of the alphabet."""
    path = tmp_path / "w.pt"
    state = {"net.b": torch.zeros(2), "net.table": torch.zeros(2), "net.a": torch.zeros(2)}
    average = {"decay": 0.5, "shadow_params": [torch.full((2,), 1.0), torch.full((2,), 2.0)]}
    torch.save({"model": state, "ema": average}, path)
    found = read_state(path, "ema", names=("a", "b"))
    assert {n: v.tolist() for n, v in found.items()} == {"net.b": [1.0, 1.0], "net.a": [2.0, 2.0]}
    with pytest.raises(FileError, match=r"ema.shadow_params is a list of 2 arrays without names"):
        read_state(path, "ema")
    torch.save({"ema": average}, path)
    with pytest.raises(FileError, match="without names"):
        read_state(path, names=("a", "b"))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_of_torch_does_not_run(tmp_path, torch):
    path = tmp_path / "w.pt"
    torch.save({"model": Harmful(tmp_path / "ran")}, path)
    with pytest.raises(FileError, match=r"Python objects beside its arrays.*mkdir.*not opened"):
        read_state(path)
    path.write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(FileError, match=r"more than weights.*not opened"):
        read_state(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("left", [0, 10, 200, -40])
def test_truncated_files_of_torch(tmp_path, torch, left):
    path = tmp_path / "w.pt"
    torch.save({name: torch.from_numpy(value) for name, value in STATE.items()}, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(FileError, match="damaged") as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
