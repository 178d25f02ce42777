"""Folders of image files: `root/class/*.png` (labelled) or `root/*.png` (unlabelled).

Files are taken in sorted order and decoded when they are needed; decoded pixels stay in memory when
the whole set is small enough. The files may come from strangers: see `images.py` for what is decoded,
and a link that leads out of the folder is refused.
"""

import fnmatch
import pathlib
from collections.abc import Sequence

import numpy as np

from diffusion_jax.data import images
from diffusion_jax.data.source import (
    DataSpec,
    Element,
    RowCache,
    Source,
    check_fraction,
    check_split,
    split_rows,
)
from diffusion_jax.registry import register

LAYOUTS = ("single", "source_left", "source_right")

_OFFICIAL = ("train", "test")


class ImageFolder(Source):
    """Decodes files on demand; made by `image_folder`."""

    def __init__(
        self, files, labels, spec, size, resize, background, layout, cache_bytes: int
    ) -> None:
        self.spec = spec
        self.files = tuple(files)
        self._labels = labels
        self._size, self._resize, self._background = size, resize, background
        self._layout = layout
        height, width, self._channels = spec.shape
        self._file_size = (height, width if layout == "single" else 2 * width)
        shape = (*self._file_size, self._channels)
        self._cache = RowCache(len(files), {"pixels": (shape, np.uint8)}, cache_bytes)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {"pixels": np.stack([self._decode(self.files[row]) for row in rows])}

    def _decode(self, path: pathlib.Path) -> np.ndarray:
        size = None if self._size is None else self._file_size
        pixels = images.decode(
            images.read(path), repr(str(path)), size, self._channels, self._resize, self._background
        )
        if pixels.shape[:2] != self._file_size:
            raise ValueError(
                f"{str(path)!r} has {pixels.shape[0]} x {pixels.shape[1]} pixels, the first file"
                f" {self._file_size[0]} x {self._file_size[1]}; give size= to bring all to one size"
            )
        return pixels

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if not len(rows):
            return {k: np.zeros((0, *e.shape), e.dtype) for k, e in self.spec.elements.items()}
        pixels = images.to_float(self._cache.take(rows, self._read)["pixels"])
        taken = {"image": pixels}
        if self._layout != "single":
            left, right = np.split(pixels, 2, axis=2)
            pair = (right, left) if self._layout == "source_left" else (left, right)
            taken = {
                name: np.ascontiguousarray(half) for name, half in zip(("image", "source"), pair)
            }
        if self._labels is not None:
            taken["label"] = self._labels[rows]
        return taken


