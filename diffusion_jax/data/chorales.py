"""Four-voice chorales as token sequences: voices interleaved, one token a voice and sixteenth note.

A window of T steps is 4 T tokens: soprano, alto, tenor, bass of the first step, then of the second. A
token is silence, a pitch, or (where asked for) "hold", the pitch of this voice one step before. The symbols
are names of notes, so that samples read like "A4E4C#4A2A4...", with "-" for silence and "." for hold.
"""

import pathlib

import numpy as np

from diffusion_jax.data.arrays import load_npz
from diffusion_jax.data.source import DataSpec, Element, Source, check_split
from diffusion_jax.registry import register

VOICES = 4
REST, HOLD = "-", "."
LOWEST, HIGHEST = 36, 81  # of Bach's chorales: C2 to A5
MAX_BYTES = 2**30

_NAMES = "C C# D D# E F F# G G# A A# B".split()


def note_name(pitch: int) -> str:
    """The name of a MIDI pitch, C4 being 60."""
    return f"{_NAMES[pitch % 12]}{pitch // 12 - 1}"


def note_symbols(lowest: int, highest: int, hold: bool = False) -> tuple[str, ...]:
    """The symbols in the order of their tokens: silence, hold where wanted, the pitches upwards."""
    return (REST, *([HOLD] if hold else []), *map(note_name, range(lowest, highest + 1)))


def pitches(tokens: np.ndarray, symbols: tuple[str, ...]) -> np.ndarray:
    """MIDI pitches of interleaved tokens, -1 where a voice is silent or not known yet.

    Args:
      tokens: integers [..., 4 T]; ids of `symbols`, or the mask id.
      symbols: of the spec. A hold takes the last pitch of its voice.

    Returns:
      int32 [..., T, 4].

    Raises:
      ValueError: a length that four voices do not divide.
    """
    tokens = np.asarray(tokens)
    if tokens.shape[-1] % VOICES:
        raise ValueError(f"{tokens.shape[-1]} tokens are no whole steps of {VOICES} voices")
    number = {note_name(pitch): pitch for pitch in range(128)}
    values = np.array([number.get(symbol, -1) for symbol in symbols] + [-1], np.int32)
    grid = tokens.reshape(*tokens.shape[:-1], -1, VOICES)
    out = values[grid]
    if HOLD in symbols:
        held = grid == symbols.index(HOLD)
        for step in range(1, grid.shape[-2]):
            before = out[..., step - 1, :]
            out[..., step, :] = np.where(held[..., step, :], before, out[..., step, :])
    return out


