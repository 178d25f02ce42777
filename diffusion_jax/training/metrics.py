"""Metrics and samples on disk: JSON lines always, TensorBoard events when its package is installed."""

import json
import math
import os
import pathlib
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FILE = "metrics.jsonl"


class Window:
    """Means of metrics over the steps between two rows, in float64, in the order of the steps.

    The metrics of a step arrive as one device vector, so that nothing is read back until a row is
    due. `to_json`/`from_json` carry a half-full window through a checkpoint: the rows of a resumed
    run are those of an uninterrupted one.

    Args:
      names: of the entries of a vector.
      last: names that are reported as they are at the last step, not as a mean.
      guard: name of an entry that is 0 in a good step; steps in which it is not are left out.

    Attributes:
      failed: the metrics of the first step that the guard left out, or None.
    """

    def __init__(self, names: Sequence[str], last: Sequence[str] = (), guard: str | None = None):
        self.names = tuple(names)
        self.failed: dict[str, float] | None = None
        self._last_names = frozenset(last)
        self._guard = None if guard is None else self.names.index(guard)
        self._pending: list[Any] = []
        self._reset()

    def _reset(self) -> None:
        self.count, self._sum, self._last = 0, np.zeros(len(self.names)), np.zeros(len(self.names))

    def _named(self, values: np.ndarray) -> dict[str, float]:
        return dict(zip(self.names, values.tolist(), strict=True))

    def add(self, vector: Any) -> None:
        """Takes the metrics of one step, [len(names)] on the device."""
        self._pending.append(vector)

    def wait(self, behind: int) -> None:
        """Blocks until all but the newest `behind` steps have run."""
        if len(self._pending) > behind:
            self._pending[-1 - behind].block_until_ready()

    def collect(self) -> None:
        """Reads back what is pending."""
        for vector in self._pending:
            vector.copy_to_host_async()
        for vector in self._pending:
            values = np.asarray(vector, np.float64)
            if self._guard is not None and values[self._guard]:
                self.failed = self.failed or self._named(values)
            else:
                self.count, self._sum, self._last = self.count + 1, self._sum + values, values
        self._pending.clear()

    def row(self) -> dict[str, float]:
        """The means since the last row; starts a new window."""
        self.collect()
        mean, newest = self._named(self._sum / max(self.count, 1)), self._named(self._last)
        self._reset()
        return mean | {name: newest[name] for name in self._last_names}

    def to_json(self) -> dict[str, Any]:
        """The state of the window as JSON data."""
        self.collect()
        return {"names": list(self.names), "count": self.count, "sum": self._sum.tolist()}

    def from_json(self, saved: Mapping[str, Any] | None) -> None:
        """Goes on where `to_json` was; a window of other metrics is dropped."""
        if saved and tuple(saved["names"]) == self.names:
            self.count, self._sum = saved["count"], np.array(saved["sum"])


def read_rows(path: str | pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line cut off by a kill is left out."""
    rows = []
    for line in pathlib.Path(path).read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Writes rows to `metrics.jsonl`, and to TensorBoard.

    Args:
      workdir: the run folder.
      after: the step that the run goes on from; rows of later steps, which will come again, are
        dropped.
      tensorboard: also write events, if the package can be imported.
    """

    def __init__(self, workdir: str | pathlib.Path, after: int = 0, tensorboard: bool = True):
        self.workdir = pathlib.Path(workdir)
        path = self.workdir / FILE
        if path.exists():
            kept = [row for row in read_rows(path) if row["step"] <= after]
            fresh = path.with_suffix(".tmp")
            fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(fresh, path)
        self._file = path.open("a")
        self._events = _Events.open(self.workdir / "tensorboard", after) if tensorboard else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a row and flushes it; values that are not finite become null."""
        row = {k: v if math.isfinite(v) else None for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        if self._events:
            self._events.scalars(step, values)

    def write_samples(self, step: int, samples: Any) -> None:
        """Writes samples to `samples/<name>_<step>.png` or `.txt`.

        Args:
          step: number of steps done.
          samples: images [N, H, W, C], C = 1 or 3, uint8 or floating in [-1, 1], a list of strings,
            or a dict of such things by name.

        Raises:
          ValueError: another shape or dtype.
        """
        folder = self.workdir / "samples"
        folder.mkdir(exist_ok=True)
        named = samples if isinstance(samples, Mapping) else {"samples": samples}
        for name, value in named.items():
            stem = folder / f"{name}_{step:08d}"
            if isinstance(value, list | tuple) and all(isinstance(text, str) for text in value):
                stem.with_suffix(".txt").write_text("\n".join(value) + "\n")
                continue
            grid = image_grid(value)
            png = encode_png(grid)
            stem.with_suffix(".png").write_bytes(png)
            if self._events:
                self._events.image(step, name, png, grid.shape)

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events:
            self._events.close()


def image_grid(images: Any, columns: int | None = None) -> np.ndarray:
    """Images side by side, one pixel apart.

    Args:
      images: [N, H, W, C], C = 1 or 3, uint8 or floating in [-1, 1].
      columns: default the rounded-up square root of N.

    Returns:
      uint8 [rows * (H + 1) - 1, columns * (W + 1) - 1, C].

    Raises:
      ValueError: another shape or dtype.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be [N, H, W, 1 or 3]; got shape {images.shape}")
    if images.dtype != np.uint8:
        if images.dtype.kind not in "fV":
            raise ValueError(f"images must be uint8 or floating; got {images.dtype}")
        scaled = np.nan_to_num(images.astype(np.float32) * 127.5 + 127.5)
        images = np.clip(np.round(scaled), 0, 255).astype(np.uint8)
    n, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    grid = np.zeros((rows * (height + 1) - 1, columns * (width + 1) - 1, channels), np.uint8)
    for k, image in enumerate(images):
        y, x = (k // columns) * (height + 1), (k % columns) * (width + 1)
        grid[y : y + height, x : x + width] = image
    return grid


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file of a uint8 image [H, W, 1 or 3]."""
    height, width, channels = image.shape
    lines = b"".join(b"\0" + np.ascontiguousarray(line).tobytes() for line in image)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


class _Events:
    """TensorBoard events by the record writer of its package, which needs no TensorFlow."""

    @classmethod
    def open(cls, folder: pathlib.Path, after: int) -> "_Events | None":
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            return None
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{time.time_ns()}.{os.getpid()}"
        events = cls()
        events._event, events._summary = event_pb2, summary_pb2
        events._writer = RecordWriter((folder / name).open("wb"))
        events._add(file_version="brain.Event:2")
        if after:  # hides what an earlier, killed process wrote about later steps
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            events._add(step=after + 1, session_log=start)
        return events

    def _add(self, **fields: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **fields)
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        value = self._summary.Summary.Value
        entries = [value(tag=k, simple_value=v) for k, v in values.items()]
        self._add(step=step, summary=self._summary.Summary(value=entries))

    def image(self, step: int, name: str, png: bytes, shape: tuple[int, ...]) -> None:
        picture = self._summary.Summary.Image(
            height=shape[0], width=shape[1], colorspace=shape[2], encoded_image_string=png
        )
        entry = self._summary.Summary.Value(tag=name, image=picture)
        self._add(step=step, summary=self._summary.Summary(value=[entry]))

    def close(self) -> None:
        self._writer.close()
