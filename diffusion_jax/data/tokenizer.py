"""Tokenizer files of users: HuggingFace `tokenizer.json`, read by the `tokenizers` library (extra "text").

A tokenizer is part of a model: ids mean nothing without the file that numbered them. What is kept of one
is therefore its path and its SHA-256, and a file that has changed since is refused. The library is
imported when a file is read.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from diffusion_jax.data.files import checksum

FILE = "tokenizer.json"
MAX_BYTES = 256 * 2**20

# what common tokenizers put between documents
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer file, opened; made by `load_tokenizer`.

    Attributes:
      path: the file.
      sha256: of its bytes.
      size: V, one more than the largest id.
    """

    path: pathlib.Path
    sha256: str
    size: int
    _library: Any = dataclasses.field(repr=False, compare=False)

    def encode(self, text: str) -> np.ndarray:
        """A text as int32 ids [n], without the special tokens that a file may add at its ends."""
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of many texts, on all cores."""
        found = self._library.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in found]

    def decode(self, tokens: Sequence[int]) -> str:
        """Ids as text, special tokens by their names."""
        return self._library.decode([int(token) for token in tokens], skip_special_tokens=False)

    def id_of(self, name: str) -> int:
        """The id of one entry of the vocabulary, such as "<|endoftext|>". Raises ValueError."""
        found = self._library.token_to_id(name)
        if found is None:
            raise ValueError(f"{str(self.path)!r} has no token {name!r}")
        return int(found)

    def separator(self) -> int:
        """The id of the token that ends a document. Raises ValueError where none has a usual name."""
        for name in _SEPARATORS:
            if self._library.token_to_id(name) is not None:
                return self.id_of(name)
        raise ValueError(
            f"{str(self.path)!r} has none of the tokens {', '.join(_SEPARATORS)}: name the one that"
            " ends a document with separator="
        )


def load_tokenizer(path: str | pathlib.Path, sha256: str | None = None) -> Tokenizer:
    """Opens a tokenizer file.

    Args:
      path: a `tokenizer.json`, or the folder that holds one.
      sha256: the checksum that the file must have; None takes any.

    Returns:
      A `Tokenizer`; one file is read once.

    Raises:
      ValueError: no file, one that is too large or no tokenizer, or another than the checksum says.
      ImportError: the library is missing.
    """
    path = pathlib.Path(path).expanduser()
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        raise ValueError(
            f"tokenizer={str(path)!r} is not a file; give a {FILE} of the tokenizers library"
        )
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"tokenizer={str(path)!r} is larger than {MAX_BYTES} bytes")
    found = checksum(path)
    if sha256 not in (None, found):
        raise ValueError(
            f"tokenizer={str(path)!r} is not the file that this was made with: SHA-256 {found[:12]},"
            f" expected {sha256[:12]}; its ids may mean other words"
        )
    return _open(path.resolve(), found)


@functools.lru_cache(maxsize=8)
def _open(path: pathlib.Path, sha256: str) -> Tokenizer:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("tokenizer files need: pip install tokenizers") from error
    try:
        library = tokenizers.Tokenizer.from_file(str(path))
        library.no_truncation()
        library.no_padding()
        ids = library.get_vocab(with_added_tokens=True).values()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's is no Exception
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer={str(path)!r} is not a {FILE}: {reason}") from error
    if not ids:
        raise ValueError(f"tokenizer={str(path)!r} has no vocabulary")
    return Tokenizer(path, sha256, max(ids) + 1, library)
