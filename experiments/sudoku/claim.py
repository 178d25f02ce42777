"""Sudoku by a masked model: the order in which cells are filled decides whether a board comes out right.

One model, trained on boards of which any cells are masked; held-out puzzles (each with one solution) are
filled in by every sampler with equal numbers of calls: one a cell, and one for every four cells. All samplers
take the likeliest digit (temperature 0), so that the order alone differs; three rows draw it.
"solved" is the share of boards that keep all 27 constraints, "constraints" the share of rows, columns and
boxes that hold every digit, "cells" the share of empty cells filled as in the solution.
"""

import itertools

import jax
import numpy as np

from diffusion_jax import run as runs
from diffusion_jax.data.sudoku import UNKNOWN, rates, sudoku
from diffusion_jax.samplers import build_sampler
from experiments.reproduce import run_name, trained

TITLE = "Sudoku, orders of decoding (Kim et al., arXiv 2502.06768)"
CLAIM = (
    "a masked model that fills the cells it is surest of first (probability margin) solves far more puzzles than "
    "in random order, with the same number of calls"
)
CONFIGS = {"cpu": "configs.sudoku.small", "full": "configs.sudoku.full"}
MAIN, KNOB = 40, (50, 40, 30)  # givens
_COLD = {"temperature": 0.0}
_PER_CELL = {
    "ancestral": ("masked_ancestral", _COLD),
    "first-hitting": ("first_hitting", _COLD),
    "left to right": ("confidence", {"order": "left", **_COLD}),
    "entropy": ("confidence", {"order": "entropy", **_COLD}),
    "confidence": ("confidence", _COLD),
    "margin": ("top_k_margin", _COLD),
    "ReMDM cap 0.05": ("remdm", {"eta": 0.05, **_COLD}),
    "first-hitting, drawn": ("first_hitting", {}),
    "sampled (LLaDA), drawn": ("llada", {"temperature": 1.0}),
    "margin, drawn": ("top_k_margin", {}),
}
_FEW = {
    "ancestral": ("masked_ancestral", _COLD),
    "MaskGIT": ("maskgit", {}),
    "confidence": ("confidence", _COLD),
    "margin": ("top_k_margin", _COLD),
}
_MORE = {
    "ancestral": ("masked_ancestral", _COLD),
    "ReMDM cap 0.05": ("remdm", {"eta": 0.05, **_COLD}),
    "ReMDM cap 0.05, drawn": ("remdm", {"eta": 0.05}),
}


def puzzles(options, givens, num):
    """`num` held-out puzzles of so many givens, each with one solution."""
    data = {k: v for k, v in options.config.data.items() if k in ("path", "bases", "seed")}
    source = sudoku(**data, split="test", givens=givens, unique=True, test_count=num)
    return runs.first_conditions(source, min(num, len(source)))


def row(run, batch, label, name, calls, settings, seeds):
    """One row: means over the seeds, and the standard error of "solved" over boards."""
    nfe = None if name == "first_hitting" else calls  # it makes one call a cell that is empty
    sampler = build_sampler(run.method.process, name, nfe, length=81, **settings)
    found, cells = [], []
    empty = batch["prompt"] == UNKNOWN
    for seed in range(seeds if sampler.stochastic else 1):
        key = jax.random.key(seed)
        boards = np.asarray(runs.draw(run, batch, key, sampler=sampler))
        found.append(rates(boards, batch["prompt"]))
        cells.append((boards == batch["tokens"])[empty].mean())
    solved = float(np.mean([f["solved"] for f in found]))
    return {
        "sampler": label,
        "givens": round(float((~empty).sum(axis=1).mean()), 1),
        "calls": calls,
        "solved": solved,
        "solved_se": float(np.sqrt(solved * (1 - solved) / len(boards))),
        "constraints": float(np.mean([f["constraints"] for f in found])),
        "cells": float(np.mean(cells)),
    }


def measure(options):
    """Rows of every sampler at one difficulty, then of two orders at others."""
    run = trained(options.config, options.workdir, run_name(CONFIGS[options.scale]))
    num = options.num or 64
    batch = puzzles(options, MAIN, num)
    cells = 81 - MAIN
    sets = ((_PER_CELL, cells), (_FEW, cells // 4), (_MORE, 2 * cells))
    rows = [
        row(run, batch, label, name, calls, settings, options.seeds)
        for samplers, calls in sets
        for label, (name, settings) in samplers.items()
    ]
    for givens in KNOB:
        if givens == MAIN:
            continue
        batch = puzzles(options, givens, num)
        for label in ("ancestral", "margin"):
            name, settings = _PER_CELL[label]
            rows.append(row(run, batch, label, name, 81 - givens, settings, 1))
    return rows


def _solved(rows, label, calls, figure="solved"):
    return next(r[figure] for r in rows if (r["sampler"], r["calls"]) == (label, calls))


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    cells = 81 - MAIN
    random, margin = (_solved(rows, n, cells) for n in ("first-hitting", "margin"))
    few = {n: _solved(rows, n, cells // 4, "constraints") for n in ("ancestral", "margin")}
    drawn = {n: _solved(rows, f"{n}, drawn", cells) for n in ("first-hitting", "margin")}
    levels = [_solved(rows, "margin", 81 - g) for g in KNOB]
    rises = [harder - easier for easier, harder in itertools.pairwise(levels)]
    remasked, plain = (
        _solved(rows, n, 2 * cells, "constraints") for n in ("ReMDM cap 0.05", "ancestral")
    )
    return (
        (
            "share of boards solved, margin minus random order, one call a cell, above 0.1",
            margin - random,
            margin - random > 0.1,
        ),
        (
            "the same with drawn digits",
            drawn["margin"] - drawn["first-hitting"],
            drawn["margin"] - drawn["first-hitting"] > 0.1,
        ),
        (
            "share of constraints kept, margin minus ancestral, four cells a call, above 0",
            few["margin"] - few["ancestral"],
            few["margin"] > few["ancestral"],
        ),
        (
            "share of constraints kept, ReMDM minus ancestral, two calls a cell, above 0",
            remasked - plain,
            remasked > plain,
        ),
        (
            "the knob: share solved by the margin order never rises from 50 givens down to 30",
            max(rises),
            max(rises) <= 0,
        ),
    )
