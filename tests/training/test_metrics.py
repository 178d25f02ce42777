import json
import struct
import sys
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.training.metrics import (
    MetricsWriter,
    Window,
    encode_png,
    image_grid,
    read_rows,
)


def vectors(values):
    return [jnp.array(v, jnp.float32) for v in values]


def test_window_means_lasts_and_guard():
    window = Window(("loss", "rate", "halt"), last=("rate",), guard="halt")
    for vector in vectors([[1, 5, 0], [2, 6, 0], [6, 7, 0]]):
        window.add(vector)
    assert window.row() == {"loss": 3.0, "rate": 7.0, "halt": 0.0}
    for vector in vectors([[4, 8, 0], [np.nan, 9, 1], [np.nan, 9, 1]]):
        window.add(vector)
    window.collect()
    assert window.failed["rate"] == 9 and np.isnan(window.failed["loss"])
    assert window.row()["loss"] == 4.0


def test_a_window_split_by_a_checkpoint_gives_the_same_bits():
    values = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
    whole, first, second = (Window(("a", "b")) for _ in range(3))
    for k, vector in enumerate(vectors(values)):
        whole.add(vector)
        (first if k < 7 else second).add(vector)
        if k == 6:
            second.from_json(json.loads(json.dumps(first.to_json())))
    assert whole.row() == second.row()
    second.from_json({"names": ["other"], "count": 3, "sum": [1.0]})
    assert second.count == 0


def test_waiting_leaves_the_newest_steps_alone():
    class Vector:
        def __init__(self):
            self.waited = False

        def block_until_ready(self):
            self.waited = True

    window, given = Window(("a",)), [Vector() for _ in range(4)]
    for vector in given:
        window.add(vector)
        window.wait(behind=2)
    assert [v.waited for v in given] == [True, True, False, False]


def test_rows_after_the_restored_step_come_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (2, 4, 6):
        writer.write(step, {"loss": step / 2})
    writer.close()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    writer = MetricsWriter(tmp_path, after=4, tensorboard=False)
    writer.write(6, {"loss": float("nan")})
    writer.close()
    assert [row["step"] for row in read_rows(path)] == [2, 4, 6]
    assert read_rows(path)[-1]["loss"] is None
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_row_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"loss": 0.5})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    writer.close()


def decode_png(data):
    """Independent reader of what `encode_png` writes: one IDAT chunk, no filters."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    channels = {0: 1, 2: 3}[colour]
    at = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[at - 4 : at])
    lines = np.frombuffer(zlib.decompress(data[at + 4 : at + 4 + length]), np.uint8)
    lines = lines.reshape(height, 1 + width * channels)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    np.testing.assert_array_equal(decode_png(encode_png(image)), image)


def test_grid_places_and_scales():
    images = np.stack([np.full((2, 3, 1), v, np.float32) for v in (-1, 0, 1, 5, -7)])
    grid = image_grid(images)
    assert grid.shape == (5, 11, 1)
    assert [grid[0, 0, 0], grid[0, 4, 0], grid[0, 8, 0]] == [0, 128, 255]
    assert [grid[3, 0, 0], grid[3, 4, 0], grid[3, 8, 0]] == [255, 0, 0]
    assert not grid[2].any() and not grid[:, 3].any()


@pytest.mark.parametrize(
    "images", [np.zeros((2, 3, 4)), np.zeros((1, 2, 2, 2)), np.zeros((1, 2, 2, 1), np.int32)]
)
def test_grid_refuses_other_things(images):
    with pytest.raises(ValueError, match="images must be"):
        image_grid(images)


def test_samples_of_every_kind(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write_samples(7, jnp.zeros((2, 4, 4, 1)))
    writer.write_samples(7, {"texts": ["one", "two"], "faces": np.zeros((1, 2, 2, 3), np.uint8)})
    writer.close()
    folder = tmp_path / "samples"
    assert {p.name for p in folder.iterdir()} == {
        "samples_00000007.png",
        "texts_00000007.txt",
        "faces_00000007.png",
    }
    assert (folder / "texts_00000007.txt").read_text() == "one\ntwo\n"
    grid = decode_png((folder / "samples_00000007.png").read_bytes())
    assert grid.shape == (4, 9, 1) and grid[0, 0, 0] == 128


def test_tensorboard_reads_what_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 10.0 * step})
    writer.write_samples(3, np.zeros((1, 4, 4, 1), np.uint8))
    writer.close()
    resumed = MetricsWriter(tmp_path, after=2)
    resumed.write(3, {"loss": 31.0})
    resumed.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 10.0), (2, 20.0), (3, 31.0)]
    assert "tensorflow" not in sys.modules


def test_without_tensorboard_rows_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "tensorboard").exists()
