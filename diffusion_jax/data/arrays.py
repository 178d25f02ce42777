"""Arrays: given in memory, or from an .npz file.

The names of the arrays say what they are: "image" [N, H, W, C] (uint8 0..255 or float in [-1, 1]),
"tokens" [N, L] (integers 0..V-1), "points" [N, ...] (floats); conditions are "label" [N] (integers),
"source" (the source end of a bridge, like "image"), "mask" [N, H, W, 1] or [N, H, W] (0 known, 1 unknown,
of an image) and any further numeric array.
"""

import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion_jax.data import holes
from diffusion_jax.data.source import (
    KINDS,
    ArraySource,
    DataSpec,
    Element,
    Source,
    Subset,
    check_fraction,
    check_split,
    split_rows,
)
from diffusion_jax.registry import register

MAX_BYTES = 16 * 2**30


def load_npz(path: str | pathlib.Path, max_bytes: int = MAX_BYTES) -> dict[str, np.ndarray]:
    """Reads an .npz file of a stranger: nothing is unpickled and sizes are checked beforehand.

    Args:
      path: the file.
      max_bytes: limit on the sizes that the file states for its arrays, together.

    Returns:
      name -> array.

    Raises:
      ValueError: no such file, not an .npz file, arrays of Python objects, sizes that disagree with
        the file or exceed the limit.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is not a file")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_headers(archive, path, max_bytes)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, OSError, EOFError, zipfile.zlib.error) as error:
        raise ValueError(f"{str(path)!r} is not a readable .npz file ({error})") from error


def _check_headers(archive: zipfile.ZipFile, path: pathlib.Path, max_bytes: int) -> None:
    """numpy allocates what a header claims, so the claims are compared with the file first."""
    total = 0
    for member in archive.infolist():
        if not member.filename.endswith(".npy"):
            raise ValueError(f"{str(path)!r} holds {member.filename!r}, which is not an array")
        with archive.open(member) as file:
            try:
                version = np.lib.format.read_magic(file)
                header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version](file)
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f"{str(path)!r}: {member.filename!r} is not a plain array ({error})"
                ) from error
        shape, _, dtype = header
        if dtype.hasobject:
            raise ValueError(
                f"{str(path)!r}: {member.filename!r} holds Python objects; only numbers are read"
            )
        size = int(np.prod([int(side) for side in shape], dtype=object)) * dtype.itemsize
        total += size
        if size > member.file_size or any(side < 0 for side in shape):
            raise ValueError(f"{str(path)!r}: {member.filename!r} is shorter than its header says")
    if total > max_bytes:
        raise ValueError(f"{str(path)!r} holds {total} bytes; the limit is {max_bytes}")


@register("data", "arrays", kinds=KINDS)
def arrays(
    arrays: Mapping[str, Any] | None = None,
    *,
    path: str | pathlib.Path | None = None,
    split: str = "all",
    test_fraction: float = 0.1,
    num_classes: int | None = None,
    vocab_size: int | None = None,
    bounded: bool = True,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """A source of in-memory arrays.

    Args:
      arrays: name -> array [N, ...], with one of "image", "tokens", "points"; see the module.
      path: an .npz file with such arrays, instead of `arrays`. Names with the prefix of a split
        ("train_image", "test_image") are an official split; then `test_fraction` plays no role.
      split: "train", "test" or "all".
      test_fraction: share of a set without an official split that "test" takes (deterministic,
        stratified by label).
      num_classes: inferred as largest label + 1 unless given.
      vocab_size: inferred as largest token + 1 unless given.
      bounded: refuse floating-point images outside [-1, 1]; False allows them (latents).
      max_bytes: see `load_npz`.

    Raises:
      ValueError: neither or both of `arrays` and `path`; names, shapes, dtypes or values that do
        not fit; labels or tokens out of range; an unknown split; an unreadable file.
    """
    check_split(split)
    check_fraction(test_fraction)
    if (arrays is None) == (path is None):
        raise ValueError("give either arrays={...} or path='file.npz'")
    given = load_npz(path, max_bytes) if arrays is None else dict(arrays)
    given = {str(name): np.asarray(values) for name, values in given.items()}
    parts = {part: _with_prefix(given, part) for part in ("train", "test")}
    official = any(parts.values())
    if official:
        if split not in ("train", "test") or not parts[split]:
            available = [part for part, values in parts.items() if values]
            raise ValueError(f"split={split!r} is not in the file; it has: {', '.join(available)}")
        others = [name for name in given if not name.startswith(("train_", "test_"))]
        if others:
            raise ValueError(
                f"the array {others[0]!r} is in neither split; name it train_... or test_..."
            )
        given = parts[split]
        everything = [part for part in parts.values() if part]
    else:
        everything = [given]
    # Sizes come from all parts, so that the train and the test source describe one model.
    if num_classes is None and "label" in given:
        num_classes = max(_largest(part.get("label"), "label") for part in everything) + 1
    if vocab_size is None and "tokens" in given:
        vocab_size = max(_largest(part.get("tokens"), "tokens") for part in everything) + 1
    source = _checked(given, num_classes, vocab_size, bounded)
    if official or split == "all":
        return source
    rows = split_rows(len(source), split, round(test_fraction * len(source)), given.get("label"))
    return Subset(source, rows)


def _with_prefix(given: Mapping[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    prefix = part + "_"
    return {name.removeprefix(prefix): v for name, v in given.items() if name.startswith(prefix)}


def _largest(values: np.ndarray | None, name: str) -> int:
    if values is None or not values.size:
        return 0
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name!r} must be integers, got dtype {values.dtype}")
    return int(values.max())


def _checked(
    given: dict[str, np.ndarray], num_classes: int | None, vocab_size: int | None, bounded: bool
) -> Source:
    found = [kind for kind in KINDS if kind in given]
    if len(found) != 1:
        raise ValueError(
            f"arrays must hold exactly one of {', '.join(KINDS)}; got {', '.join(sorted(given))}"
        )
    kind = found[0]
    lengths = {name: values.shape[0] if values.ndim else 0 for name, values in given.items()}
    if len(set(lengths.values())) != 1 or not lengths[kind]:
        raise ValueError(f"arrays must share one positive length, got {lengths}")
    stored = {}
    for name, values in given.items():
        if name == "image" or (name == "source" and kind == "image"):
            stored[name] = _images(values, name, bounded)
        elif name == "mask" and kind == "image":
            stored[name] = _masks(values, given["image"])
        elif name == "tokens":
            stored[name] = _integers(values, name, 2, vocab_size, "vocab_size")
        elif name == "label":
            stored[name] = _integers(values, name, 1, num_classes, "num_classes")
        else:
            stored[name] = _numbers(values, name)
    elements = {
        name: Element(
            values.shape[1:],
            "float32"
            if name in ("image", "source") and values.dtype == np.uint8
            else str(values.dtype),
        )
        for name, values in stored.items()
    }
    spec = DataSpec(
        kind=kind,
        elements=elements,
        num_classes=num_classes if "label" in given else None,
        vocab_size=vocab_size if kind == "tokens" else None,
        show="image" if kind == "image" and stored["image"].shape[-1] in (1, 3, 4) else None,
    )
    return ArraySource(stored, spec)


def _images(values: np.ndarray, name: str, bounded: bool) -> np.ndarray:
    if values.ndim != 4:
        raise ValueError(f"{name!r} must have shape [N, H, W, C], got {values.shape}")
    if values.dtype == np.uint8:
        return values
    values = _numbers(values, name)
    largest = float(np.abs(values).max(initial=0))
    if bounded and largest > 1.001:
        raise ValueError(
            f"{name!r} holds the value {largest:g}, outside [-1, 1]; give uint8 pixels, or pass"
            " bounded=False for images of another range"
        )
    return values


def _masks(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    values = holes.check_mask(values, "'mask'")
    values = values[..., None] if values.ndim == 3 else values
    expected = (*image.shape[:3], 1)
    if values.shape != expected:
        raise ValueError(f"'mask' must have shape {expected} or {expected[:3]}, got {values.shape}")
    return values


def _numbers(values: np.ndarray, name: str) -> np.ndarray:
    if np.issubdtype(values.dtype, np.floating):
        # Half precision has no bits to spare for data, and numpy's float64 is no dtype of jax.
        values = values.astype(np.float32, copy=False)
        if not np.isfinite(values).all():
            raise ValueError(f"{name!r} holds values that are not finite")
        return values
    if np.issubdtype(values.dtype, np.integer) or values.dtype == np.bool_:
        if name in KINDS or name == "source":
            raise ValueError(f"{name!r} must be floating point, got dtype {values.dtype}")
        return values if values.dtype == np.bool_ else _integers(values, name, None, None, "")
    raise ValueError(f"{name!r} must be numbers, got dtype {values.dtype}")


def _integers(
    values: np.ndarray, name: str, rank: int | None, below: int | None, option: str
) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.integer) or (rank is not None and values.ndim != rank):
        expected = {1: "[N]", 2: "[N, L]"}.get(rank, "any")
        raise ValueError(
            f"{name!r} must be integers of shape {expected}, got {values.dtype} {values.shape}"
        )
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    if below is not None and (low < 0 or high >= below):
        raise ValueError(
            f"{name!r} holds {low if low < 0 else high}, outside 0..{below - 1} ({option}={below})"
        )
    if low < -(2**31) or high >= 2**31:
        raise ValueError(f"{name!r} does not fit into int32: {low}..{high}")
    return values.astype(np.int32, copy=False)
