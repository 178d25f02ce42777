"""Fitted tables (`diffusion_jax.samplers.fit_table`), own method: a solver fitted to the model it serves.

Every fit sees starts of its own; errors are measured on other ones: on the mixture on the 16 fixed starts
of `experiments.solvers` and on fresh ones, on the trained model from the noise that all solvers share.
The solvers of the literature stand at their best time grid for each number of calls. The fitted tables
are written to `<workdir>/fit_table/`, to be read with `samplers.load_table`.

What does not hold on the digits model: a lower Frechet distance. Fitted tables reach that of the exact flow
(about 1.0); the errors of some other solvers happen to move samples below it, which a fit to the flow
undoes. So the verdicts also say how far each is from the flow's own Frechet distance.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import run as runs
from diffusion_jax.evaluation.quality import ImageQuality
from diffusion_jax.oracles import GaussianMixture
from diffusion_jax.samplers import dpm_solver_pp, fit_table, sample, save_table
from experiments.reproduce import run_name, trained
from experiments.solvers.claim import YARDSTICK
from experiments.solvers.comparison import (
    V3,
    Solver,
    at_the_best_grid,
    distance,
    mixture,
    on_a_model,
    on_the_mixture,
    rms,
    select,
)

TITLE = "Fitted tables (own method)"
CLAIM = (
    "a table fitted to its model is more exact than the best solver known, several times over on the "
    "mixture; on a trained model it about halves the error at few calls"
)
CONFIGS = {"cpu": "configs.digits.score", "full": "configs.score_sde.cifar10_vp"}
_LABEL = "fitted"
_MIXTURE_CALLS = (5, 6, 8, 10, 15, 20, 50)
_MODEL_CALLS = (5, 6, 8, 10)
_RIVALS = (
    Solver("DDIM", "ddim"),
    Solver("DPM-Solver++ 2M", "dpmpp_2m"),
    Solver("DPM-Solver++ 3M", "dpmpp_3m"),
    Solver("UniPC-3", "unipc_3"),
    Solver("DEIS tAB3", "deis_tab3"),
    *V3[2:4],
)
_GRIDS = ("log_snr", "quadratic")


def _exact(process, t_end):
    return dpm_solver_pp(
        process, 600, order=3, exact_d2=True, grid="log_snr", t_start=1.0, t_end=t_end
    )


def _other_mixture(process):
    """Five narrower components, to see that the method and not the mixture is tuned."""
    rng = np.random.default_rng(7)
    roots = 0.25 * rng.standard_normal((5, 2, 2))
    covariances = roots @ roots.transpose(0, 2, 1) + 0.01 * np.eye(2)
    return GaussianMixture(process, np.full(5, 0.2), 1.2 * rng.standard_normal((5, 2)), covariances)


def _spread(rows):
    """Rows of several seeds as one: mean, and standard deviation under `<figure>_std`."""
    out = {}
    for figure in rows[0]:
        values = [row[figure] for row in rows]
        out[figure] = float(np.mean(values))
        if figure != "seconds":
            out[f"{figure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return out


def _fit_the_mixture(seeds, folder):
    """`rms` on the 16 starts, `rms_fresh` on 2,000 others (and without the worst hundredth of them)."""
    process, model, starts, ends = mixture()
    rows = []
    with jax.enable_x64(True):
        fresh = jax.random.normal(jax.random.key(1000), (2000, 2), np.float64)
        targets = {}
        for name, each in (("mixture", model), ("other mixture", _other_mixture(process))):
            targets[name] = np.asarray(sample(_exact(process, 1e-3), each, None, fresh))
            calls = _MIXTURE_CALLS if name == "mixture" else (5, 10, 20)
            for nfe in calls:
                measured = []
                for seed in seeds if nfe <= 15 else seeds[:1]:  # longer tables take minutes to fit
                    key = jax.random.key(seed)
                    x = jax.random.normal(jax.random.fold_in(key, 1), (2000, 2), np.float64)
                    table, report = fit_table(
                        process, each, key, x, nfe=nfe, steps=30 if nfe == 50 else 60
                    )
                    squares = (np.asarray(sample(table, each, None, fresh)) - targets[name]) ** 2
                    ordered = np.sort(squares.sum(axis=1))
                    row = {
                        "rms_fresh": float(np.sqrt(ordered.mean())),
                        "rms_fresh_99": float(np.sqrt(ordered[:-20].mean())),
                        "rms_start": report.start_held_out * np.sqrt(2.0),
                        "seconds": report.seconds,
                    }
                    if name == "mixture":
                        end = sample(table, each, None, jnp.asarray(starts))
                        row = {"rms": distance(end, ends), **row}
                    measured.append(row)
                    if name == "mixture" and seed == 0:
                        save_table(folder / f"mixture_{nfe}.npz", process, table)
                rows.append({"model": name, "sampler": _LABEL, "nfe": nfe, **_spread(measured)})
                print(rows[-1], flush=True)
    return rows


def _fit_the_model(run, model, seeds, num, classifier, folder):
    """Figures of the tables fitted to a run, from the noise and against the flow `on_a_model` uses."""
    process, count = run.method.process, 256
    batch = runs.conditions(run, count)
    denoise = jax.tree_util.Partial(run.method.denoiser, run.params)
    train = run.source("train")
    every = train.take(np.arange(len(train)))
    quality = ImageQuality(
        runs.as_images(run.spec, every[run.spec.kind]),
        every["label"],
        jax.random.key(0),
        cache=classifier,
    )
    exact = dpm_solver_pp(process, 300, order=3, exact_d2=True)
    conditions, rows = runs.conditions(run, num), []
    references = {
        seed: runs.draw(run, conditions, jax.random.key(seed), sampler=exact, batch_size=500)
        for seed in seeds
    }
    for nfe in _MODEL_CALLS:
        measured = []
        for seed in seeds:
            key = jax.random.key(10_000 + seed)  # starts that no sample is drawn from
            x = process.prior(key, (count, *run.spec.shape))
            table, report = fit_table(
                process, denoise, key, x, nfe=nfe, batch=batch, steps=15, patience=5
            )
            drawn = runs.draw(run, conditions, jax.random.key(seed), sampler=table, batch_size=500)
            figures = {"rms": rms(drawn, references[seed]), **quality.distances(drawn)}
            figures |= {"rms_start": report.start_held_out, "seconds": report.seconds}
            measured.append(figures)
            if seed == 0:
                save_table(folder / f"{model}_{nfe}.npz", process, table)
        rows.append({"model": model, "sampler": _LABEL, "nfe": nfe, **_spread(measured)})
        print(rows[-1], flush=True)
    return rows


def measure(options):
    """Rows of the fitted tables and of the solvers they are compared with."""
    folder, seeds = options.workdir / "fit_table", range(options.seeds)
    folder.mkdir(parents=True, exist_ok=True)
    rows = _fit_the_mixture(seeds, folder)
    rows += at_the_best_grid(on_the_mixture(_RIVALS, _MIXTURE_CALLS, _GRIDS))
    run = trained(options.config, options.workdir, run_name(CONFIGS[options.scale]))
    model = "digits" if options.scale == "cpu" else "cifar10"
    num = options.num or 1000
    rows += _fit_the_model(run, model, seeds, num, options.classifier, folder)
    found = [
        row
        for grid in _GRIDS
        for row in on_a_model(
            run,
            model,
            _RIVALS,
            _MODEL_CALLS,
            seeds=seeds,
            num=num,
            classifier=options.classifier,
            options={"grid": grid},
        )
    ]
    return rows + at_the_best_grid(found)


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    out = []
    ours = select(rows, "mixture")[_LABEL]
    for nfe, known in YARDSTICK.items():
        ratio = ours[nfe] / known
        out.append((f"mixture, {nfe} calls, fitted over best known, below 1", ratio, ratio < 1))
    model = next(m for m in (row["model"] for row in rows) if "mixture" not in m)
    for figure in ("rms", "frechet"):
        curves = select(rows, model, figure)
        for nfe in _MODEL_CALLS:
            rivals = {k: v[nfe] for k, v in curves.items() if k != _LABEL and nfe in v}
            rival = min(rivals, key=rivals.get)
            ratio = curves[_LABEL][nfe] / rivals[rival]
            what = f"{model}, {figure} at {nfe} calls, fitted over {rival}, below 1"
            out.append((what, ratio, ratio < 1))
    curves = select(rows, model, "frechet")
    flow = next(k for k in curves if k.startswith("exact flow"))
    exact = next(iter(curves[flow].values()))
    for nfe in _MODEL_CALLS:
        gaps = {k: abs(v[nfe] - exact) for k, v in curves.items() if nfe in v}
        rival = min((k for k in gaps if k != _LABEL), key=gaps.get)
        ratio = gaps[_LABEL] / gaps[rival]
        what = f"{model}, frechet at {nfe} calls, gap to the flow's, fitted over {rival}, below 1"
        out.append((what, ratio, ratio < 1))
    return tuple(out)
