"""Corpora as token files: numbered once, read through memory maps ever after.

A folder holds, for every split, "<split>.npy" (all tokens one after the other, uint8, uint16 or uint32)
and "<split>_ends.npy" (int64, where each document ends, its separator included), beside "meta.json" (what
numbered the tokens) and the tokenizer file where there is one. Nothing is unpickled, and files that do
not agree with one another are refused.
"""

import dataclasses
import itertools
import json
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from diffusion_jax.data.codecs import Codec
from diffusion_jax.data.tokenizer import FILE, load_tokenizer
from diffusion_jax.registry import closest

META = "meta.json"
FORMAT = 1
_BATCH = 1000  # documents that a tokenizer is handed at once


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents as tokens.

    Attributes:
      tokens: unsigned integers [n], document after document, each with its separator at its end.
      ends: int64 [documents].
      codec: what numbered them.
      separator: the token that ends a document.
    """

    tokens: np.ndarray
    ends: np.ndarray
    codec: Codec
    separator: int


def separator_of(codec: Codec, name: str = "") -> int:
    """The token of a separator by its name; "" takes a tokenizer's own, and else the line feed.

    Raises:
      ValueError: no such token.
    """
    if not name and codec.tokenizer is not None:
        return codec.tokenizer.separator()
    return codec.token(name or "\n")


def numbered(texts: Iterable[str], codec: Codec, separator: int) -> Iterator[np.ndarray]:
    """Documents as tokens, each with the separator at its end; empty ones are left out."""
    end = np.array([separator], np.int32)
    rest = iter(texts)
    while batch := [text for text in itertools.islice(rest, _BATCH) if text]:
        many = codec.tokenizer.encode_all if codec.tokenizer else lambda b: map(codec.encode, b)
        for tokens in many(batch):
            yield np.concatenate([tokens, end])


def make_corpus(texts: Iterable[str], codec: Codec, separator: int) -> Corpus:
    """Documents numbered in memory."""
    pieces = [tokens.astype(codec.dtype) for tokens in numbered(texts, codec, separator)]
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    whole = np.concatenate(pieces) if pieces else np.zeros(0, codec.dtype)
    return Corpus(whole, ends, codec, separator)


def write_corpus(
    folder: str | pathlib.Path,
    splits: Mapping[str, Iterable[str]],
    codec: Codec,
    separator: int,
) -> dict[str, tuple[int, int]]:
    """Numbers documents into a folder, one after the other: memory holds a batch of them.

    Args:
      folder: is made; must not hold token files yet.
      splits: documents by split.
      codec: what numbers them.
      separator: the token that ends a document.

    Returns:
      split -> (tokens, documents).

    Raises:
      ValueError: a folder that has token files, a split without documents, text that the codec cannot
        number. The folder then has no "meta.json", and is no corpus.
    """
    folder = pathlib.Path(folder).expanduser()
    if (folder / META).exists():
        raise ValueError(f"{str(folder)!r} holds token files already: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for split, texts in splits.items():
        ends = []
        with open(folder / f"{split}.npy", "wb") as file:
            count = 0
            _write_header(file, codec.dtype, 0)
            for tokens in numbered(texts, codec, separator):
                file.write(tokens.astype(codec.dtype.newbyteorder("<")).tobytes())
                count += len(tokens)
                ends.append(count)
            file.seek(0)
            _write_header(file, codec.dtype, count)
        if not count:
            raise ValueError(f"split={split!r} has no documents")
        np.save(folder / f"{split}_ends.npy", np.array(ends, np.int64), allow_pickle=False)
        sizes[split] = (count, len(ends))
    meta = {
        "format": FORMAT,
        "vocab_size": codec.size,
        "symbols": codec.symbols and list(codec.symbols),
        "tokenizer": codec.tokenizer and codec.tokenizer.sha256,
        "separator": separator,
        "splits": {split: {"tokens": n, "documents": m} for split, (n, m) in sizes.items()},
    }
    if codec.tokenizer is not None:
        shutil.copyfile(codec.tokenizer.path, folder / FILE)
    # last: a folder without it is not finished
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    return sizes


def _write_header(file, dtype: np.dtype, count: int) -> None:
    """The header of a vector in .npy; numpy pads it so that any count takes the same room."""
    header = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def read_corpus(folder: str | pathlib.Path, split: str) -> Corpus:
    """Maps one split of a folder that `write_corpus` made.

    Args:
      folder: the folder.
      split: its name; "all" needs every split and reads them into memory.

    Raises:
      ValueError: no such folder or split, a damaged or unfinished one, a tokenizer file that changed.
    """
    folder = pathlib.Path(folder).expanduser()
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        sizes = {name: (s["tokens"], s["documents"]) for name, s in meta["splits"].items()}
        symbols = None if meta["symbols"] is None else tuple(map(str, meta["symbols"]))
        sha256, separator = meta["tokenizer"], int(meta["separator"])
        size, version = int(meta["vocab_size"]), meta["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(folder)!r} is no folder of token files: {error!r}") from error
    if version != FORMAT:
        raise ValueError(f"{str(folder)!r} has format {version}; this version reads {FORMAT}")
    if split != "all" and split not in sizes:
        raise ValueError(
            f"split={split!r} is not in {str(folder)!r}; it has: {', '.join(sizes)}"
            f"{closest(split, sizes)}"
        )
    file = load_tokenizer(folder / FILE, sha256) if sha256 else None
    codec = Codec(symbols=symbols, tokenizer=file)
    if codec.size != size or not 0 <= separator < size:
        raise ValueError(f"{str(folder / META)!r} is damaged: {size} tokens, separator {separator}")
    parts = [_map(folder, name, *sizes[name], codec) for name in sizes if split in (name, "all")]
    if len(parts) == 1:
        return Corpus(*parts[0], codec, separator)
    shifts = np.cumsum([0, *(len(tokens) for tokens, _ in parts)])
    ends = np.concatenate([ends + shift for (_, ends), shift in zip(parts, shifts)])
    return Corpus(np.concatenate([tokens for tokens, _ in parts]), ends, codec, separator)


def _map(folder: pathlib.Path, name: str, count: int, documents: int, codec: Codec):
    try:
        tokens = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        ends = np.load(folder / f"{name}_ends.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise ValueError(f"split {name!r} of {str(folder)!r} cannot be read: {error}") from error
    if (tokens.shape, tokens.dtype) != ((count,), codec.dtype) or ends.shape != (documents,):
        raise ValueError(
            f"split {name!r} of {str(folder)!r} holds {tokens.dtype} {tokens.shape} and {ends.shape}"
            f" ends; {META} says {codec.dtype} ({count},) and ({documents},)"
        )
    ends = np.asarray(ends, np.int64)
    if ends[0] < 1 or ends[-1] != count or (np.diff(ends) < 1).any():
        raise ValueError(f"split {name!r} of {str(folder)!r}: the ends of documents are damaged")
    return tokens, ends
