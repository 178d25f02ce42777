import json

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.evaluation.files import write_atomically
from diffusion_jax.evaluation.report import format_number, markdown_table, read_json, write_json


def test_json_round_trip(tmp_path):
    data = {
        "a": np.float32(0.5),
        "b": [np.int64(3), jnp.arange(2), (True, np.bool_(False), None)],
        "c": {"d": "ä", "e": jnp.bfloat16(1.5), "f": tmp_path},
    }
    path = write_json(tmp_path / "x" / "metrics.json", data)
    expected = {
        "a": 0.5,
        "b": [3, [0, 1], [True, False, None]],
        "c": {"d": "ä", "e": 1.5, "f": str(tmp_path)},
    }
    assert read_json(path) == expected
    assert [p.name for p in path.parent.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("bad", [float("nan"), np.float32("inf"), jnp.array([0.0, -jnp.inf])])
def test_json_is_strict(tmp_path, bad):
    path = tmp_path / "metrics.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match=r"\$\.rows\[1\]\.psnr.* is -?(nan|inf)"):
        write_json(path, {"rows": [{}, {"psnr": bad}]})
    assert read_json(path) == {"old": 1}, "a refused write must leave the old file"
    write_json(path, {"rows": bad}, nonfinite="null")
    text = path.read_text()
    assert "NaN" not in text and "Infinity" not in text and "null" in text


def test_reading_refuses_what_json_does_not_have(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": float("nan")}))
    with pytest.raises(ValueError, match="holds NaN"):
        read_json(path)


def test_json_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"\$\.a: cannot write a object"):
        write_json(tmp_path / "a.json", {"a": object()})
    with pytest.raises(ValueError, match="keys must be strings, got 3"):
        write_json(tmp_path / "a.json", {3: 1})
    with pytest.raises(ValueError, match="nonfinite must be one of raise, null; got 'drop'"):
        write_json(tmp_path / "a.json", {}, nonfinite="drop")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    "value, text",
    [
        (0.0, "0"),
        (1.0, "1.00"),
        (0.99951, "1.00"),
        (12.345, "12.3"),
        (999.9, "1000"),
        (123456.7, "123000"),
        (-0.0012345, "-0.00123"),
        (1.2345e-7, "1.23e-07"),
        (1.5e6, "1.50e+06"),
        (1797, "1797"),
        (np.int32(3), "3"),
        (np.float32(0.25), "0.250"),
        (None, "–"),
        (True, "yes"),
        (float("nan"), "nan"),
        ("score", "score"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_table():
    rows = [{"name": "a|b", "x": 0.5}, {"name": "c", "x": None, "extra": 1}]
    assert markdown_table(rows, {"name": "Set", "x": "Distance"}) == (
        "| Set | Distance |\n| --- | ---: |\n| a\\|b | 0.500 |\n| c | – |\n"
    )
    assert markdown_table(rows, ["x"], digits=1).splitlines()[2] == "| 0.5 |"
    with pytest.raises(ValueError, match="no row has the column 'y'; keys: extra, name, x"):
        markdown_table(rows, ["name", "y"])
    with pytest.raises(ValueError, match="at least one column"):
        markdown_table(rows, [])
