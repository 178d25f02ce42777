"""Reads the numbers in `tests/goldens`; `PROVENANCE.md` there says where each comes from."""

import functools
import pathlib

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "goldens"


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of one file, by name. Do not write into them.

    Raises:
      FileNotFoundError: no such file; the message lists those there are.
    """
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.npz")))
        raise FileNotFoundError(f"no golden file {name!r}; there are: {known}")
    with np.load(path, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored}