@register("data", "image_folder", kinds=("image",))
def image_folder(
    root: str | pathlib.Path,
    *,
    split: str = "train",
    size: int | Sequence[int] | None = None,
    channels: int = 3,
    resize: str = "crop",
    background: int = 128,
    layout: str = "single",
    test_fraction: float = 0.1,
    ignore: Sequence[str] = (),
    verify: bool = False,
    cache_bytes: int = 2**30,
) -> ImageFolder:
    """A source of image files.

    Args:
      root: the folder. With subfolders `train` or `test` these are an official split, and each is a
        folder of its own; otherwise a part is cut off by `test_fraction`.
      split: "train", "test" or "all" ("all" only without an official split).
      size: height = width, or (height, width), of the examples; None: all files have one size.
      channels: 1, 3 or 4.
      resize: "crop" or "stretch", see `images.decode`.
      background: grey level under transparent pixels.
      layout: "single"; or "source_left" / "source_right" for files that hold a pair side by side,
        as in pix2pix sets such as edges2shoes (arXiv 1611.07004): the named half becomes "source",
        the other "image", each half of width `size`. Pairs in two folders: see `pair_folders`.
      test_fraction: share of a set without an official split that "test" takes (deterministic,
        stratified by class).
      ignore: patterns of file names to pass over, such as "*.txt". Hidden files always are.
      verify: decode every file now rather than when it is needed.
      cache_bytes: decoded pixels stay in memory when all together need no more than this.

    Returns:
      A source of "image" float32 [H, W, C] in [-1, 1], "source" for pairs, and "label" int32 when
      the folder has one subfolder a class, numbered in sorted order.

    Raises:
      ValueError: no such folder, no images, files of other kinds, mixed layouts, links that leave the
        folder, an unknown option; a corrupt or oversized file (when it is decoded).
      ImportError: Pillow is missing.
    """
    check_split(split)
    check_fraction(test_fraction)
    images.check_channels(channels)
    pair_size = images.parse_size(size)
    for name, value, valid in (("layout", layout, LAYOUTS), ("resize", resize, images.RESIZES)):
        if value not in valid:
            raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is not a folder")
    images.pillow()

    official = [part for part in _OFFICIAL if (root / part).is_dir()]
    if official:
        if split not in official:
            raise ValueError(
                f"split={split!r} is not in {str(root)!r}; it has: {', '.join(official)}"
            )
        # Labels number the classes of all parts: a class absent from one must not shift the others.
        classes = sorted({name for part in official for name in _classes(root / part)})
    else:
        classes = _classes(root)
    folder = root / split if official else root
    files, labels = _files(folder, root.resolve(), classes, tuple(ignore))
    if not official:
        rows = split_rows(len(files), split, round(test_fraction * len(files)), labels)
        files = [files[row] for row in rows]
        labels = None if labels is None else labels[rows]

    height, width = pair_size or _size_of(files[0], layout)
    element = Element((height, width, channels), "float32")
    elements = {"image": element}
    if layout != "single":
        elements["source"] = element
    if labels is not None:
        elements["label"] = Element((), "int32")
    spec = DataSpec(
        kind="image",
        elements=elements,
        num_classes=len(classes) or None,
        class_names=tuple(classes) or None,
        show="image",
    )
    source = ImageFolder(files, labels, spec, pair_size, resize, background, layout, cache_bytes)
    if verify:
        for row in range(len(source)):
            source.take([row])
    return source


def _classes(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _files(
    folder: pathlib.Path, home: pathlib.Path, classes: Sequence[str], ignore: tuple[str, ...]
) -> tuple[list[pathlib.Path], np.ndarray | None]:
    """The image files of a folder in sorted order, and their labels if it has class folders."""
    flat = images_in(folder, home, ignore)
    if not classes:
        if not flat:
            raise ValueError(f"{str(folder)!r} holds no images ({', '.join(images.SUFFIXES)})")
        return flat, None
    if flat:
        raise ValueError(
            f"{str(folder)!r} holds both images ({flat[0].name!r}, ...) and folders"
            f" ({classes[0]!r}, ...); use root/class/*.png or root/*.png"
        )
    files, labels = [], []
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        deeper = _classes(folder / name)
        if deeper:
            raise ValueError(
                f"{str(folder / name)!r} holds a folder, {deeper[0]!r}; expected images"
            )
        found = images_in(folder / name, home, ignore)
        files += found
        labels += [label] * len(found)
    if not files:
        raise ValueError(f"the folders of {str(folder)!r} hold no images")
    return files, np.array(labels, np.int32)


def images_in(
    folder: pathlib.Path, home: pathlib.Path, ignore: tuple[str, ...]
) -> list[pathlib.Path]:
    """The image files of one folder in sorted order; folders in it are passed over.

    Raises:
      ValueError: files of other kinds, or links that lead out of `home`.
    """
    if not folder.resolve().is_relative_to(home):
        raise ValueError(f"{str(folder)!r} is a link that leads out of {str(home)!r}")
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith("."):
            continue
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in ignore):
            continue
        if path.suffix.lower() not in images.SUFFIXES:
            raise ValueError(
                f"{str(path)!r} is no supported image ({', '.join(images.SUFFIXES)});"
                f" remove it, or pass ignore=['*{path.suffix}']"
            )
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(f"{str(path)!r} is a link that leads out of {str(home)!r}")
        if not path.is_file():
            raise ValueError(f"{str(path)!r} is not a regular file")
        found.append(path)
    return found


def _size_of(path: pathlib.Path, layout: str) -> tuple[int, int]:
    pixels = images.decode(images.read(path), repr(str(path)))
    height, width = pixels.shape[:2]
    if layout != "single" and width % 2:
        raise ValueError(f"{str(path)!r} holds a pair, but its width {width} is odd")
    return height, width if layout == "single" else width // 2
