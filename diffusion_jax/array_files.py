"""Named arrays and a little plain data in one .npz file, without pickle, written whole or not at all."""

import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def write_arrays(
    path: str | os.PathLike, kind: str, about: Mapping[str, Any], arrays: Mapping[str, Any]
) -> pathlib.Path:
    """Writes a file of a kind; readers find the old file or the new one, never a part.

    Args:
      path: the file; its folder is made.
      kind: what the file is, with a version; `read_arrays` asks for it.
      about: plain data, kept as JSON.
      arrays: name -> array.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with fresh.open("wb") as file:
        np.savez(
            file,
            format=np.array(kind),
            about=np.array(json.dumps(dict(about))),
            **{name: np.asarray(value) for name, value in arrays.items()},
        )
    os.replace(fresh, path)
    return path


def read_arrays(
    path: str | os.PathLike, kind: str, what: str, build: Callable[[dict, dict], Any]
) -> Any:
    """`build(about, arrays)` of a file that `write_arrays` wrote. Nothing in it is executed.

    Args:
      kind: as it was written.
      what: what the file should hold, for messages ("model statistics").
      build: may refuse what it is given in any way: the message then says that the file is damaged.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or one of another kind.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of {what}: {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"{broken} fails its checksum")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        if "format" not in arrays or str(arrays.pop("format")) != kind:
            raise ValueError("it is a file of another kind or version")
        return build(json.loads(str(arrays.pop("about"))), arrays)
    except MemoryError:
        raise
    except Exception as error:  # zip, zlib, header and JSON damage each raise their own kind
        raise ValueError(
            f"{path} is damaged or holds no {what}: {' '.join(str(error).split())}"
        ) from error
