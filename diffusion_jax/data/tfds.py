"""TensorFlow Datasets by name, read without TensorFlow.

A set is prepared once as array_record files (`python -m diffusion_jax.data.prepare`, which needs
TensorFlow); reading needs `tensorflow-datasets`, `array_record` and Pillow, imported on first use.
Whether a set is prepared is looked up here, before TFDS is asked: nothing is ever downloaded.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data import images
from diffusion_jax.data.source import DataSpec, Element, RowCache, Source
from diffusion_jax.registry import closest, register

_NAME = re.compile(
    r"(?P<name>[A-Za-z]\w*)(?:/(?P<config>[A-Za-z0-9][\w.+-]*))?(?::(?P<version>\d+\.\d+\.\d+))?"
)
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class ParsedName(NamedTuple):
    """`name[/config][:version]` in parts."""

    name: str
    config: str | None
    version: str | None

    @property
    def label(self) -> str:
        """The parts as one file name."""
        return "_".join(part for part in self if part)


def parse_name(name: str) -> ParsedName:
    """Splits a TFDS name. Raises ValueError when it is malformed."""
    match = _NAME.fullmatch(name)
    if not match:
        raise ValueError(f"TFDS name {name!r} must look like name[/config][:1.2.3]")
    return ParsedName(**match.groupdict())


def default_data_dir() -> pathlib.Path:
    """`$TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def find_prepared(name: str, data_dir: str | pathlib.Path | None = None) -> pathlib.Path | None:
    """The folder of a prepared set in any format, newest version first; None when there is none.

    Raises:
      ValueError: the name has no config, and several configs are prepared.
    """
    parsed = parse_name(name)
    root = default_data_dir() if data_dir is None else pathlib.Path(data_dir).expanduser()
    home = root / parsed.name
    if parsed.config:
        return _newest(home / parsed.config, parsed.version)
    plain = _newest(home, parsed.version)
    if plain or not home.is_dir():
        return plain
    configs = {p.name: _newest(p, parsed.version) for p in sorted(home.iterdir()) if p.is_dir()}
    configs = {config: folder for config, folder in configs.items() if folder}
    if len(configs) > 1:
        raise ValueError(
            f"data set {name!r} is prepared with several configs; name one:"
            f" {', '.join(f'{parsed.name}/{config}' for config in configs)}"
        )
    return next(iter(configs.values()), None)


def _newest(home: pathlib.Path, version: str | None) -> pathlib.Path | None:
    if not home.is_dir():
        return None
    found = [
        path
        for path in home.iterdir()
        if _VERSION.fullmatch(path.name)
        and version in (None, path.name)
        and (path / "dataset_info.json").is_file()
    ]
    return max(found, key=lambda path: [int(n) for n in path.name.split(".")], default=None)


def read_info(folder: pathlib.Path) -> dict[str, Any]:
    """The parsed `dataset_info.json` of a prepared folder. Raises ValueError when it is broken."""
    path = folder / "dataset_info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not readable ({error})") from error
    if not isinstance(info, dict):
        raise ValueError(f"{str(path)!r} is not the description of a data set")
    return info


def prepared_folder(name: str, data_dir: str | pathlib.Path | None = None) -> pathlib.Path:
    """The folder of a set that is ready to be read without TensorFlow.

    Raises:
      ValueError: the set is not prepared, or in another format; the message holds the command.
    """
    root = default_data_dir() if data_dir is None else pathlib.Path(data_dir).expanduser()
    command = f"python -m diffusion_jax.data.prepare --name={name} --data_dir="
    folder = find_prepared(name, root)
    if folder is None:
        raise ValueError(
            f"data set {name!r} is not prepared in {str(root)!r}; prepare it once: {command}{root}"
        )
    file_format = read_info(folder).get("fileFormat", "tfrecord")
    if file_format != "array_record":
        raise ValueError(
            f"data set {name!r} in {str(folder)!r} is stored as {file_format}, which cannot be read"
            f" without TensorFlow; prepare it in another folder: {command}DIR"
        )
    return folder


class TFDSImages(Source):
    """Images and labels of a prepared set; made by `tfds`."""

    def __init__(
        self, records, spec, size, resize, image_key, label_key, name, cache_bytes
    ) -> None:
        self.spec = spec
        self._records = records
        self._size, self._resize = size, resize
        self._image_key, self._label_key = image_key, label_key
        self._name = name
        held = {"image": (spec.shape, np.uint8)}
        if "label" in spec.elements:
            held["label"] = ((), np.int32)
        self._cache = RowCache(len(records), held, cache_bytes)

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        records = self._records.__getitems__(rows.tolist())
        read = {
            "image": np.stack(
                [self._decode(record, row) for record, row in zip(records, rows, strict=True)]
            )
        }
        if "label" in self.spec.elements:
            read["label"] = np.array([record[self._label_key] for record in records], np.int32)
        return read

    def _decode(self, record: dict[str, Any], row: int) -> np.ndarray:
        name = f"{self._name}, record {row}"
        pixels = images.decode(
            record[self._image_key], name, self._size, self.spec.shape[-1], self._resize
        )
        if pixels.shape != self.spec.shape:
            raise ValueError(f"{name} has shape {pixels.shape}, expected {self.spec.shape}")
        return pixels

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if not len(rows):
            return {k: np.zeros((0, *e.shape), e.dtype) for k, e in self.spec.elements.items()}
        taken = self._cache.take(rows, self._read)
        return taken | {"image": images.to_float(taken["image"])}


@register("data", "tfds", kinds=("image",))
def tfds(
    dataset: str,
    *,
    data_dir: str | pathlib.Path | None = None,
    split: str = "train",
    size: int | Sequence[int] | None = None,
    resize: str = "crop",
    image_key: str = "image",
    label_key: str | None = "label",
    splits: Mapping[str, str] | None = None,
    cache_bytes: int = 2**30,
) -> TFDSImages:
    """A prepared image set of TensorFlow Datasets.

    Args:
      dataset: `name[/config][:version]`, such as "mnist", "fashion_mnist", "cifar10".
      data_dir: where prepared sets live; `$TFDS_DATA_DIR` or `~/tensorflow_datasets` unless given.
      split: a split of the set, or a slice in the notation of TFDS, such as "train[:90%]".
      size: height = width, or (height, width); None keeps the set's own size, which must be fixed.
      resize: "crop" or "stretch", see `images.decode`.
      image_key: the feature that becomes "image".
      label_key: the feature that becomes "label"; None, or a name the set lacks, gives no labels.
      splits: other names for splits, for a set without a split of the name that is asked for: with
        {"test": "validation"}, `split="test"` reads "validation".
      cache_bytes: decoded pixels stay in memory when all together need no more than this.

    Returns:
      A source of "image" float32 [H, W, C] in [-1, 1], and "label" int32.

    Raises:
      ValueError: a set that is not prepared (with the command that prepares it), an unknown split or
        feature, images without a fixed size.
      ImportError: a package that reading needs is missing.
    """
    pair_size = images.parse_size(size)
    if resize not in images.RESIZES:
        raise ValueError(f"unknown resize {resize!r}; valid: {', '.join(images.RESIZES)}")
    folder = prepared_folder(dataset, data_dir)
    split = (splits or {}).get(split, split)
    available = [part.get("name") for part in read_info(folder).get("splits", [])]
    base = re.match(r"[^\[\]+]*", split).group()
    if base not in available:
        raise ValueError(f"data set {dataset!r} has no split {base!r}{closest(base, available)}")

    tensorflow_datasets = import_tfds()
    images.pillow()
    builder = tensorflow_datasets.builder_from_directory(str(folder))
    features = dict(builder.info.features.items())
    if image_key not in features:
        raise ValueError(
            f"data set {dataset!r} has no feature {image_key!r}{closest(image_key, features)}"
        )
    feature = features[image_key]
    if not isinstance(feature, tensorflow_datasets.features.Image) or feature.np_dtype != np.uint8:
        raise ValueError(f"feature {image_key!r} of {dataset!r} is not an 8-bit image: {feature}")
    channels = images.check_channels(feature.shape[-1])
    shape = (*(pair_size or feature.shape[:2]), channels)
    if None in shape:
        raise ValueError(f"the images of {dataset!r} differ in size; give size=")

    num_classes = class_names = None
    elements = {"image": Element(shape, "float32")}
    if label_key in features:
        label = features[label_key]
        if not isinstance(label, tensorflow_datasets.features.ClassLabel):
            raise ValueError(f"feature {label_key!r} of {dataset!r} is not a class label: {label}")
        num_classes, class_names = label.num_classes, tuple(label.names)
        elements["label"] = Element((), "int32")
    try:
        records = builder.as_data_source(
            split=split,
            # The bytes are decoded by `images.decode`: with its limits, and not by OpenCV where that
            # happens to be installed (the two differ in the last bits of JPEG files).
            decoders={image_key: tensorflow_datasets.decode.SkipDecoding()},
        )
        count = len(records)
    except (ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"split {split!r} of data set {dataset!r} cannot be read: {reason}"
        ) from error
    if not count:
        raise ValueError(f"split {split!r} of data set {dataset!r} is empty")
    spec = DataSpec(
        kind="image",
        elements=elements,
        num_classes=num_classes,
        class_names=class_names,
        show="image",
    )
    return TFDSImages(records, spec, pair_size, resize, image_key, label_key, dataset, cache_bytes)


def import_tfds():
    """The package `tensorflow_datasets`. Raises ImportError with the command that installs it."""
    try:
        import array_record  # noqa: F401
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            "reading TFDS sets needs: pip install tensorflow-datasets array_record pillow"
            f" (missing: {error.name})"
        ) from error
    return tensorflow_datasets
