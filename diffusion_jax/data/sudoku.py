"""Sudoku: full boards as 81 tokens, and puzzles as prompts that a model fills in.

A board is its 81 cells in row-major order, the digits 1..9 being the tokens 0..8 (V = 9). "tokens" is the
full board and "prompt" the puzzle: the same tokens at the cells that are given and 9, the mask id, at
the others. A board keeps 27 constraints: each row, column and box holds every digit once.

Without a file, boards are made here: a few by backtracking, which no two symmetries of Sudoku connect,
and the others from these by relabelling digits, permuting bands, stacks, and rows and columns in them,
and transposing (1.2e12 symmetries each). Train and test come from different boards to begin with.
"""

import pathlib

import numpy as np

from diffusion_jax.data import randomness
from diffusion_jax.data.arrays import load_npz
from diffusion_jax.data.files import read_bytes
from diffusion_jax.data.source import (
    ArraySource,
    DataSpec,
    Element,
    Source,
    check_fraction,
    check_split,
    split_rows,
)
from diffusion_jax.registry import register

CELLS = 81
DIGITS = 9
UNKNOWN = 9  # the mask id
FEWEST = 17  # givens a puzzle with one solution needs (McGuire et al., arXiv 1201.0749)
MAX_BYTES = 2**30

_ROW, _COLUMN = np.divmod(np.arange(CELLS), 9)
_BOX = 3 * (_ROW // 3) + _COLUMN // 3
# [27, 9]: the cells of every row, column and box
_UNITS = np.concatenate(
    [np.argsort(unit, kind="stable").reshape(9, 9) for unit in (_ROW, _COLUMN, _BOX)]
)
_ALL = (1 << DIGITS) - 1


def satisfied(boards: np.ndarray) -> np.ndarray:
    """Which of the 27 constraints hold: the rows, then the columns, then the boxes.

    Args:
      boards: integers [..., 81], digits 0..8; any other value (an unknown cell) breaks its constraints.

    Returns:
      bool [..., 27].

    Raises:
      ValueError: boards of another shape or dtype.
    """
    boards = _integers(boards, "boards")
    inside = (boards >= 0) & (boards < DIGITS)
    bits = np.where(inside, np.int64(1) << np.where(inside, boards, 0).astype(np.int64), 0)
    return np.bitwise_or.reduce(bits[..., _UNITS], axis=-1) == _ALL


def solves(boards: np.ndarray, prompts: np.ndarray | None = None) -> np.ndarray:
    """Which boards keep all 27 constraints, and agree with the given cells of their prompts.

    Args:
      boards: integers [..., 81].
      prompts: integers [..., 81] with 9 at unknown cells; None asks for no agreement.

    Returns:
      bool [...].

    Raises:
      ValueError: boards or prompts of another shape or dtype.
    """
    boards = _integers(boards, "boards")
    solved = satisfied(boards).all(axis=-1)
    if prompts is None:
        return solved
    prompts = _integers(prompts, "prompts")
    if prompts.shape != boards.shape:
        raise ValueError(f"prompts have shape {prompts.shape}, the boards {boards.shape}")
    return solved & ((prompts == UNKNOWN) | (prompts == boards)).all(axis=-1)


def rates(boards: np.ndarray, prompts: np.ndarray | None = None) -> dict[str, float]:
    """How well boards keep the constraints, as means over them.

    Returns:
      {"solved": share of boards that `solves`, "constraints": share of the 27 constraints kept,
      "cells": share of cells without an equal digit in their row, column or box}.
    """
    boards = _integers(boards, "boards").reshape(-1, CELLS)
    inside = (boards >= 0) & (boards < DIGITS)
    alone = inside.copy()
    for unit in (_ROW, _COLUMN, _BOX):
        counts = np.zeros((len(boards), 9, DIGITS), np.int64)
        place = np.arange(len(boards))[:, None], unit[None, :], np.where(inside, boards, 0)
        np.add.at(counts, place, inside)
        alone &= counts[place] == 1
    prompts = None if prompts is None else np.asarray(prompts).reshape(-1, CELLS)
    return {
        "solved": float(solves(boards, prompts).mean()),
        "constraints": float(satisfied(boards).mean()),
        "cells": float(alone.mean()),
    }


def solutions(prompt: np.ndarray, limit: int = 2) -> np.ndarray:
    """The solutions of one puzzle, at most `limit` of them: one row means that it has one solution.

    Args:
      prompt: integers [81], digits 0..8 and 9 at unknown cells.
      limit: when to stop.

    Returns:
      int64 [count, 81] by backtracking, in no particular order.

    Raises:
      ValueError: a prompt of another shape, or values outside 0..9.
    """
    prompt = _integers(prompt, "prompt")
    if prompt.shape != (CELLS,) or prompt.min() < 0 or prompt.max() > UNKNOWN:
        raise ValueError(f"a prompt holds 81 values in 0..9, got shape {prompt.shape}")
    digits = [list(range(DIGITS))] * CELLS
    return np.array(_search(prompt.tolist(), digits, limit), np.int64).reshape(-1, CELLS)


def generate(count: int, seed: int = 0, bases: int = 64, first: int = 0) -> np.ndarray:
    """Full boards, uint8 [count, 81]; board i is a function of (seed, bases, first, i).

    Args:
      count: number of boards.
      seed: of everything.
      bases: boards that are searched for; board i is a random symmetry of base `first` + i mod `bases`.
      first: number of the first base, so that two sets can be made of different ones.
    """
    made = np.stack([_base(seed, first + i) for i in range(min(bases, count))])
    rows = np.arange(count)
    boards = made[rows % len(made)].reshape(count, 9, 9)
    draws = randomness.uniforms(randomness.hash_rows(rows, 2, seed, first), 34)
    boards = np.take_along_axis(boards, _lines(draws[:, :12])[:, :, None], axis=1)
    boards = np.take_along_axis(boards, _lines(draws[:, 12:24])[:, None, :], axis=2)
    boards = np.where(draws[:, 24, None, None] < 0.5, boards, boards.swapaxes(1, 2))
    names = np.argsort(draws[:, 25:34], axis=1)
    return np.take_along_axis(names, boards.reshape(count, CELLS), axis=1).astype(np.uint8)


def _lines(draws: np.ndarray) -> np.ndarray:
    """An order of nine lines that keeps bands together, from 12 uniforms: [N, 12] -> [N, 9]."""
    bands = np.argsort(draws[:, :3], axis=1)
    inner = np.argsort(draws[:, 3:].reshape(-1, 3, 3), axis=2)
    return (3 * bands[:, :, None] + inner).reshape(-1, 9)


def _base(seed: int, number: int) -> np.ndarray:
    """A full board: the boxes of the diagonal at random, the others by a search in random order."""
    draws = randomness.uniforms(randomness.hash_rows(np.array([number]), 1, seed), CELLS * DIGITS)
    order = np.argsort(draws.reshape(CELLS, DIGITS), axis=1)
    board = np.full(CELLS, UNKNOWN)
    for box in (0, 4, 8):
        board[_UNITS[18 + box]] = order[box]
    return np.array(_search(board.tolist(), order.tolist(), 1)[0])


def _search(board: list[int], digits: list[list[int]], limit: int) -> list[list[int]]:
    """Completions of a board, at most `limit`; cells with the fewest candidates come first."""
    rows, columns, boxes = [0] * 9, [0] * 9, [0] * 9
    places = [(int(r), int(c), int(b)) for r, c, b in zip(_ROW, _COLUMN, _BOX)]
    for cell, digit in enumerate(board):
        if digit != UNKNOWN:
            r, c, b = places[cell]
            if (rows[r] | columns[c] | boxes[b]) >> digit & 1:
                return []
            rows[r], columns[c], boxes[b] = (
                used | 1 << digit for used in (rows[r], columns[c], boxes[b])
            )
    empty = {cell for cell, digit in enumerate(board) if digit == UNKNOWN}
    found: list[list[int]] = []

    def fill() -> bool:
        """Whether the search is over."""
        if not empty:
            found.append(board.copy())
            return len(found) >= limit
        fewest, chosen, free = DIGITS + 1, -1, 0
        for cell in empty:
            r, c, b = places[cell]
            candidates = _ALL & ~(rows[r] | columns[c] | boxes[b])
            count = candidates.bit_count()
            if count < fewest or (count == fewest and cell < chosen):
                fewest, chosen, free = count, cell, candidates
        if fewest == 0:
            return False
        r, c, b = places[chosen]
        empty.remove(chosen)
        for digit in digits[chosen]:
            bit = 1 << digit
            if free & bit:
                board[chosen] = digit
                rows[r] |= bit
                columns[c] |= bit
                boxes[b] |= bit
                if fill():
                    return True
                rows[r] ^= bit
                columns[c] ^= bit
                boxes[b] ^= bit
        board[chosen] = UNKNOWN
        empty.add(chosen)
        return False

    fill()
    return found


@register("data", "sudoku", kinds=("tokens",))
def sudoku(
    path: str | pathlib.Path | None = None,
    *,
    split: str = "train",
    givens: int | None = None,
    unique: bool = False,
    train_count: int = 10_000,
    test_count: int = 1_000,
    bases: int = 64,
    seed: int = 0,
    test_fraction: float = 0.1,
    max_bytes: int = MAX_BYTES,
) -> Source:
    """Full boards and puzzles made of them.

    Args:
      path: an .npz file with "puzzles" and "solutions", integers [N, 81] of 0 (empty) to 9, also by
        split ("train_puzzles", "train_solutions", "test_puzzles", ...); or a text file (.csv, .txt,
        .gz) with a puzzle and its solution a line, 81 characters each, divided by a comma or spaces,
        0 or "." for empty. None makes boards.
      split: "train", "test" or "all".
      givens: uncover cells at random until a puzzle has this many; the harder the fewer. None leaves
        the puzzles of a file as they are, and gives 30 to those made here.
      unique: uncover further cells, some milliseconds of search a puzzle, until each has one solution.
        Without it those made here may have several, and those of a file are trusted: judge boards by
        `solves` rather than by comparing them with "tokens".
      train_count, test_count: number of boards made.
      bases: boards that those of each split are symmetries of.
      seed: of the boards made and of the cells uncovered.
      test_fraction: share of a file without splits that "test" takes (deterministic).
      max_bytes: limit on the (unpacked) size of a file.

    Returns:
      A source of "tokens" int32 [81] (V = 9) and "prompt" int32 [81] with 9, the mask id, where unknown.

    Raises:
      ValueError: a file that cannot be read or lacks a part, a board that breaks the rules, a puzzle
        that its solution does not fit, an option out of range.
    """
    check_split(split)
    check_fraction(test_fraction)
    if givens is not None and not (isinstance(givens, int) and 0 <= givens <= CELLS):
        raise ValueError(f"givens={givens!r} must be an integer in 0..81, or None")
    for name, value in (("train_count", train_count), ("test_count", test_count), ("bases", bases)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if path is None:
        parts = {"train": [(train_count, 0)], "test": [(test_count, bases)]}
        parts["all"] = parts["train"] + parts["test"]
        boards = np.concatenate([generate(n, seed, bases, first) for n, first in parts[split]])
        known = np.zeros(boards.shape, bool)
        givens = 30 if givens is None else givens
    else:
        boards, known = _read(pathlib.Path(path).expanduser(), split, test_fraction, max_bytes)
    stream = ("train", "test", "all").index(split)
    words = randomness.hash_rows(np.arange(len(boards)), 3, seed, stream)
    order = np.argsort(randomness.uniforms(words, CELLS) - known, axis=1)
    if givens is not None:
        cut = np.arange(CELLS)[None, :] < givens
        uncovered = np.zeros_like(known)
        np.put_along_axis(uncovered, order, np.broadcast_to(cut, known.shape), axis=1)
        known = known | uncovered
    prompts = np.where(known, boards, UNKNOWN).astype(np.uint8)
    if unique:
        for row in range(len(boards)):
            _make_unique(prompts[row], boards[row], order[row])
    spec = DataSpec(
        kind="tokens",
        elements={"tokens": Element((CELLS,), "int32"), "prompt": Element((CELLS,), "int32")},
        vocab_size=DIGITS,
        symbols=tuple("123456789"),
        show="text",
    )
    return ArraySource({"tokens": boards, "prompt": prompts}, spec)


def _make_unique(prompt: np.ndarray, board: np.ndarray, order: np.ndarray) -> None:
    """Uncovers, in `order`, cells that tell the board from another solution."""
    while len(found := solutions(prompt)) > 1:
        other = found[np.argmax((found != board).any(axis=1))]
        cell = next(c for c in order if other[c] != board[c])
        prompt[cell] = board[cell]


def _read(
    path: pathlib.Path, split: str, test_fraction: float, max_bytes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boards uint8 [N, 81] of 0..8 and their given cells bool [N, 81]."""
    given = load_npz(path, max_bytes) if path.suffix == ".npz" else _read_lines(path, max_bytes)
    official = [part for part in ("train", "test") if f"{part}_solutions" in given]
    if official and split != "all" and split not in official:
        raise ValueError(f"split={split!r} is not in {str(path)!r}; it has: {', '.join(official)}")
    prefixes = [""] if not official else [f"{p}_" for p in official if split in (p, "all")]
    puzzles, boards = (
        np.concatenate([_table(given, prefix + name, path) for prefix in prefixes])
        for name in ("puzzles", "solutions")
    )
    if len(puzzles) != len(boards):
        raise ValueError(f"{str(path)!r} holds {len(puzzles)} puzzles, {len(boards)} solutions")
    wrong = np.flatnonzero(~solves(boards - 1))
    if len(wrong):
        raise ValueError(f"{str(path)!r}: solution {wrong[0]} breaks the rules of Sudoku")
    wrong = np.flatnonzero(((puzzles != 0) & (puzzles != boards)).any(axis=1))
    if len(wrong):
        raise ValueError(f"{str(path)!r}: puzzle {wrong[0]} and its solution disagree")
    rows = np.arange(len(boards))
    if not official and split != "all":
        rows = split_rows(len(boards), split, round(test_fraction * len(boards)))
    return (boards[rows] - 1).astype(np.uint8), puzzles[rows] != 0


def _table(given: dict[str, np.ndarray], name: str, path: pathlib.Path) -> np.ndarray:
    if name not in given:
        raise ValueError(f"{str(path)!r} has no {name!r}; it has: {', '.join(sorted(given))}")
    values = given[name]
    if (
        values.ndim != 2
        or values.shape[1] != CELLS
        or not len(values)
        or not np.issubdtype(values.dtype, np.integer)
    ):
        raise ValueError(
            f"{str(path)!r}: {name!r} must be integers [N, 81], got {values.dtype} {values.shape}"
        )
    if values.min() < 0 or values.max() > DIGITS:
        raise ValueError(f"{str(path)!r}: {name!r} holds values outside 0..9")
    return values.astype(np.int64)


def _read_lines(path: pathlib.Path, max_bytes: int) -> dict[str, np.ndarray]:
    """Puzzle and solution of every line; a first line that holds no digit is a header."""
    lines = read_bytes(path, max_bytes).decode("latin-1").splitlines()
    puzzles, boards = [], []
    for number, line in enumerate(lines, 1):
        fields = line.replace(",", " ").split()
        if not fields or (number == 1 and not any(c.isdigit() for c in line)):
            continue
        fields = [field for field in fields if len(field) == CELLS]
        if len(fields) != 2 or not all(set(f) <= set("0123456789.") for f in fields):
            raise ValueError(
                f"{str(path)!r}, line {number}: {line[:40]!r} is not a puzzle and its solution,"
                " 81 characters of 0-9 or '.' each"
            )
        for out, field in zip((puzzles, boards), fields):
            cells = np.frombuffer(field.replace(".", "0").encode(), np.uint8)
            out.append(cells - np.uint8(ord("0")))
    if not puzzles:
        raise ValueError(f"{str(path)!r} holds no puzzles")
    return {"puzzles": np.stack(puzzles), "solutions": np.stack(boards)}


def _integers(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values)
    if not values.ndim or values.shape[-1] != CELLS or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{name} must be integers [..., 81], got dtype {values.dtype} and shape {values.shape}"
        )
    return values
