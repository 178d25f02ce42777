"""Arrays on disk: what comes back, what is refused, and that no old file is lost."""

import os
import pickle

import numpy as np
import pytest

from diffusion_jax.array_files import read_arrays, write_arrays

KIND = "tests.numbers.1"


def pair(about, arrays):
    return about, arrays


def test_what_is_written_comes_back(tmp_path):
    path = tmp_path / "deep" / "a.npz"
    held = {"x": np.arange(6.0).reshape(2, 3), "n": np.int32(4)}
    assert write_arrays(path, KIND, {"name": "a", "of": [1, None]}, held) == path
    about, arrays = read_arrays(path, KIND, "numbers", pair)
    assert about == {"name": "a", "of": [1, None]} and sorted(arrays) == ["n", "x"]
    for name, value in held.items():
        np.testing.assert_array_equal(arrays[name], value)
        assert arrays[name].dtype == value.dtype
    assert os.listdir(path.parent) == ["a.npz"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.npz"
    write_arrays(path, KIND, {}, {"x": np.ones(2)})
    with pytest.raises(TypeError):
        write_arrays(path, KIND, {"bad": object()}, {"x": np.zeros(2)})
    assert read_arrays(path, KIND, "numbers", pair)[1]["x"].tolist() == [1.0, 1.0]


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    write_arrays(path, KIND, {}, {"x": np.arange(100.0)})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(np.float64(50.0).tobytes())] ^= 1
    for damaged in (b"", b"text", whole[:-40], bytes(flipped), pickle.dumps({"x": 1})):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.npz is damaged or holds no numbers"):
            read_arrays(path, KIND, "numbers", pair)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="another kind or version"):
        read_arrays(path, "tests.numbers.2", "numbers", pair)
    with pytest.raises(ValueError, match="damaged or holds no numbers: 'y'"):
        read_arrays(path, KIND, "numbers", lambda about, arrays: arrays["y"])
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="damaged or holds no numbers"):
        read_arrays(path, KIND, "numbers", pair)
    with pytest.raises(FileNotFoundError, match=r"no file of numbers: '.*none.npz'"):
        read_arrays(tmp_path / "none.npz", KIND, "numbers", pair)
