"""A vocabulary of single characters."""

import dataclasses

import numpy as np

from diffusion_jax.data.source import MASK_SYMBOL


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
        if not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be integers, got dtype {tokens.dtype}")
        wrong = tokens[(tokens < 0) | (tokens > len(self))]
        if len(wrong):
            raise ValueError(
                f"token {wrong[0]} is outside 0..{len(self)} (the last is the mask id)"
            )
        return "".join(np.array((*self.symbols, MASK_SYMBOL))[tokens])


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
