"""Short sequences as rows of tokens: DNA, proteins, molecules as SMILES, or any other strings.

One sequence is one example of a fixed length: a longer one is cut, a shorter one is filled up with a
padding symbol, which is one more token, so that a model learns where sequences end. Labels may come from
a column. SMILES may be cut into atoms and bonds (Schwaller et al., arXiv 1711.04810) instead of characters;
nothing here judges whether a molecule exists.
"""

import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from diffusion_jax.data.arrays import load_npz
from diffusion_jax.data.codecs import Codec
from diffusion_jax.data.files import decode_utf8, read_bytes
from diffusion_jax.data.source import (
    ArraySource,
    Element,
    Source,
    check_fraction,
    check_split,
    split_rows,
)
from diffusion_jax.data.vocabulary import Vocabulary
from diffusion_jax.registry import check_choice, closest, register

# In the order of their tokens. Those of molecules are what ZINC's contain (jtnn's selection of it).
ALPHABETS = {
    "dna": "ACGT",
    "dna_n": "ACGTN",
    "rna": "ACGU",
    "protein": "ACDEFGHIKLMNPQRSTVWY",
    "smiles": "#()+-/1234567=@BCFHINOPS[\\]clnors",
}
PAD = " "
MAX_BYTES = 2 * 2**30

_UPPER = ("dna", "dna_n", "rna", "protein")  # FASTA files write repeats in lower case
_ATOMS = re.compile(r"\[[^\[\]]*\]|Br|Cl|%\d\d|[A-Za-z0-9]|[^\sA-Za-z0-9\[\]]")
_FASTA = (".fasta", ".fa", ".faa", ".fna", ".fas")
_SEPARATED = {".csv": ",", ".tsv": "\t"}


class _Part(NamedTuple):
    """Sequences of one file or split: as text, or already numbered as integers [N, L]."""

    texts: list[str] | None
    numbers: np.ndarray | None
    labels: list[str] | np.ndarray | None


