"""A text file as windows of tokens: characters or bytes.

The vocabulary of characters is the sorted set of code points of the whole file, both splits together,
so that it depends on nothing but the file; `spec.symbols` carries it (and with `DataSpec.to_json` a
run folder does). The tokens of bytes are the bytes, V = 256.
"""

import dataclasses
import gzip
import pathlib
import zlib

import numpy as np

from diffusion_jax.data.source import DataSpec, Element, Source, check_fraction, check_split
from diffusion_jax.registry import register

UNITS = ("characters", "bytes")
CLEANS = ("text8",)
MAX_BYTES = 2 * 2**30

_NAMES = "zero one two three four five six seven eight nine".split()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Symbols of one character each; the token of a symbol is its position.

    Raises:
      ValueError: a symbol is not one character, or occurs twice.
    """

    symbols: tuple[str, ...]

    def __post_init__(self) -> None:
        wrong = [symbol for symbol in self.symbols if len(symbol) != 1]
        if wrong or not self.symbols:
            raise ValueError(f"symbols must be single characters, got {wrong[:1] or 'none'}")
        if len(set(self.symbols)) != len(self.symbols):
            twice = next(s for s in self.symbols if self.symbols.count(s) > 1)
            raise ValueError(f"the symbol {twice!r} occurs twice")

    def __len__(self) -> int:
        return len(self.symbols)

    @classmethod
    def of(cls, text: str) -> "Vocabulary":
        """The sorted set of the characters of a text."""
        return cls(tuple(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """A text as int32 tokens [len(text)]. Raises ValueError naming an unknown character."""
        points = _code_points(text)
        known = _code_points("".join(self.symbols))
        order = np.argsort(known, kind="stable")
        slots = np.minimum(np.searchsorted(known, points, sorter=order), len(known) - 1)
        tokens = order[slots].astype(np.int32)
        wrong = np.flatnonzero(known[tokens] != points)
        if len(wrong):
            raise ValueError(
                f"character {text[wrong[0]]!r} at position {wrong[0]} is not among the"
                f" {len(self)} symbols of the vocabulary"
            )
        return tokens

    def decode(self, tokens: np.ndarray) -> str:
        """Tokens [L] as text; the mask id becomes "_". Raises ValueError outside 0..V."""
        tokens = np.asarray(tokens)
        if tokens.ndim != 1:
            raise ValueError(f"tokens must have shape [L], got {tokens.shape}")
        return text_spec(tokens.shape[0], self.symbols).decode(tokens)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)


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
    return DataSpec(
        kind="tokens",
        elements={"tokens": Element((length,), "int32")},
        vocab_size=256 if symbols is None else len(symbols),
        symbols=symbols,
        show="bytes" if symbols is None else "text",
    )


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
    test_fraction: float = 0.1,
    max_bytes: int = MAX_BYTES,
) -> TextWindows:
    """Windows of a text file.

    Args:
      path: a text file, plain or gzip (".gz").
      length: characters or bytes in a window, L.
      split: "train" (the beginning of the file), "test" (its last part) or "all".
      unit: "characters" (the file must be UTF-8) or "bytes".
      stride: distance of the beginnings of two windows; `length` unless given, so that every
        character is in one window. 1 gives every offset.
      clean: "text8" reduces the text to a-z and single spaces (27 symbols); None keeps it.
      alphabet: the symbols in the order of their tokens, instead of those of the file.
      test_fraction: share of the characters that "test" takes.
      max_bytes: limit on the (unpacked) size.

    Returns:
      A source of "tokens" int32 [L].

    Raises:
      ValueError: a missing, oversized or corrupt file, text that is not UTF-8, a character outside
        `alphabet`, a part shorter than one window, an unknown option.
    """
    check_split(split)
    check_fraction(test_fraction)
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; valid: {', '.join(UNITS)}")
    if clean is not None and clean not in CLEANS:
        raise ValueError(f"unknown clean {clean!r}; valid: {', '.join(CLEANS)} or None")
    if unit == "bytes" and (clean is not None or alphabet is not None):
        raise ValueError("clean and alphabet need unit='characters'")
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    content = _read(pathlib.Path(path).expanduser(), max_bytes)
    if unit == "bytes":
        symbols, tokens = None, np.frombuffer(content, np.uint8)
    else:
        characters = _decode(content, path)
        characters = clean_text8(characters) if clean == "text8" else characters
        if not characters:
            raise ValueError(f"{str(path)!r} holds no text")
        if alphabet is not None:
            vocabulary = Vocabulary(tuple(alphabet))
        elif clean == "text8":
            vocabulary = Vocabulary(tuple(" abcdefghijklmnopqrstuvwxyz"))
        else:
            vocabulary = Vocabulary.of(characters)
        symbols = vocabulary.symbols
        tokens = vocabulary.encode(characters)
        tokens = tokens.astype(np.min_scalar_type(len(vocabulary) - 1))
    cut = int(len(tokens) * (1 - test_fraction))
    part = {"train": tokens[:cut], "test": tokens[cut:], "all": tokens}[split]
    if len(part) < length:
        raise ValueError(
            f"split={split!r} of {str(path)!r} has {len(part)} {unit}, fewer than length={length}"
        )
    return TextWindows(part, length, stride, text_spec(length, symbols))


def _read(path: pathlib.Path, max_bytes: int) -> bytes:
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is not a file")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    if len(content) > max_bytes:
        raise ValueError(f"{str(path)!r} is larger than max_bytes={max_bytes}")
    return content


def _decode(content: bytes, path: str | pathlib.Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8: byte 0x{content[error.start]:02x} at offset"
            f" {error.start}; use unit='bytes' to read it as it is"
        ) from error
