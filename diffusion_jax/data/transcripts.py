"""Text of speech as symbol ids: phonemes of the ten digits, characters, or phonemes by a lexicon.

Ids start at 1; 0 is padding, and `symbols[id]` is the name ("" for padding). Phonemes are those of
the CMU Pronouncing Dictionary (ARPAbet) without stress marks.
"""

import pathlib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

PADDING = ""
BLANK = "<blank>"
MAX_BYTES = 64 * 2**20

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_PHONEMES: Mapping[str, tuple[str, ...]] = {
    "zero": ("Z", "IH", "R", "OW"),
    "one": ("W", "AH", "N"),
    "two": ("T", "UW"),
    "three": ("TH", "R", "IY"),
    "four": ("F", "AO", "R"),
    "five": ("F", "AY", "V"),
    "six": ("S", "IH", "K", "S"),
    "seven": ("S", "EH", "V", "AH", "N"),
    "eight": ("EY", "T"),
    "nine": ("N", "AY", "N"),
}

_TYPOGRAPHIC = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"}
)
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)*|.", re.DOTALL)


def symbol_table(used: Iterable[str], *, blank: bool = False) -> tuple[str, ...]:
    """The padding, then the symbols in sorted order, then the blank where it is wanted."""
    return (PADDING, *sorted(set(used)), *((BLANK,) if blank else ()))


def encode(
    sequences: Sequence[Sequence[str]], symbols: Sequence[str], length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sequences of symbols as ids, padded with 0.

    Args:
      sequences: N sequences of symbols.
      symbols: as `symbol_table` gives them. With `BLANK` among them it is put between all symbols and
        at both ends (Grad-TTS).
      length: L; the longest unless given.

    Returns:
      int32 ids [N, L] and their numbers int32 [N].

    Raises:
      ValueError: an unknown symbol, an empty sequence, or one longer than `length`.
    """
    number = {symbol: i for i, symbol in enumerate(symbols) if symbol}
    coded = []
    for sequence in sequences:
        unknown = [symbol for symbol in sequence if symbol not in number]
        if unknown or not len(sequence):
            what = f"the symbol {unknown[0]!r} is unknown" if unknown else "it is empty"
            raise ValueError(f"cannot encode {''.join(sequence)[:60]!r}: {what}")
        ids = [number[symbol] for symbol in sequence]
        if BLANK in number:
            spaced = [number[BLANK]] * (2 * len(ids) + 1)
            spaced[1::2] = ids
            ids = spaced
        coded.append(ids)
    longest = max(map(len, coded), default=1)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a text has {longest} symbols, more than {length}")
    padded = np.zeros((len(coded), length), np.int32)
    for row, ids in zip(padded, coded):
        row[: len(ids)] = ids
    return padded, np.array([len(ids) for ids in coded], np.int32)


def clean(text: str) -> str:
    """Lower case, without accents and typographic quotes, single spaces."""
    plain = unicodedata.normalize("NFKD", text.translate(_TYPOGRAPHIC))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(plain.lower().split())


def phonemes(text: str, lexicon: Mapping[str, Sequence[str]]) -> list[str]:
    """Symbols of a clean text: the phonemes of words in the lexicon, else letters and punctuation."""
    symbols: list[str] = []
    for piece in _WORD.findall(text):
        symbols += lexicon.get(piece, piece)
    return symbols


def read_lexicon(path: str | pathlib.Path) -> dict[str, tuple[str, ...]]:
    """A pronouncing dictionary in the layout of CMUdict: "WORD  P H O N", comments begin with ";;;".

    Stress marks are dropped, and of several pronunciations ("WORD(1)") the first is kept.

    Raises:
      ValueError: no such file, too large, no text, or a line without phonemes.
    """
    words: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.split("#", 1)[0].split()
        if not fields or line.startswith(";;;"):
            continue
        if len(fields) < 2:
            raise ValueError(f"{str(path)!r}, line {number}: {line[:60]!r} names no phonemes")
        word = re.sub(r"\(\d+\)$", "", fields[0].lower())
        words.setdefault(word, tuple(re.sub(r"\d", "", phone.upper()) for phone in fields[1:]))
    if not words:
        raise ValueError(f"{str(path)!r} holds no words")
    return words


def read_text(path: str | pathlib.Path) -> str:
    """A text file of at most `MAX_BYTES`, UTF-8. Raises ValueError naming the file."""
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"{str(path)!r} is larger than {MAX_BYTES} bytes")
        return content.decode("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 (byte {error.start})") from error
