"""Documents as rows of tokens: packed one after the other, or one a row with padding.

Documents come from a text file, numbered in memory, or from the token files that
`python -m diffusion_jax.data.prepare_text` wrote, which are mapped and never read whole. Every document
ends with a separator token.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from diffusion_jax.data.codecs import UNITS, Codec, make_codec
from diffusion_jax.data.files import decode_utf8, read_bytes
from diffusion_jax.data.source import Element, Source, check_fraction, check_split, split_rows
from diffusion_jax.data.text import CLEANS, TEXT8, TextWindows, clean_text8
from diffusion_jax.data.token_files import Corpus, make_corpus, read_corpus, separator_of
from diffusion_jax.data.vocabulary import Vocabulary
from diffusion_jax.registry import check_choice, register

BOUNDARIES = ("lines", "paragraphs", "jsonl", "file")
LAYOUTS = ("packed", "padded")
MAX_BYTES = 2 * 2**30


def split_documents(
    lines: Iterable[str], boundary: str, key: str = "text", name: str = ""
) -> Iterator[str]:
    """The documents of the lines of a text, without empty ones.

    Args:
      lines: with or without their ends.
      boundary: "lines", "paragraphs" (blank lines between), "jsonl" (an object a line, the text under
        `key`), or the whole "file".
      key: see `boundary`.
      name: of the file, for errors.

    Raises:
      ValueError: a line of "jsonl" that is no such object.
    """
    piece: list[str] = []
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if boundary == "jsonl":
            if line.strip() and (text := _json_text(line, key, f"{name!r}, line {number}")):
                yield text
        elif boundary == "lines":
            if line:
                yield line
        elif line or boundary == "file":
            piece.append(line)
        elif piece:
            yield "\n".join(piece)
            piece = []
    if any(piece):
        yield "\n".join(piece)


def _json_text(line: str, key: str, where: str) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get(key), str):
        raise ValueError(f"{where}: no object with a text under {key!r}")
    return found[key]


def document_codec(
    unit: str,
    documents: Iterable[str],
    *,
    alphabet: str | None = None,
    clean: str | None = None,
    tokenizer: str | pathlib.Path = "",
    separator: str = "",
) -> tuple[Codec, int]:
    """The codec of documents, and their separator's token.

    Characters are those of `alphabet`, of text8 where the text is cleaned to it, or else the sorted ones
    of `documents`, which is gone through for that; the line feed, or `separator`, is among them (text8:
    the space).

    Raises:
      ValueError: options that do not go together, a separator that is not one token.
    """
    check_choice("unit", unit, UNITS)
    if clean is not None:
        check_choice("clean", clean, CLEANS)
    if (unit != "characters" and alphabet is not None) or (unit == "bytes" and clean is not None):
        raise ValueError(f"clean and alphabet need unit='characters', not {unit!r}")
    symbols = None
    if unit == "characters":
        symbols = alphabet
        if clean == "text8":
            symbols, separator = symbols or TEXT8, separator or " "
        if symbols is None:
            used = {separator or "\n"}
            for text in documents:
                used.update(text)
            symbols = Vocabulary.of("".join(used)).symbols
    codec = make_codec(unit, symbols=symbols and tuple(symbols), tokenizer=tokenizer)
    return codec, separator_of(codec, separator)


class PaddedDocuments(Source):
    """One document a row, cut or filled up with a padding token; made by `documents`."""

    def __init__(self, corpus: Corpus, rows, length: int, pad: int, given: bool) -> None:
        elements = {"prompt": Element((length,), "int32")} if given else {}
        self.spec = corpus.codec.spec(length, **elements)
        self._corpus, self._rows, self._pad, self._given = corpus, rows, pad, given

    def __len__(self) -> int:
        return len(self._rows)

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        length = self.spec.shape[0]
        picked, ends = self._rows[rows], self._corpus.ends
        begins = np.where(picked > 0, ends[picked - 1], 0)
        sizes = np.minimum(ends[picked] - begins, length)
        tokens = np.full((len(rows), length), self._pad, np.int32)
        for row, begin, size in zip(tokens, begins, sizes):
            row[:size] = self._corpus.tokens[begin : begin + size]
        _check_range(tokens, self.spec.vocab_size)
        if not self._given:
            return {"tokens": tokens}
        inside = np.arange(length) < sizes[:, None]
        return {"tokens": tokens, "prompt": np.where(inside, self.spec.vocab_size, tokens)}


class PackedDocuments(TextWindows):
    """Windows of a corpus as it stands; made by `documents`."""

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        taken = super()._take(rows)
        _check_range(taken["tokens"], self.spec.vocab_size)
        return taken


def _check_range(tokens: np.ndarray, vocab_size: int) -> None:
    if tokens.size and tokens.max() >= vocab_size:
        raise ValueError(f"the corpus holds the token {tokens.max()}, outside 0..{vocab_size - 1}")


@register("data", "documents", kinds=("tokens",))
def documents(
    path: str | pathlib.Path,
    length: int,
    *,
    split: str = "train",
    layout: str = "packed",
    stride: int | None = None,
    pad: str = "",
    pad_given: bool = False,
    boundary: str = "lines",
    key: str = "text",
    unit: str = "characters",
    alphabet: str | None = None,
    clean: str | None = None,
    tokenizer: str | pathlib.Path = "",
    separator: str = "",
    test_fraction: float = 0.1,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """Documents of a text file, or of token files.

    Args:
      path: a text file, plain or gzip; or a folder of token files, for which the options from
        `boundary` on were chosen when it was written, and play no role.
      length: tokens in a row, L.
      split: "train", "test" or "all". A file gives whole documents (deterministic) to each.
      layout: "packed": rows of L tokens go over the ends of documents, and nothing is lost but the end of
        the last; "padded": one document a row, cut to L or filled up.
      stride: packed: distance of the beginnings of two rows; L unless given.
      pad: padded: name of the padding token; "" repeats the separator.
      pad_given: padded: add "prompt", in which the padding is given and all else is to be filled. With
        `answers_only` of a method the loss is that of the text and its first separator alone.
      boundary: "lines", "paragraphs" (blank lines between), "jsonl" (an object a line, the text under
        `key`) or "file".
      key: see `boundary`.
      unit: "characters", "bytes" or "tokens" (of `tokenizer`).
      alphabet, clean, tokenizer: as `text` takes them.
      separator: name of the token that ends a document: a character, or a token of the tokenizer. ""
        takes the line feed (text8: the space), or the tokenizer's own end of text.
      test_fraction: share of the documents of a file that "test" takes.
      max_bytes: limit on the (unpacked) size of a file.

    Returns:
      A source of "tokens" int32 [L], and "prompt" int32 [L] where asked for.

    Raises:
      ValueError: a file or folder that cannot be read, a part shorter than a row, an option unknown or
        out of range, a token that the corpus cannot hold (when it is read).
      ImportError: tokens of a file, and the tokenizers library is missing.
    """
    check_choice("layout", layout, LAYOUTS)
    check_choice("boundary", boundary, BOUNDARIES)
    check_fraction(test_fraction)
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if pathlib.Path(path).expanduser().is_dir():
        corpus = read_corpus(path, split)
    else:
        check_split(split)
        text = decode_utf8(read_bytes(path, max_bytes), path, "only text has documents")
        texts = list(split_documents(text.split("\n"), boundary, key, str(path)))
        texts = [clean_text8(one) for one in texts] if clean == "text8" else texts
        texts = [one for one in texts if one]
        if not texts:
            raise ValueError(f"{str(path)!r} holds no documents")
        codec, end = document_codec(
            unit, texts, alphabet=alphabet, clean=clean, tokenizer=tokenizer, separator=separator
        )
        rows = split_rows(len(texts), split, round(test_fraction * len(texts)))
        corpus = make_corpus((texts[row] for row in rows), codec, end)
    if layout == "padded":
        token = corpus.separator if not pad else corpus.codec.token(pad)
        return PaddedDocuments(corpus, np.arange(len(corpus.ends)), length, token, pad_given)
    if pad or pad_given:
        raise ValueError("pad and pad_given need layout='padded'")
    if len(corpus.tokens) < length:
        raise ValueError(
            f"split={split!r} of {str(path)!r} has {len(corpus.tokens)} tokens, fewer than"
            f" length={length}"
        )
    return PackedDocuments(corpus.tokens, length, stride, corpus.codec.spec(length))