class ChoraleWindows(Source):
    """Windows of pieces of different lengths; made by `chorales`."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, length: int, spec: DataSpec) -> None:
        self.spec = spec
        self._tokens, self._starts = tokens, starts
        self._offsets = np.arange(length)

    def __len__(self) -> int:
        return len(self._starts)

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        places = self._starts[rows][:, None] + self._offsets
        return {"tokens": self._tokens[places].astype(np.int32)}


@register("data", "chorales", kinds=("tokens",))
def chorales(
    path: str | pathlib.Path,
    steps: int = 32,
    *,
    split: str = "train",
    stride: int | None = None,
    hold: bool = False,
    lowest: int = LOWEST,
    highest: int = HIGHEST,
    max_bytes: int = MAX_BYTES,
) -> ChoraleWindows:
    """Windows of chorales in four voices, such as the JSB chorales (Boulanger-Lewandowski et al. 2012).

    Args:
      path: an .npz file of arrays by split: "train_notes" integers [sum of T, 4], the MIDI pitch of each
        voice at every sixteenth with -1 for silence, and "train_offsets" [pieces + 1] where pieces begin
        and end; so "valid_" and "test_".
      steps: sixteenths in a window, T; an example has 4 T tokens. Shorter pieces are left out.
      split: "train", "valid", "test" or "all".
      stride: steps between the beginnings of two windows of a piece; half a window unless given.
      hold: write a pitch that a voice keeps as "hold". The file does not tell a repeated note from one
        that is kept, so neither do the tokens.
      lowest, highest: the range of pitches that has tokens.
      max_bytes: limit on the size of the arrays.

    Returns:
      A source of "tokens" int32 [4 T].

    Raises:
      ValueError: a file that cannot be read or lacks the split, a pitch outside the range, no piece
        of T steps, an option out of range.
    """
    check_split(split, ("train", "valid", "test", "all"))
    stride = max(1, steps // 2) if stride is None and isinstance(steps, int) else stride
    for name, value in (("steps", steps), ("stride", stride)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if not 0 <= lowest < highest <= 127:
        raise ValueError(f"pitches must lie in 0..127, got lowest={lowest}, highest={highest}")
    arrays = load_npz(path, max_bytes)
    there = [p for p in ("train", "valid", "test") if f"{p}_notes" in arrays]
    if split != "all" and split not in there:
        raise ValueError(
            f"split={split!r} is not in {str(path)!r}; it has: {', '.join(there) or 'none'}"
        )
    symbols = note_symbols(lowest, highest, hold)
    tokens, starts, begin = [], [], 0
    for part in there if split == "all" else [split]:
        notes, offsets = _checked(arrays, part, path, lowest, highest)
        ids = np.where(notes < 0, 0, notes - lowest + len(symbols) - (highest - lowest + 1))
        for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
            piece = ids[first:last]
            starts += [VOICES * (begin + s) for s in range(0, len(piece) - steps + 1, stride)]
            begin += len(piece)
            tokens.append(piece)
    if not starts:
        raise ValueError(f"split={split!r} of {str(path)!r} has no piece of {steps} steps")
    grid = np.concatenate(tokens)
    length = VOICES * steps
    spec = DataSpec(
        kind="tokens",
        elements={"tokens": Element((length,), "int32")},
        vocab_size=len(symbols),
        symbols=symbols,
        show="notes",
    )
    windows = ChoraleWindows(grid.astype(np.uint8).ravel(), np.array(starts), length, spec)
    return _Held(windows) if hold else windows


class _Held(Source):
    """Windows in which a pitch that repeats is a hold; the first step of a window always names it."""

    def __init__(self, source: ChoraleWindows) -> None:
        self.spec = source.spec
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        grid = self._source.take(rows)["tokens"].reshape(len(rows), -1, VOICES)
        same = (grid[:, 1:] == grid[:, :-1]) & (grid[:, 1:] != 0)
        grid[:, 1:][same] = self.spec.symbols.index(HOLD)
        return {"tokens": grid.reshape(len(rows), -1)}


def _checked(arrays, part: str, path, lowest: int, highest: int) -> tuple[np.ndarray, np.ndarray]:
    notes, offsets = arrays[f"{part}_notes"], arrays.get(f"{part}_offsets")
    if notes.ndim != 2 or notes.shape[1] != VOICES or not np.issubdtype(notes.dtype, np.integer):
        raise ValueError(
            f"{str(path)!r}: '{part}_notes' must be integers [T, {VOICES}],"
            f" got {notes.dtype} {notes.shape}"
        )
    if (
        offsets is None
        or offsets.ndim != 1
        or len(offsets) < 2
        or not np.issubdtype(offsets.dtype, np.integer)
        or offsets[0] != 0
        or offsets[-1] != len(notes)
        or (np.diff(offsets) < 0).any()
    ):
        raise ValueError(f"{str(path)!r}: '{part}_offsets' must rise from 0 to {len(notes)}")
    outside = notes[(notes != -1) & ((notes < lowest) | (notes > highest))]
    if len(outside):
        raise ValueError(
            f"{str(path)!r}: pitch {outside[0]} is outside {lowest}..{highest}; change lowest, highest"
        )
    return notes.astype(np.int64), offsets
