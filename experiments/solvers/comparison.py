"""Solvers side by side: error against network calls, on the exact mixture and on trained models.

Error is the root mean square distance to where the probability-flow ODE itself ends from the same noise:
of points in the plane on the mixture, per pixel on images; there also the Frechet distance of the samples
to the training data.
"""

import itertools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from diffusion_jax import processes
from diffusion_jax import run as runs
from diffusion_jax.evaluation.quality import ImageQuality
from diffusion_jax.oracles import GaussianMixture
from diffusion_jax.samplers import (
    build_sampler,
    dpm_solver,
    model_statistics,
    official_flags,
    sample,
)

CALLS = (5, 6, 8, 10, 15, 20)


class Solver(NamedTuple):
    """One row of a comparison: a registered sampler with options, under a label."""

    label: str
    name: str
    options: Mapping[str, Any] = {}
    statistics: bool = False


V3 = (
    Solver("v3, order 1", "dpm_solver_v3", {"order": 1, "corrector": False}, True),
    Solver("v3", "dpm_solver_v3", {"corrector": False}, True),
    Solver("v3, corrector", "dpm_solver_v3", {"corrector": True}, True),
    Solver(
        "v3, pseudo + corrector",
        "dpm_solver_v3",
        {"corrector": True, "predictor_pseudo": True},
        True,
    ),
    Solver("v3, order 2, corrector", "dpm_solver_v3", {"order": 2, "corrector": True}, True),
    Solver("v3, published flags", "dpm_solver_v3", {"flags": "published"}, True),
)
DUALFAST = (
    Solver("DualFast DDIM", "dualfast_ddim"),
    Solver("DualFast 2M", "dualfast_dpmpp_2m"),
    Solver("DualFast UniPC-2", "dualfast_unipc_2"),
)
BASES = (
    Solver("DDIM", "ddim"),
    Solver("DPM-Solver++ 2M", "dpmpp_2m"),
    Solver("DPM-Solver++ 3M", "dpmpp_3m"),
    Solver("DPM-Solver 3M", "dpm_3m"),
    Solver("UniPC-2", "unipc_2"),
    Solver("UniPC-3", "unipc_3"),
)
OTHERS = (
    Solver("DEIS tAB3", "deis_tab3", {"grid": "quadratic"}),
    Solver("EVODiff", "evodiff"),
    Solver("EDM Heun", "edm_heun", {"t_end": None}),
)
SOLVERS = (*BASES, *OTHERS, *DUALFAST, *V3)


def build(process, solver: Solver, nfe: int, statistics=None, **options):
    """The sampler of a row with exactly `nfe` calls, or None where it has no such number of calls."""
    options = {**solver.options, **options}
    if solver.statistics:
        options["statistics"] = statistics
        if options.pop("flags", None):
            options |= official_flags(nfe)
    try:
        sampler = build_sampler(process, solver.name, nfe, **options)
    except ValueError as error:
        if "too few" in str(error) or "at least" in str(error):
            return None
        raise
    return sampler if sampler.nfe == nfe else None


def rms(x, y) -> float:
    """Root mean square difference over all entries."""
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - np.asarray(y, np.float64)) ** 2)))


def distance(x, y) -> float:
    """Root mean square distance of points, `[B, D]` each: `sqrt(D)` times `rms`."""
    return rms(x, y) * float(np.sqrt(np.shape(x)[1]))


def mixture():
    """The mixture of three Gaussians, 16 starts, and where the exact flow carries them."""
    stored = np.load(pathlib.Path(__file__).parent / "mixture.npz")
    process = processes.VP()
    model = GaussianMixture(process, *(stored[k] for k in ("weights", "means", "covariances")))
    return process, model, stored["starts"], stored["ends"]


def on_the_mixture(
    solvers: Sequence[Solver] = SOLVERS,
    calls: Iterable[int] = (*CALLS, 50),
    grids: Sequence[str] = ("log_snr", "uniform", "quadratic"),
) -> list[dict[str, Any]]:
    """Rows `{"model", "sampler", "grid", "nfe", "rms"}` on the exact mixture, in float64."""
    process, model, starts, ends = mixture()
    rows = []
    with jax.enable_x64(True):
        statistics = None
        if any(s.statistics for s in solvers):
            data = np.asarray(model.sample(jax.random.key(1), 4096))
            own = {"intervals": 240, "exact_diagonal": True, "batch_size": 512}
            statistics = model_statistics(process, model, jax.random.key(2), data, **own)
        for solver in tqdm.tqdm(solvers, desc="mixture", disable=None):
            for grid in grids:
                if solver.options.get("grid", grid) != grid:
                    continue
                for nfe in calls:
                    sampler = build(process, solver, nfe, statistics, grid=grid)
                    if sampler is None:
                        continue
                    end = sample(sampler, model, None, jnp.asarray(starts))
                    row = {"model": "mixture", "sampler": solver.label, "grid": grid}
                    rows.append(row | {"nfe": nfe, "rms": distance(end, ends)})
    return rows


