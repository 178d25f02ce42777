"""Text as tokens and back: characters, bytes, symbols of several characters, or a tokenizer file.

A `Codec` numbers text in one of these units and says what a `DataSpec` has to know to show it. `codec_of`
goes the other way, from a spec to its codec, for prompts.
"""

import dataclasses
import functools
import pathlib
import re

import numpy as np

from diffusion_jax.data.source import MASK_SYMBOL, TEXTUAL, DataSpec, Element
from diffusion_jax.data.tokenizer import Tokenizer, load_tokenizer
from diffusion_jax.data.vocabulary import Vocabulary
from diffusion_jax.registry import check_choice

UNITS = ("characters", "bytes", "tokens")


@dataclasses.dataclass(frozen=True)
class Codec:
    """One way to number text; at most one of the fields is given, and none means bytes.

    Attributes:
      symbols: the symbols in the order of their tokens; where some have several characters, a text is
        cut from left to right into the longest that fit.
      tokenizer: an opened tokenizer file.
    """

    symbols: tuple[str, ...] | None = None
    tokenizer: Tokenizer | None = None

    @property
    def size(self) -> int:
        """V."""
        if self.tokenizer is not None:
            return self.tokenizer.size
        return 256 if self.symbols is None else len(self.symbols)

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned dtype that holds every token."""
        return np.min_scalar_type(self.size - 1)

    def encode(self, text: str) -> np.ndarray:
        """A text as int32 [n]. Raises ValueError naming what the vocabulary lacks."""
        if self.tokenizer is not None:
            return self.tokenizer.encode(text)
        if self.symbols is None:
            return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        if all(len(symbol) == 1 for symbol in self.symbols):
            return Vocabulary(self.symbols).encode(text)
        return _encode_longest(self.symbols, text)

    def token(self, name: str) -> int:
        """The token that one symbol, or one entry of a tokenizer's vocabulary, has.

        Raises:
          ValueError: there is none.
        """
        if self.tokenizer is not None:
            return self.tokenizer.id_of(name)
        found = self.encode(name) if name else ()
        if len(found) != 1:
            raise ValueError(f"{name!r} is {len(found)} tokens, not one")
        return int(found[0])

    def spec(self, length: int, **elements: Element) -> DataSpec:
        """The spec of rows of `length` tokens; `elements` are further ones."""
        file = self.tokenizer
        return DataSpec(
            kind="tokens",
            elements={"tokens": Element((length,), "int32"), **elements},
            vocab_size=self.size,
            symbols=self.symbols,
            show="tokenizer" if file else "bytes" if self.symbols is None else "text",
            tokenizer=file and {"path": str(file.path), "sha256": file.sha256},
        )


def make_codec(
    unit: str,
    *,
    symbols: tuple[str, ...] | None = None,
    tokenizer: str | pathlib.Path | None = None,
) -> Codec:
    """The codec of a unit: "characters" takes its symbols, "tokens" the path of a tokenizer file.

    Raises:
      ValueError: an unknown unit, a tokenizer for another unit or none for "tokens", a bad file.
    """
    check_choice("unit", unit, UNITS)
    if (unit == "tokens") != bool(tokenizer):
        wanted = "needs tokenizer='tokenizer.json'" if unit == "tokens" else "takes no tokenizer"
        raise ValueError(f"unit={unit!r} {wanted}")
    if unit == "tokens":
        return Codec(tokenizer=load_tokenizer(tokenizer))
    return Codec(symbols=None if unit == "bytes" else Vocabulary(tuple(symbols)).symbols)


def codec_of(spec: DataSpec) -> Codec:
    """The codec that numbered the tokens of a spec.

    Raises:
      ValueError: tokens that are no text; a tokenizer file that is gone or has changed.
    """
    if spec.show == "tokenizer":
        return Codec(tokenizer=load_tokenizer(**spec.tokenizer))
    if spec.show not in TEXTUAL:
        raise ValueError("the tokens of this model spell no text")
    return Codec(symbols=spec.symbols)


def encode_prompt(spec: DataSpec, text: str, mask_symbol: str = MASK_SYMBOL) -> np.ndarray:
    """A prompt as int32 tokens [L] with the mask id V at every position that is to be filled.

    Args:
      spec: of the data that the model learned.
      text: what is given; every `mask_symbol` is one position to fill, and so is all that follows the
        text up to the length L.
      mask_symbol: a single character; another than "_" where "_" occurs in the text itself.

    Raises:
      ValueError: a mask symbol of several characters, a text longer than L, characters outside the
        vocabulary, a spec without text.
    """
    if len(mask_symbol) != 1:
        raise ValueError(f"the mask symbol must be a single character, got {mask_symbol!r}")
    codec, length = codec_of(spec), spec.shape[0]
    pieces, mask = [], np.array([spec.vocab_size], np.int32)
    for piece in text.split(mask_symbol):
        try:
            pieces += [mask, codec.encode(piece)] if piece else [mask]
        except ValueError as error:
            raise ValueError(f"prompt {text[:60]!r}: {error}") from error
    given = np.concatenate(pieces)[1:]
    if len(given) > length:
        raise ValueError(
            f"prompt {text[:60]!r} has {len(given)} tokens, more than the model's length {length}"
        )
    return np.concatenate([given, np.repeat(mask, length - len(given))])


@functools.lru_cache(maxsize=8)
def _longest(symbols: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(s) for s in sorted(symbols, key=len, reverse=True)))


def _encode_longest(symbols: tuple[str, ...], text: str) -> np.ndarray:
    number = {symbol: token for token, symbol in enumerate(symbols)}
    tokens, at = [], 0
    while at < len(text):
        found = _longest(symbols).match(text, at)
        if not found:
            raise ValueError(
                f"character {text[at]!r} at position {at} begins none of the {len(symbols)} symbols"
                " of the vocabulary"
            )
        tokens.append(number[found.group()])
        at = found.end()
    return np.array(tokens, np.int32)