@register("data", "sequences", kinds=("tokens",))
def sequences(
    path: str | pathlib.Path,
    length: int,
    *,
    split: str = "train",
    test_path: str | pathlib.Path = "",
    alphabet: str = "file",
    unit: str = "characters",
    column: str = "",
    label: str = "",
    pad: str = PAD,
    long: str = "cut",
    unknown: str = "error",
    test_fraction: float = 0.1,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """Sequences of a file, one a row.

    Args:
      path: by its suffix (".gz" may follow): FASTA (.fasta, .fa, .faa, .fna), a table with a header
        (.csv, .tsv), arrays (.npz), or else text with a sequence a line, up to the first space.
        Arrays are integers [N, L] numbered as `alphabet` is, or ASCII letters uint8 [sum of lengths]
        with "offsets" [N + 1]; with the prefix "train_" or "test_" they are an official split.
      length: L; sequences are cut or padded to it.
      split: "train", "test" or "all".
      test_path: a file of the same kind with the test split; "" cuts off `test_fraction`.
      alphabet: "dna", "dna_n", "rna", "protein", "smiles", "file" (the sorted symbols of the file),
        or the symbols themselves in the order of their tokens. Letters of DNA, RNA and proteins are
        made upper case.
      unit: "characters", or "atoms" for SMILES: bracket atoms, "Cl", "Br" and ring bonds are one token;
        needs alphabet="file".
      column: the column, or array, of sequences; "" the first column, or the only array.
      label: the column, or array of integers, of classes; "" without.
      pad: the padding symbol, one character outside the alphabet. It is the last token; where no
        sequence is shorter than L there is none.
      long: of sequences longer than L: "cut", "drop" or "error".
      unknown: of sequences with other symbols than the alphabet's: "error" or "drop".
      test_fraction: share of a set without an official split that "test" takes (deterministic).
      max_bytes: limit on the (unpacked) size of a file.

    Returns:
      A source of "tokens" int32 [L], and "label" int32.

    Raises:
      ValueError: a file that cannot be read, a column it lacks, symbols outside the alphabet, no
        sequence left, an option out of range.
    """
    check_split(split)
    check_fraction(test_fraction)
    check_choice("unit", unit, ("characters", "atoms"))
    check_choice("long", long, ("cut", "drop", "error"))
    check_choice("unknown", unknown, ("error", "drop"))
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length={length!r} must be a positive integer")
    if unit == "atoms" and alphabet != "file":
        raise ValueError(f"unit='atoms' needs alphabet='file', got {alphabet!r}")
    if len(pad) != 1:
        raise ValueError(f"pad={pad!r} must be a single character")
    if test_path:
        paths = {"train": path, "test": test_path}
        parts = {n: _read(pathlib.Path(p), "", column, label, max_bytes) for n, p in paths.items()}
    else:
        parts = _read_parts(pathlib.Path(path), column, label, max_bytes)
    # The vocabulary and the classes are those of all parts: they describe one model.
    symbols, parts = _numbered(parts, alphabet, unit, unknown, str(path))
    if pad in symbols:
        raise ValueError(f"pad={pad!r} is a symbol of the alphabet: name another")
    names = _class_names(parts)
    rows = {name: _rows(part, length, len(symbols), names, long) for name, part in parts.items()}
    padded = any((tokens == len(symbols)).any() for tokens, _ in rows.values())
    if official := "" not in rows:
        if split != "all" and split not in rows:
            raise ValueError(f"split={split!r} is not in {str(path)!r}; it has: {', '.join(rows)}")
        chosen = [rows[name] for name in rows if split in (name, "all")]
    else:
        chosen = [rows[""]]
    tokens = np.concatenate([tokens for tokens, _ in chosen])
    labels = None if names is None else np.concatenate([labels for _, labels in chosen])
    if not len(tokens):
        raise ValueError(f"{str(path)!r} holds no sequences (of length {length}, {long=})")
    if not official and split != "all":
        kept = split_rows(len(tokens), split, round(test_fraction * len(tokens)), labels)
        tokens, labels = tokens[kept], None if labels is None else labels[kept]
    codec = Codec(symbols=(*symbols, *([pad] if padded else [])))
    arrays = {"tokens": tokens}
    elements = {}
    if names is not None:
        arrays["label"], elements["label"] = labels, Element((), "int32")
    spec = codec.spec(length, **elements)
    if names is not None:
        spec = dataclasses.replace(spec, num_classes=len(names), class_names=names)
    return ArraySource(arrays, spec)


def _suffix(path: pathlib.Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _read_parts(path: pathlib.Path, column: str, label: str, max_bytes: int) -> dict[str, _Part]:
    """The parts of one file: {"": everything}, or those of an official split."""
    if _suffix(path) != ".npz":
        return {"": _read(path, "", column, label, max_bytes)}
    arrays = load_npz(path, max_bytes)
    found = [p for p in ("train", "test") if any(n == p or n.startswith(f"{p}_") for n in arrays)]
    return {p: _of_arrays(arrays, p, column, label, path) for p in found or [""]}


def _read(path: pathlib.Path, part: str, column: str, label: str, max_bytes: int) -> _Part:
    suffix = _suffix(path)
    if suffix == ".npz":
        return _of_arrays(load_npz(path, max_bytes), part, column, label, path)
    text = decode_utf8(read_bytes(path, max_bytes), path)
    if suffix in _SEPARATED:
        return _of_table(text, _SEPARATED[suffix], column, label, path)
    if column or label:
        raise ValueError(f"{str(path)!r} has no columns: column and label need .csv, .tsv or .npz")
    lines = text.splitlines()
    if suffix in _FASTA:
        return _Part(_of_fasta(lines, path), None, None)
    return _Part([line.split()[0] for line in lines if line.strip()], None, None)


def _of_fasta(lines: list[str], path: pathlib.Path) -> list[str]:
    found: list[list[str]] = []
    for number, line in enumerate(lines, 1):
        if line.startswith(">"):
            found.append([])
        elif line.strip() and not line.startswith(";"):
            if not found:
                raise ValueError(
                    f"{str(path)!r}, line {number}: FASTA begins with '>', not {line[:40]!r}"
                )
            found[-1].append("".join(line.split()))
    return ["".join(pieces).removesuffix("*") for pieces in found if pieces]


def _of_table(text: str, separator: str, column: str, label: str, path: pathlib.Path) -> _Part:
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=separator, strict=True))
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is not a table: {error}") from error
    header = rows[0] if rows else []
    for name in (column, label):
        if name and name not in header:
            raise ValueError(f"{str(path)!r} has no column {name!r}{closest(name, header)}")
    place = header.index(column) if column else 0
    body = [row for row in rows[1:] if row]
    wrong = next((i for i, row in enumerate(body) if len(row) != len(header)), None)
    if wrong is not None:
        raise ValueError(
            f"{str(path)!r}, row {wrong + 1}: {len(body[wrong])} fields, the header has {len(header)}"
        )
    labels = [row[header.index(label)] for row in body] if label else None
    return _Part([row[place].strip() for row in body], None, labels)


