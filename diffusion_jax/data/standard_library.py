"""Real text that every installation has: the source of Python's standard library, as characters.

The modules at the top level of the library (`abc.py`, `argparse.py`, ...) in the order of their names, some
4.5 million characters of code and English. What they say depends on the version of Python that runs,
which a run folder records: figures of different versions do not compare to the last digit.
"""

import functools
import pathlib
import sysconfig

import numpy as np

from diffusion_jax.data.source import check_fraction, check_split
from diffusion_jax.data.text import TextWindows, text_spec
from diffusion_jax.data.vocabulary import Vocabulary
from diffusion_jax.registry import register

ALPHABET = ("\n", *map(chr, range(ord(" "), ord("~") + 1)))


@functools.cache
def _modules(folder: pathlib.Path) -> tuple[np.ndarray, ...]:
    """The tokens of each module, uint8; modules with characters outside the alphabet are left out."""
    vocabulary = Vocabulary(ALPHABET)
    allowed = frozenset(ALPHABET)
    found = []
    for path in sorted(folder.glob("*.py")):
        content = path.read_bytes().decode("utf-8", errors="replace")
        content = content.replace("\r\n", "\n").expandtabs(4).replace("\f", "")
        if content and allowed.issuperset(content):
            found.append(vocabulary.encode(content).astype(np.uint8))
    return tuple(found)


@register("data", "standard_library", kinds=("tokens",))
def standard_library(
    length: int = 64,
    *,
    split: str = "train",
    stride: int | None = None,
    test_fraction: float = 0.1,
    folder: str | pathlib.Path | None = None,
) -> TextWindows:
    """Windows of characters of Python's standard library, V = 96.

    Args:
      length: characters in a window, L.
      split: "train", "test" or "all". Whole modules are held out, evenly over the alphabet.
      stride: distance of the beginnings of two windows; `length` unless given.
      test_fraction: share of the modules that "test" takes.
      folder: where modules are read, instead of the library of the Python that runs.

    Returns:
      A source of "tokens" int32 [L].

    Raises:
      ValueError: an unknown split, a length or stride below 1, a folder with too little text.
    """
    check_split(split)
    check_fraction(test_fraction)
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    folder = pathlib.Path(sysconfig.get_path("stdlib") if folder is None else folder)
    modules = _modules(folder)
    share = np.floor(np.arange(len(modules) + 1) * test_fraction + 1e-9)
    is_test = np.diff(share) > 0
    chosen = [m for m, test in zip(modules, is_test) if split == "all" or test == (split == "test")]
    tokens = np.concatenate(chosen) if chosen else np.zeros(0, np.uint8)
    if len(tokens) < length:
        raise ValueError(
            f"split={split!r} of the modules in {str(folder)!r} has {len(tokens)} characters, fewer "
            f"than length={length}; point folder= at Python's source, or use the data set 'text'"
        )
    return TextWindows(tokens, length, stride, text_spec(length, ALPHABET))
