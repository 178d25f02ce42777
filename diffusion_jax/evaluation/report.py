"""Numbers to files: strict JSON written atomically, Markdown tables."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.evaluation.files import write_atomically
from diffusion_jax.registry import check_choice


def _plain(value: Any, path: str, nonfinite: str) -> Any:
    """`value` with arrays and NumPy scalars as Python objects."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{path}: keys must be strings, got {key!r}")
        return {key: _plain(item, f"{path}.{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", nonfinite) for i, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        if nonfinite == "null":
            return None
        raise ValueError(f"{path} is {value}: JSON has no such number; pass nonfinite='null'")
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        # numpy calls bfloat16 and its relatives kind "V"; they widen to float32 without loss.
        array = array.astype(np.float32) if array.dtype.kind == "V" else array
        if array.dtype.kind in "biuf":
            return _plain(array.tolist(), path, nonfinite)
    raise ValueError(f"{path}: cannot write a {type(value).__name__} to JSON")


def write_json(path: str | os.PathLike, data: Any, *, nonfinite: str = "raise") -> Path:
    """Writes `data` as strict JSON (RFC 8259: no NaN, no Infinity), atomically.

    Args:
      path: the file; parent folders are made.
      data: nested mappings, sequences, numbers, strings, NumPy or JAX arrays.
      nonfinite: "raise" refuses NaN and infinity and names the place, "null" writes null.

    Raises:
      ValueError: a value that JSON cannot hold, a key that is no string, or an unknown `nonfinite`.
    """
    check_choice("nonfinite", nonfinite, ("raise", "null"))
    text = json.dumps(_plain(data, "$", nonfinite), indent=2, allow_nan=False, ensure_ascii=False)
    return write_atomically(path, (text + "\n").encode())


def read_json(path: str | os.PathLike) -> Any:
    """Reads strict JSON.

    Raises:
      ValueError: not JSON, or with the tokens NaN or Infinity, which JSON does not have.
    """

    def refuse(token: str):
        raise ValueError(f"{os.fspath(path)} holds {token}, which is not JSON")

    return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=refuse)


def format_number(value: Any, digits: int = 3) -> str:
    """A number for a table: `digits` significant digits, integers whole, None as a dash.

    Numbers below 1e-4 and from 1e6 up are written with an exponent; strings pass through.

    Raises:
      ValueError: digits < 1.
    """
    if digits < 1:
        raise ValueError(f"digits must be 1 or more, got {digits}")
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return str(int(value))
    number = float(value)
    if not math.isfinite(number):
        return str(number)
    if number == 0.0:
        return "0"
    rounded = float(f"{number:.{digits - 1}e}")
    exponent = math.floor(math.log10(abs(rounded)))
    if exponent < -4 or exponent >= 6:
        return f"{number:.{digits - 1}e}"
    return f"{rounded:.{max(digits - 1 - exponent, 0)}f}"


def markdown_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str] | Mapping[str, str],
    *,
    digits: int = 3,
) -> str:
    """A GitHub Markdown table, ending in a newline.

    Args:
      rows: one mapping per row; a missing key is shown as a dash.
      columns: keys in order, or a mapping from key to heading.
      digits: significant digits of floating-point values.

    Columns with numbers only are aligned to the right.

    Raises:
      ValueError: no columns, or a column that no row has.
    """
    headings = dict(columns) if isinstance(columns, Mapping) else {name: name for name in columns}
    if not headings:
        raise ValueError("a table needs at least one column")
    present = set().union(*rows)
    unknown = [name for name in headings if rows and name not in present]
    if unknown:
        raise ValueError(
            f"no row has the column {unknown[0]!r}; keys: {', '.join(sorted(present))}"
        )

    def cell(value: Any) -> str:
        return format_number(value, digits).replace("|", "\\|").replace("\n", " ")

    def numeric(name: str) -> bool:
        values = [row.get(name) for row in rows]
        return any(v is not None for v in values) and not any(isinstance(v, str) for v in values)

    lines = [
        [cell(heading) for heading in headings.values()],
        ["---:" if numeric(name) else "---" for name in headings],
        *[[cell(row.get(name)) for name in headings] for row in rows],
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