def _of_arrays(arrays, part: str, column: str, label: str, path: pathlib.Path) -> _Part:
    def get(name: str, required: bool = True) -> np.ndarray | None:
        joined = "_".join(piece for piece in (part, name) if piece)
        if joined not in arrays and required:
            raise ValueError(f"{str(path)!r} has no array {joined!r}{closest(joined, arrays)}")
        return arrays.get(joined)

    if not column and part not in arrays:
        names = [n.removeprefix(f"{part}_") for n in arrays if n.startswith(part)]
        names = [n for n in names if n not in ("offsets", label)]
        if len(names) != 1:
            raise ValueError(
                f"{str(path)!r} holds {', '.join(sorted(arrays))}: name one with column="
            )
        column = names[0]
    values, labels = get(column), get(label) if label else None
    offsets = get("offsets", required=False)
    if not np.issubdtype(values.dtype, np.integer) or values.ndim not in (1, 2):
        raise ValueError(
            f"{str(path)!r}: sequences must be integers [N, L], or letters with offsets,"
            f" got {values.dtype} {values.shape}"
        )
    if labels is not None and not (np.issubdtype(labels.dtype, np.integer) and labels.ndim == 1):
        raise ValueError(f"{str(path)!r}: {label!r} must be integers [N], got {labels.dtype}")
    if values.ndim == 2:
        count, found = len(values), _Part(None, values, labels)
    else:
        texts = _ragged(values, offsets, path)
        count, found = len(texts), _Part(texts, None, labels)
    if labels is not None and len(labels) != count:
        raise ValueError(f"{str(path)!r}: {len(labels)} labels for {count} sequences")
    return found


def _ragged(letters: np.ndarray, offsets: np.ndarray | None, path: pathlib.Path) -> list[str]:
    if letters.dtype != np.uint8 or offsets is None:
        raise ValueError(f"{str(path)!r}: letters must be uint8 and have offsets")
    if (
        offsets.ndim != 1
        or not np.issubdtype(offsets.dtype, np.integer)
        or len(offsets) < 1
        or offsets[0] != 0
        or offsets[-1] != len(letters)
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"{str(path)!r}: offsets must rise from 0 to {len(letters)}")
    whole = letters.tobytes().decode("latin-1")
    return [whole[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist())]


