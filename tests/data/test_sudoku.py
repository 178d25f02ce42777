import gzip
import itertools

import numpy as np
import pytest

from diffusion_jax import data
from diffusion_jax.data.sudoku import generate, rates, satisfied, solutions, solves

SOLVED = "".join(str((3 * (r % 3) + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))
BOARD = np.array([int(c) - 1 for c in SOLVED])


def by_hand(board):
    """The number of constraints that hold, by sets."""
    grid = board.reshape(9, 9)
    boxes = [grid[r : r + 3, c : c + 3] for r, c in itertools.product((0, 3, 6), (0, 3, 6))]
    return sum(set(unit.ravel()) == set(range(9)) for unit in (*grid, *grid.T, *boxes))


def test_constraints_against_sets():
    rng = np.random.default_rng(0)
    boards = np.tile(BOARD, (40, 1))
    for i, board in enumerate(boards):
        for _ in range(i % 4):
            board[rng.integers(81)] = rng.integers(9)
    boards[-1, 7] = 9
    found = satisfied(boards)
    assert found.shape == (40, 27)
    np.testing.assert_array_equal(found.sum(axis=1), [by_hand(board) for board in boards])
    np.testing.assert_array_equal(solves(boards), [by_hand(board) == 27 for board in boards])
    assert 0 < solves(boards).sum() < 40


def test_rates_by_hand():
    board = BOARD.copy()
    board[0] = board[
        1
    ]  # a row, a column and a box broken; the digit now three times in these units
    assert rates(BOARD) == {"solved": 1.0, "constraints": 1.0, "cells": 1.0}
    found = rates(np.stack([BOARD, board]))
    twins = {j for j in range(1, 81) if board[j] == board[0] and _share_a_unit(0, j)}
    assert found["solved"] == 0.5 and found["constraints"] == pytest.approx(51 / 54)
    assert found["cells"] == pytest.approx((162 - 1 - len(twins)) / 162)
    assert rates(np.full((2, 81), 9)) == {"solved": 0.0, "constraints": 0.0, "cells": 0.0}


def _share_a_unit(a, b):
    (r, c), (s, d) = divmod(a, 9), divmod(b, 9)
    return r == s or c == d or (r // 3, c // 3) == (s // 3, d // 3)


def test_a_solution_agrees_with_its_prompt():
    prompt = np.where(np.arange(81) < 20, BOARD, 9)
    assert solves(BOARD, prompt)
    relabelled = (BOARD + 1) % 9
    assert solves(relabelled) and not solves(relabelled, prompt)
    assert rates(relabelled, prompt)["solved"] == 0.0


def test_boards_made_keep_the_rules_and_differ():
    boards = generate(300, seed=3, bases=4)
    assert solves(boards.astype(np.int64)).all()
    assert len(np.unique(boards, axis=0)) == 300
    np.testing.assert_array_equal(generate(10, seed=3, bases=4), boards[:10])
    assert not np.array_equal(generate(10, seed=4, bases=4), boards[:10])
    # every digit at every cell: no symmetry is missing
    counts = np.stack([(boards == digit).sum(axis=0) for digit in range(9)])
    assert counts.min() > 10 and counts.max() < 70
    first_row = boards.reshape(-1, 9, 9)[:, 0]
    assert len(np.unique(first_row, axis=0)) > 290


def test_solutions():
    empty_pair = np.where(np.isin(np.arange(81), (0, 40)), 9, BOARD)
    np.testing.assert_array_equal(solutions(empty_pair), [BOARD])
    assert len(solutions(np.full(81, 9), limit=5)) == 5
    # two equal digits in a row: none
    wrong = np.full(81, 9)
    wrong[:2] = 4
    assert solutions(wrong).shape == (0, 81)
    # an unavoidable rectangle: two solutions
    many = solutions(np.where(np.isin(BOARD, (0, 1, 2)), 9, BOARD), limit=100)
    assert len(many) > 1 and solves(many).all()
    assert len(np.unique(many, axis=0)) == len(many)


@pytest.mark.parametrize("givens", [0, 17, 40, 81])
def test_givens(givens):
    source = data.sudoku(train_count=30, bases=3, givens=givens)
    batch = source.take(np.arange(30))
    assert ((batch["prompt"] != 9).sum(axis=1) == givens).all()
    assert solves(batch["tokens"], batch["prompt"]).all()
    assert source.spec.vocab_size == 9
    assert source.spec.decode(batch["prompt"][0]).count("_") == 81 - givens


def test_splits_come_from_other_boards():
    train = data.sudoku(train_count=20, test_count=8, bases=2)
    test = data.sudoku(train_count=20, test_count=8, bases=2, split="test")
    both = data.sudoku(train_count=20, test_count=8, bases=2, split="all")
    parts = [source.take(np.arange(len(source)))["tokens"] for source in (train, test, both)]
    np.testing.assert_array_equal(np.concatenate(parts[:2]), parts[2])
    np.testing.assert_array_equal(parts[1], generate(8, 0, 2, first=2))


def test_unique_puzzles_have_one_solution():
    source = data.sudoku(train_count=6, bases=2, givens=20, unique=True)
    batch = source.take(np.arange(6))
    for prompt, board in zip(batch["prompt"], batch["tokens"]):
        np.testing.assert_array_equal(solutions(prompt), [board])
    assert (batch["prompt"] != 9).sum() > 120
    several = data.sudoku(train_count=6, bases=2, givens=20).take(np.arange(6))
    assert max(len(solutions(p)) for p in several["prompt"]) > 1


@pytest.fixture
def tables():
    boards = generate(20, bases=2).astype(np.uint8) + 1
    return {"puzzles": np.where(np.arange(81) % 3 == 0, boards, 0), "solutions": boards}


def test_npz(tmp_path, tables):
    np.savez(tmp_path / "plain.npz", **tables)
    parts = [data.sudoku(tmp_path / "plain.npz", split=s) for s in ("train", "test")]
    assert [len(part) for part in parts] == [18, 2]
    whole = data.sudoku(tmp_path / "plain.npz", split="all").take(np.arange(20))
    np.testing.assert_array_equal(whole["tokens"] + 1, tables["solutions"])
    np.testing.assert_array_equal((whole["prompt"] + 1) % 10, tables["puzzles"])
    more = data.sudoku(tmp_path / "plain.npz", split="all", givens=40).take(np.arange(20))
    assert ((more["prompt"] != 9).sum(axis=1) == 40).all()
    assert (more["prompt"] == whole["prompt"])[whole["prompt"] != 9].all()
    named = {f"{part}_{k}": v[:5] for part in ("train", "test") for k, v in tables.items()}
    np.savez(tmp_path / "split.npz", **named)
    assert [len(data.sudoku(tmp_path / "split.npz", split=s)) for s in ("test", "all")] == [5, 10]


@pytest.mark.parametrize(
    "separator, empty, header", [(",", "0", "quizzes,solutions\n"), (" ", ".", "")]
)
def test_text(tmp_path, tables, separator, empty, header):
    digits = lambda row: "".join(map(str, row))
    lines = [
        digits(p).replace("0", empty) + separator + digits(s)
        for p, s in zip(tables["puzzles"], tables["solutions"])
    ]
    path = tmp_path / "boards.csv.gz"
    path.write_bytes(gzip.compress((header + "\n".join(lines) + "\n").encode()))
    found = data.sudoku(path, split="all").take(np.arange(20))
    np.testing.assert_array_equal(found["tokens"] + 1, tables["solutions"])
    np.testing.assert_array_equal((found["prompt"] + 1) % 10, tables["puzzles"])


def test_bad_files(tmp_path, tables):
    def saved(**changed):
        np.savez(
            tmp_path / "bad.npz", **{k: v for k, v in (tables | changed).items() if v is not None}
        )
        return tmp_path / "bad.npz"

    def swapped(name, row, cells):
        values = tables[name].copy()
        values[row, list(cells)] = values[row, list(cells[::-1])]
        return values

    cases = (
        (dict(solutions=None), "no 'solutions'; it has: puzzles"),
        (dict(solutions=swapped("solutions", 7, (0, 1))), "solution 7 breaks the rules"),
        (dict(puzzles=swapped("puzzles", 4, (0, 3))), "puzzle 4 and its solution disagree"),
        (dict(puzzles=tables["puzzles"][:3]), "3 puzzles, 20 solutions"),
        (dict(puzzles=tables["puzzles"] + np.uint8(200)), "outside 0..9"),
        (dict(puzzles=tables["puzzles"].astype(float)), "must be integers"),
        (dict(puzzles=tables["puzzles"][:, :80]), r"must be integers \[N, 81\]"),
        (dict(puzzles=np.array([{}] * 20)), "Python objects"),
    )
    for changed, message in cases:
        with pytest.raises(ValueError, match=message):
            data.sudoku(saved(**changed))
    lines = tmp_path / "bad.csv"
    for content, message in (
        ("", "holds no puzzles"),
        ("a,b\n12,34\n", "line 2: '12,34'"),
        (SOLVED, "line 1"),
    ):
        lines.write_text(content)
        with pytest.raises(ValueError, match=message):
            data.sudoku(lines)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(givens=82), "givens=82"),
        (dict(givens=2.5), "givens=2.5"),
        (dict(bases=0), "bases=0"),
        (dict(train_count=0), "train_count=0"),
        (dict(path="nowhere.npz"), "'nowhere.npz' is not a file"),
        (dict(path="nowhere.csv"), "'nowhere.csv' is not a file"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.sudoku(**arguments)


def test_helpers_refuse_other_shapes():
    for call in (satisfied, solves, rates):
        with pytest.raises(ValueError, match="81"):
            call(np.zeros((2, 80), int))
        with pytest.raises(ValueError, match="81"):
            call(np.zeros((2, 81)))
    with pytest.raises(ValueError, match="prompts have shape"):
        solves(np.zeros((2, 81), int), np.zeros(81, int))
    with pytest.raises(ValueError, match=r"0\.\.9"):
        solutions(np.full(81, 10))
