"""A text file as windows of tokens: characters, bytes, or tokens of a tokenizer file.

The vocabulary of characters is the sorted set of code points of the whole file, both splits together,
so that it depends on nothing but the file; `spec.symbols` carries it (and with `DataSpec.to_json` a
run folder does). The tokens of bytes are the bytes, V = 256. A tokenizer file brings its own vocabulary
(50,257 for GPT-2's). Whole documents rather than windows are `documents`'.
"""

import pathlib

import numpy as np

from diffusion_jax.data.codecs import UNITS, Codec, make_codec
from diffusion_jax.data.files import decode_utf8, read_bytes
from diffusion_jax.data.source import DataSpec, Source, check_fraction, check_split
from diffusion_jax.data.vocabulary import Vocabulary
from diffusion_jax.registry import check_choice, register

CLEANS = ("text8",)
TEXT8 = " abcdefghijklmnopqrstuvwxyz"
MAX_BYTES = 2 * 2**30

_NAMES = "zero one two three four five six seven eight nine".split()


class _CleanTable(dict):
    """Translation table to a..z and space: digits spelled out, everything else a space."""

    def __missing__(self, point: int) -> str:
        return " "


_CLEAN_TABLE = _CleanTable(
    {ord(c): c for c in "abcdefghijklmnopqrstuvwxyz"}
    | {ord(str(digit)): f" {name} " for digit, name in enumerate(_NAMES)}
)


def clean_text8(text: str) -> str:
    """The 27 symbols of text8: lower-case a-z, single spaces, digits spelled out (M. Mahoney)."""
    return " ".join(text.lower().translate(_CLEAN_TABLE).split())


def text_spec(length: int, symbols: tuple[str, ...] | None) -> DataSpec:
    """The spec of windows of `length` characters, or of bytes when `symbols` is None."""
    return Codec(symbols).spec(length)


class TextWindows(Source):
    """Windows of a long sequence: row i is `tokens[i * stride : i * stride + length]`."""

    def __init__(self, tokens: np.ndarray, length: int, stride: int, spec: DataSpec) -> None:
        self.spec = spec
        self._tokens = tokens
        self._stride = stride
        self._count = (len(tokens) - length) // stride + 1
        self._offsets = np.arange(length)

    def __len__(self) -> int:
        return self._count

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        places = rows[:, None] * self._stride + self._offsets
        return {"tokens": self._tokens[places].astype(np.int32)}


@register("data", "text", kinds=("tokens",))
def text(
    path: str | pathlib.Path,
    length: int,
    *,
    split: str = "train",
    unit: str = "characters",
    stride: int | None = None,
    clean: str | None = None,
    alphabet: str | None = None,
    tokenizer: str | pathlib.Path | None = None,
    test_fraction: float = 0.1,
    max_bytes: int = MAX_BYTES,
) -> TextWindows:
    """Windows of a text file.

    Args:
      path: a text file, plain or gzip (".gz").
      length: tokens in a window, L.
      split: "train" (the beginning of the file), "test" (its last part) or "all".
      unit: "characters", "bytes" or "tokens" (of `tokenizer`); text but for bytes must be UTF-8.
      stride: distance of the beginnings of two windows; `length` unless given, so that every
        token is in one window. 1 gives every offset.
      clean: "text8" reduces the text to a-z and single spaces (27 symbols); None keeps it.
      alphabet: the symbols in the order of their tokens, instead of those of the file.
      tokenizer: a `tokenizer.json` for unit="tokens"; the text is encoded in one piece, in memory
        (`documents` reads what `python -m diffusion_jax.data.prepare_text` wrote).
      test_fraction: share of the tokens that "test" takes.
      max_bytes: limit on the (unpacked) size.

    Returns:
      A source of "tokens" int32 [L].

    Raises:
      ValueError: a missing, oversized or corrupt file, text that is not UTF-8, a character outside
        `alphabet`, a file that is no tokenizer, a part shorter than one window, an unknown option.
      ImportError: tokens of a file, and the tokenizers library is missing.
    """
    check_split(split)
    check_fraction(test_fraction)
    check_choice("unit", unit, UNITS)
    if clean is not None and clean not in CLEANS:
        raise ValueError(f"unknown clean {clean!r}; valid: {', '.join(CLEANS)} or None")
    if (unit != "characters" and alphabet is not None) or (unit == "bytes" and clean is not None):
        raise ValueError(f"clean and alphabet need unit='characters', not {unit!r}")
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    content = read_bytes(path, max_bytes)
    if unit == "bytes":
        codec, tokens = make_codec(unit, tokenizer=tokenizer), np.frombuffer(content, np.uint8)
    else:
        characters = decode_utf8(content, path, "use unit='bytes' to read it as it is")
        characters = clean_text8(characters) if clean == "text8" else characters
        if not characters:
            raise ValueError(f"{str(path)!r} holds no text")
        symbols = alphabet
        if symbols is None:
            symbols = TEXT8 if clean == "text8" else Vocabulary.of(characters).symbols
        codec = make_codec(unit, symbols=tuple(symbols), tokenizer=tokenizer)
        tokens = codec.encode(characters).astype(codec.dtype)
    cut = int(len(tokens) * (1 - test_fraction))
    part = {"train": tokens[:cut], "test": tokens[cut:], "all": tokens}[split]
    if len(part) < length:
        raise ValueError(
            f"split={split!r} of {str(path)!r} has {len(part)} {unit}, fewer than length={length}"
        )
    return TextWindows(part, length, stride, codec.spec(length))