def _numbered(
    parts: dict[str, _Part], alphabet: str, unit: str, unknown: str, path: str
) -> tuple[tuple[str, ...], dict[str, tuple[list[np.ndarray], list | None]]]:
    """The symbols, and every part's sequences as tokens beside their labels."""
    upper = alphabet in _UPPER
    split = _ATOMS.findall if unit == "atoms" else list
    cut = {
        name: None if part.texts is None else [split(t.upper() if upper else t) for t in part.texts]
        for name, part in parts.items()
    }
    for name, part in parts.items():
        if unit == "atoms" and part.texts is not None:
            for text, pieces in zip(part.texts, cut[name]):
                if "".join(pieces) != text:
                    raise ValueError(f"{path!r}: {text[:60]!r} is not SMILES: a bracket is open")
    if alphabet == "file":
        if any(part.texts is None for part in parts.values()):
            raise ValueError("sequences as numbers need an alphabet: its symbols, or a name of one")
        symbols = tuple(sorted({s for pieces in cut.values() for one in pieces for s in one}))
        if len(symbols) < 2:
            raise ValueError(f"{path!r} holds {len(symbols)} symbols: no sequences")
    else:
        symbols = Vocabulary(tuple(ALPHABETS.get(alphabet, alphabet))).symbols
    number = {symbol: token for token, symbol in enumerate(symbols)}
    out = {}
    for name, part in parts.items():
        if part.texts is None:
            sizes = np.full(len(part.numbers), part.numbers.shape[1])
            flat = part.numbers.ravel()
        else:
            sizes = np.array([len(one) for one in cut[name]], int)
            flat = np.array([number.get(s, -1) for one in cut[name] for s in one], np.int64)
        ends = np.cumsum(sizes)
        wrong = np.flatnonzero((flat < 0) | (flat >= len(symbols)))
        if len(wrong) and unknown == "error":
            row = int(np.searchsorted(ends, wrong[0], side="right"))
            place = int(wrong[0] - (ends[row] - sizes[row]))
            bad = int(part.numbers[row, place]) if part.texts is None else cut[name][row][place]
            raise ValueError(
                f"{path!r}, sequence {row}: {bad!r} at position {place} is none of the"
                f" {len(symbols)} symbols {''.join(symbols)!r} (unknown='drop' leaves it out)"
            )
        good = np.ones(len(sizes), bool)
        good[np.searchsorted(ends, wrong, side="right")] = False
        split_up = np.split(flat.astype(np.int32), ends[:-1]) if len(ends) else []
        kept = [split_up[row] for row in np.flatnonzero(good)]
        labels = part.labels
        out[name] = kept, None if labels is None else [labels[r] for r in np.flatnonzero(good)]
    return symbols, out


def _class_names(parts) -> tuple[str, ...] | None:
    """Names of the classes in the order of their numbers; None without labels."""
    every = [one for _, labels in parts.values() for one in labels or ()]
    if all(labels is None for _, labels in parts.values()):
        return None
    if every and not isinstance(every[0], str):
        if min(every) < 0:
            raise ValueError(f"labels must not be negative, got {min(every)}")
        return tuple(str(i) for i in range(int(max(every)) + 1))
    return tuple(sorted(set(every)))


def _rows(
    part: tuple[list[np.ndarray], list | None],
    length: int,
    pad: int,
    names: Sequence[str] | None,
    long: str,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens [N, L] filled up with `pad`, and labels [N]."""
    kept, labels = part
    sizes = np.array([len(tokens) for tokens in kept], int)
    if long == "error" and sizes.size and sizes.max() > length:
        raise ValueError(f"sequence {sizes.argmax()} has {sizes.max()} symbols, more than {length}")
    used = np.flatnonzero(sizes <= length) if long == "drop" else np.arange(len(kept))
    out = np.full((len(used), length), pad, np.min_scalar_type(pad))
    for row, at in zip(out, used):
        tokens = kept[at][:length]
        row[: len(tokens)] = tokens
    if names is None:
        return out, None
    number = {name: i for i, name in enumerate(names)}
    return out, np.array([number[str(labels[at])] for at in used], np.int32)
