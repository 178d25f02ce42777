"""Pairs of image files in two folders: `root/image/*.png` and `root/source/*.png`, and masks if there are.

A file and its partners have one name, but for the suffix: `image/0001.jpg` and `source/0001.png` are a
pair. Pairs side by side in one file are `image_folder`'s; arrays are `arrays`'.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from diffusion_jax.data import holes, images
from diffusion_jax.data.image_folder import images_in
from diffusion_jax.data.source import (
    DataSpec,
    Element,
    RowCache,
    Source,
    check_fraction,
    check_split,
    split_rows,
)
from diffusion_jax.registry import check_choice, register

_OFFICIAL = ("train", "test")


class PairFolders(Source):
    """Decodes files on demand; made by `pair_folders`.

    Attributes:
      files: element -> paths, of one length and order.
    """

    def __init__(self, files, spec, size, resize, background, cache_bytes: int) -> None:
        self.spec, self.files = spec, files
        self._size, self._resize, self._background = size, resize, background
        held = {name: (spec.elements[name].shape, np.uint8) for name in files}
        self._cache = RowCache(len(files["image"]), held, cache_bytes)

    def __len__(self) -> int:
        return len(self.files["image"])

    def _decode(self, name: str, row: int) -> np.ndarray:
        path, shape = self.files[name][row], self.spec.elements[name].shape
        pixels = images.decode(
            images.read(path),
            repr(str(path)),
            self._size,
            shape[-1],
            self._resize,
            self._background,
            smooth=name != "mask",
        )
        if pixels.shape != shape:
            first = self.files["image"][0]
            raise ValueError(
                f"{str(path)!r} has {pixels.shape[0]} x {pixels.shape[1]} pixels,"
                f" {str(first)!r} {shape[0]} x {shape[1]}; give size= to bring all to one size"
            )
        return pixels

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        return {name: np.stack([self._decode(name, row) for row in rows]) for name in self.files}

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if not len(rows):
            return {k: np.zeros((0, *e.shape), e.dtype) for k, e in self.spec.elements.items()}
        pixels = self._cache.take(rows, self._read)
        taken = {name: images.to_float(pixels[name]) for name in ("image", "source")}
        if "mask" in pixels:
            names = [repr(str(self.files["mask"][row])) for row in rows]
            masks = zip(pixels["mask"], names)
            taken["mask"] = np.stack([holes.from_pixels(mask, name) for mask, name in masks])
        return taken


@register("data", "pair_folders", kinds=("image",))
def pair_folders(
    root: str | pathlib.Path,
    *,
    image: str = "image",
    source: str = "source",
    mask: str = "",
    split: str = "train",
    size: int | Sequence[int] | None = None,
    channels: int = 3,
    resize: str = "crop",
    background: int = 128,
    test_fraction: float = 0.1,
    ignore: Sequence[str] = (),
    verify: bool = False,
    cache_bytes: int = 2**30,
) -> PairFolders:
    """Pairs for a bridge from two folders of image files.

    Args:
      root: the folder. With subfolders `train` or `test` these are an official split, and each holds the
        folders of the pairs; otherwise a part is cut off by `test_fraction`.
      image: name of the folder of targets, what the bridge ends at.
      source: name of the folder of sources, what it begins at.
      mask: name of a folder of masks for inpainting, black (known) and white (unknown); "" without.
      split: "train", "test" or "all" ("all" only without an official split).
      size: height = width, or (height, width), to which all files are brought; None: all have one size.
      channels: of images and sources: 1, 3 or 4.
      resize: "crop" or "stretch", see `images.decode`; masks take the nearest pixel.
      background: grey level under transparent pixels.
      test_fraction: share of a set without an official split that "test" takes (deterministic).
      ignore: patterns of file names to pass over, such as "*.txt". Hidden files always are.
      verify: decode every file now rather than when it is needed.
      cache_bytes: decoded pixels stay in memory when all together need no more than this.

    Returns:
      A source of "image" and "source" float32 [H, W, C] in [-1, 1], and with masks "mask" float32
      [H, W, 1] (1 = unknown).

    Raises:
      ValueError: no such folder, no images, a file without its partner, files of other kinds, links that
        leave the folder, an unknown option; a corrupt file, one of another size than the first, or a mask
        of other levels than 0 and 255 (when it is decoded).
      ImportError: Pillow is missing.
    """
    check_split(split)
    check_fraction(test_fraction)
    images.check_channels(channels)
    pair_size = images.parse_size(size)
    check_choice("resize", resize, images.RESIZES)
    folders = {"image": image, "source": source} | ({"mask": mask} if mask else {})
    if len(set(folders.values())) < len(folders) or not all(folders.values()):
        raise ValueError(f"the folders of a pair must have names of their own, got {folders}")
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"root={str(root)!r} is not a folder")
    images.pillow()
    official = [part for part in _OFFICIAL if (root / part).is_dir()]
    if official and split not in official:
        raise ValueError(f"split={split!r} is not in {str(root)!r}; it has: {', '.join(official)}")
    home = root / split if official else root
    files = _partners(home, root.resolve(), folders, tuple(ignore))
    if not official:
        count = len(files["image"])
        rows = split_rows(count, split, round(test_fraction * count))
        files = {name: [paths[row] for row in rows] for name, paths in files.items()}

    height, width = pair_size or _size_of(files["image"][0])
    element = Element((height, width, channels), "float32")
    elements = {"image": element, "source": element}
    if mask:
        elements["mask"] = Element((height, width, 1), "float32")
    spec = DataSpec(kind="image", elements=elements, show="image")
    made = PairFolders(files, spec, pair_size, resize, background, cache_bytes)
    if verify:
        for row in range(len(made)):
            made.take([row])
    return made


def _partners(
    home: pathlib.Path, root: pathlib.Path, folders: dict[str, str], ignore: tuple[str, ...]
) -> dict[str, list[pathlib.Path]]:
    """The files of each folder, in the order of their names."""
    found: dict[str, dict[str, pathlib.Path]] = {}
    for name, folder in folders.items():
        if not (home / folder).is_dir():
            there = sorted(p.name for p in home.iterdir() if p.is_dir())
            raise ValueError(
                f"{str(home)!r} has no folder {folder!r} for {name!r};"
                f" it has: {', '.join(there) or 'none'} (name yours with {name}=)"
            )
        found[name] = {}
        for path in images_in(home / folder, root, ignore):
            twin = found[name].setdefault(path.stem, path)
            if twin is not path:
                raise ValueError(f"{str(twin)!r} and {str(path)!r} have one name: which is meant?")
    every = sorted(set().union(*found.values()))
    if not every:
        raise ValueError(f"the folders of {str(home)!r} hold no images")
    for name, folder in folders.items():
        missing = [stem for stem in every if stem not in found[name]]
        if missing:
            has = next(paths[missing[0]] for paths in found.values() if missing[0] in paths)
            raise ValueError(
                f"{str(has)!r} has no partner of its name in {str(home / folder)!r}"
                f" ({len(missing)} of {len(every)} lack it)"
            )
    return {name: [paths[stem] for stem in every] for name, paths in found.items()}


def _size_of(path: pathlib.Path) -> tuple[int, int]:
    return images.decode(images.read(path), repr(str(path))).shape[:2]