def on_a_model(
    run: runs.Run,
    model: str,
    solvers: Sequence[Solver] = SOLVERS,
    calls: Iterable[int] = CALLS,
    *,
    seeds: Iterable[int] = (0, 1, 2),
    num: int = 1000,
    batch_size: int = 500,
    classifier: pathlib.Path | None = None,
    options: Mapping[str, Any] | None = None,
    reference_steps: int = 300,
    statistics_options: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Rows of a trained image model: mean and deviation over the seeds of error and distances.

    All solvers of a seed start from the same noise. `options` are given to every solver,
    `statistics_options` to `run.measure_statistics`; the flow is that of `reference_steps` of a
    third-order solver.
    """
    process = run.method.process
    wanted = any(s.statistics for s in solvers)
    statistics = runs.measure_statistics(run, **(statistics_options or {})) if wanted else None
    built = {}
    for solver in solvers:
        for nfe in calls:
            given = {k: v for k, v in (options or {}).items() if k not in solver.options}
            sampler = build(process, solver, nfe, statistics, **given)
            if sampler is not None:
                built[solver.label, nfe] = sampler
    train = run.source("train")
    every = train.take(np.arange(len(train)))
    quality = ImageQuality(
        runs.as_images(run.spec, every[run.spec.kind]),
        every["label"],
        jax.random.key(0),
        cache=classifier,
    )
    exact = dpm_solver(process, reference_steps, order=3, exact_d2=True, **(options or {}))
    batch = runs.conditions(run, num)
    figures: dict[tuple, list[dict[str, float]]] = {label: [] for label in built}
    floor = []
    for seed in seeds:
        key = jax.random.key(seed)
        reference = runs.draw(run, batch, key, sampler=exact, batch_size=batch_size)
        floor.append(quality.distances(reference) | {"rms": 0.0})
        walk = tqdm.tqdm(built.items(), desc=f"{model}, seed {seed}", disable=None)
        for label, sampler in walk:
            drawn = runs.draw(run, batch, key, sampler=sampler, batch_size=batch_size)
            figures[label].append({"rms": rms(drawn, reference), **quality.distances(drawn)})
    figures[f"exact flow, {reference_steps} steps", exact.nfe] = floor
    rows = []
    for (label, nfe), measured in figures.items():
        row = {"model": model, "sampler": label, "nfe": nfe}
        for figure in measured[0]:
            values = [m[figure] for m in measured]
            row[figure] = float(np.mean(values))
            row[f"{figure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
    return rows


def at_the_best_grid(rows):
    """One row a solver and number of calls: every figure at the grid that is best for it."""
    found = {}
    for row in rows:
        own = found.setdefault((row["model"], row["sampler"], row["nfe"]), dict(row))
        own.pop("grid", None)
        for figure in ("rms", "frechet"):
            if figure in row and row[figure] < own[figure]:
                own |= {k: v for k, v in row.items() if k.startswith(figure)}
    return list(found.values())


def select(rows, model: str, figure: str = "rms", grid: str | None = None):
    """`sampler -> {nfe: figure}` of one model (and grid)."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["model"] == model and row.get("grid") == grid and figure in row:
            curves.setdefault(row["sampler"], {})[row["nfe"]] = row[figure]
    return curves


def best(curves: Mapping[str, Mapping[int, float]], names: Iterable[str], nfe: int):
    """`(figure, sampler)` of the lowest among the named curves at a number of calls."""
    return min((curves[n][nfe], n) for n in names if n in curves and nfe in curves[n])


def equal_error_calls(curve: Mapping[int, float], error: float) -> float:
    """Calls at which a curve first comes down to `error`, log-linear between its points.

    Infinite if it never does; the first number of calls if it is there already.
    """
    calls = sorted(curve)
    if curve[calls[0]] <= error:
        return float(calls[0])
    for first, second in itertools.pairwise(calls):
        high, low = curve[first], curve[second]
        if low <= error:
            share = np.log(high / error) / np.log(high / low)
            return float(np.exp(np.log(first) + share * np.log(second / first)))
    return float("inf")
