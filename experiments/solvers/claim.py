"""Fast solvers side by side: who wins at 5, 6, 8, 10, 15 and 20 network calls.

Three models: the exact mixture of three Gaussians in the plane (16 starts; error to the exact flow, best
of three time grids), the digits model, and Fashion-MNIST where that data set is prepared
(`python -m diffusion_jax.data.prepare --name=fashion_mnist`). `fit_table` compares fitted tables with
these in a folder of its own.
"""

import importlib

import numpy as np

from diffusion_jax import evaluation
from diffusion_jax.data.tfds import find_prepared
from experiments.reproduce import run_name, trained
from experiments.solvers.comparison import (
    BASES,
    V3,
    Solver,
    best,
    equal_error_calls,
    on_a_model,
    on_the_mixture,
    select,
)

TITLE = "Fast solvers of the probability-flow ODE"
CLAIM = (
    "high-order solvers need a fraction of DDIM's network calls; DPM-Solver-v3 needs 15-30% fewer than "
    "DPM-Solver++ and UniPC for equal error at 5-10 calls"
)
CONFIGS = {"cpu": "configs.digits.score", "full": "configs.score_sde.cifar10_vp"}
_FASHION = "configs.images.fashion_mnist_small"
# On the larger images fewer rows, samples and seeds: a call there costs forty times as much.
_FEWER = (
    *(s for s in BASES if s.label != "DPM-Solver 3M"),
    Solver("DEIS tAB3", "deis_tab3", {"grid": "quadratic"}),
    Solver("EVODiff", "evodiff"),
    *V3[2:4],
)
# Best known on the mixture: DPM-Solver-v3 with corrector on the quadratic grid.
YARDSTICK = {5: 0.045, 6: 0.026, 8: 0.011, 10: 0.0055, 15: 0.0007, 20: 0.0004, 50: 0.00006}


def measure(options):
    """All rows, and the pictures beside `results.json`'s run folder."""
    rows = on_the_mixture()
    run = trained(options.config, options.workdir, run_name(CONFIGS[options.scale]))
    name = "digits" if options.scale == "cpu" else "CIFAR-10"
    rows += on_a_model(
        run,
        name,
        seeds=range(options.seeds),
        num=options.num or 1000,
        classifier=options.classifier,
    )
    if options.scale == "cpu" and find_prepared("fashion_mnist"):
        config = importlib.import_module(_FASHION).get_config()
        fashion = trained(config, options.workdir, run_name(_FASHION))
        rows += on_a_model(
            fashion,
            "Fashion-MNIST",
            _FEWER,
            seeds=range(min(options.seeds, 1)),
            num=options.num or 200,
            batch_size=100,
            reference_steps=100,
            statistics_options={"num": 128, "intervals": 60},
            classifier=options.workdir / "classifier_fashion_mnist.npz",
        )
    elif options.scale == "cpu":
        print("Fashion-MNIST is not prepared: only the mixture and the digits are compared")
    pictures(rows, options.workdir / "solvers")
    return rows


def mixture_curves(rows):
    """`sampler -> {nfe: rms}` on the mixture, each at its best grid for that number of calls."""
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["model"] == "mixture":
            curve = curves.setdefault(row["sampler"], {})
            curve[row["nfe"]] = min(row["rms"], curve.get(row["nfe"], np.inf))
    return curves


def models(rows):
    """Names of the trained models, in order."""
    return [m for m in dict.fromkeys(row["model"] for row in rows) if m != "mixture"]


def _without_reference(curves):
    return {k: v for k, v in curves.items() if not k.startswith("exact flow")}


def pictures(rows, folder):
    """`mixture.png` and, for each model, `<model>_rms.png` and `<model>_frechet.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {("mixture", "rms"): mixture_curves(rows)}
    for model in models(rows):
        for figure in ("rms", "frechet"):
            plots[model, figure] = _without_reference(select(rows, model, figure))
    for (model, figure), curves in plots.items():
        lines = {k: (np.array(list(v)), np.array(list(v.values()))) for k, v in curves.items()}
        label = {"rms": "RMS distance to the exact flow", "frechet": "Frechet distance"}[figure]
        picture = evaluation.error_versus_nfe(lines, title=model, y_label=label, slopes=False)
        name = model if model == "mixture" else f"{model}_{figure}"
        evaluation.save_png(folder / f"{name.lower().replace('-', '_')}.png", picture)


def report(rows) -> str:
    """A table a model and figure, calls as columns, and who wins at each."""
    parts = []
    for model, figure, curves in (
        ("mixture", "RMS, each at its best grid", mixture_curves(rows)),
        *(
            (m, title, select(rows, m, figure))
            for m in models(rows)
            for figure, title in (
                ("rms", "RMS to the exact flow"),
                ("frechet", "Frechet distance"),
                ("texture", "texture distance"),
            )
        ),
    ):
        compared = _without_reference(curves)
        calls = sorted({n for c in compared.values() for n in c})
        table = [{"sampler": k} | {str(n): v.get(n) for n in calls} for k, v in compared.items()]
        table.append(
            {"sampler": "lowest"} | {str(n): best(compared, compared, n)[1] for n in calls}
        )
        exact = [v for k, c in curves.items() if k not in compared for v in c.values() if v]
        own = f" (the exact flow's own: {exact[0]:.3g})" if exact else ""
        parts.append(f"**{model}: {figure}{own}**\n\n")
        parts.append(evaluation.markdown_table(table, ["sampler", *map(str, calls)]) + "\n")
    return "".join(parts)


def calls_saved(curves, ours, others, calls=(5, 6, 8, 10)):
    """Calls of the best of `others` for the error that the best of `ours` has, over ours, a mean."""
    shares = []
    for n in calls:
        error, _ = best(curves, ours, n)
        rival = min(equal_error_calls(curves[o], error) for o in others if o in curves)
        shares.append(n / rival if np.isfinite(rival) else n / max(max(c) for c in curves.values()))
    return float(np.mean(shares))


def verdicts(rows):
    """`(statement, measured, holds)`."""
    v3 = [s.label for s in V3 if s.label != "v3, published flags"]
    rivals = ["DPM-Solver++ 2M", "DPM-Solver++ 3M", "UniPC-2", "UniPC-3"]
    mixture = mixture_curves(rows)
    out = []
    for n, known in YARDSTICK.items():
        error, _ = best(mixture, v3, n)
        out.append(
            (f"mixture, v3 at {n} calls: RMS at most 1.05 x {known}", error, error <= 1.05 * known)
        )
    share = calls_saved(mixture, v3, rivals)
    out.append(
        (
            "mixture: v3's calls over those of 2M, 3M, UniPC for equal error, at most 0.85",
            share,
            share <= 0.85,
        )
    )
    for model in models(rows):
        for figure in ("rms", "frechet"):
            curves = select(rows, model, figure)
            share = calls_saved(curves, v3, rivals)
            out.append((f"{model}: the same share by {figure}, at most 0.85", share, share <= 0.85))
        curves = select(rows, model, "frechet")
        fast, slow = best(curves, rivals, 10), curves["DDIM"][20]
        out.append(
            (
                f"{model}: Frechet distance, best of {', '.join(rivals)} at 10 over DDIM at 20, below 1",
                fast[0] / slow,
                fast[0] < slow,
            )
        )
    return tuple(out)
