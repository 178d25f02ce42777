"""Trains a score model, a bridge and a masked model on scikit-learn's digits and judges their samples.

    python -m experiments.demo --workdir=runs/demo

Writes into the work directory, for each family: the run folder, a grid of samples for each sampler and
a trajectory strip; and `metrics.json`, `table.md`, `overview.png`. A run that was interrupted goes on.
"""

import argparse
import pathlib
import sys
import time

import jax
import numpy as np

from configs.digits import bridge, masked, score
from diffusion_jax import evaluation, judge
from diffusion_jax import run as runs

FAMILIES = {"score": score, "bridge": bridge, "masked": masked}
SHOWN = 40  # samples in a grid
FOLLOWED = 6  # samples in a trajectory strip

# What the demo must show: (family, what, figure of a row or of the likelihood, least value).
CLAIMS = (
    ("score", "class accuracy of samples", lambda r: _worst(r, "accuracy"), 0.90),
    ("bridge", "PSNR gain over the source (dB)", lambda r: _worst(r, "psnr_gain"), 3.0),
    (
        "masked",
        "nats per pixel below an order-0 histogram",
        lambda r: r["likelihood"]["histogram"] - r["likelihood"]["nats_per_token"],
        0.3,
    ),
)


def _worst(result, figure):
    """The figure of the worst sampler: a claim must hold for every one that was run."""
    return min(row[figure] for row in result["rows"] if row["nfe"] and row.get(figure) is not None)


def _pictures(run, result, folder):
    """A grid for each sampler and a strip; returns the last grid."""
    batch = {k: v[:SHOWN] for k, v in result["batch"].items()}
    for name, samples in result["samples"].items():
        grid = runs.grid_of(run.spec, samples[:SHOWN], batch)
        evaluation.save_png(folder / f"{name.replace(' ', '_').replace('=', '')}.png", grid)
    few = {k: v[:FOLLOWED] for k, v in result["batch"].items()}
    _, path = runs.draw(run, few, jax.random.key(0), trajectory=True)
    strip = runs.strip_of(run.spec, path)
    evaluation.save_png(folder / "trajectory.png", strip)
    return grid, strip


def main(argv=None) -> int:
    """Runs the demo; returns 0 if every claim holds."""
    parser = argparse.ArgumentParser(
        "python -m experiments.demo", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--workdir", default="runs/demo", help="where everything is written")
    parser.add_argument(
        "--steps", type=int, help="training steps of each family (default: configs)"
    )
    arguments = parser.parse_args(argv)
    workdir, begin = pathlib.Path(arguments.workdir), time.perf_counter()
    rows, results, pictures = [], {}, []
    for family, module in FAMILIES.items():
        print(f"== {family}: training", flush=True)
        config = module.get_config()
        if arguments.steps:
            config.train.steps = arguments.steps
        start = time.perf_counter()
        runs.train_run(config, workdir / family)
        trained = time.perf_counter() - start
        print(f"== {family}: sampling and judging", flush=True)
        run = runs.open_run(workdir / family)
        result = judge.judge(run, cache=workdir / "classifier.npz")
        result["seconds"] = {"training": trained, "total": time.perf_counter() - start}
        pictures.append(_pictures(run, result, workdir / family))
        results[family] = result
        rows += [{"family": family, **row} for row in result["rows"]]
    evaluation.save_png(
        workdir / "overview.png", runs.stack([p for pair in pictures for p in pair])
    )
    claims = [
        {
            "family": family,
            "claim": what,
            "measured": float(figure(results[family])),
            "least": least,
        }
        for family, what, figure, least in CLAIMS
    ]
    for claim in claims:
        claim["verdict"] = "holds" if claim["measured"] >= claim["least"] else "does not hold"
    table = judge.table(rows)
    (workdir / "table.md").write_text(table)
    metrics = {
        family: {k: result[k] for k in ("rows", "likelihood", "seconds")}
        for family, result in results.items()
    }
    seconds = time.perf_counter() - begin
    evaluation.write_json(
        workdir / "metrics.json", {"families": metrics, "claims": claims, "seconds": seconds}
    )
    print(f"\n{table}")
    print(evaluation.markdown_table(claims, ["family", "claim", "measured", "least", "verdict"]))
    print(f"{seconds:.0f} s; pictures and metrics in {workdir}/ (start with overview.png)")
    return 0 if all(np.isfinite(c["measured"]) and c["verdict"] == "holds" for c in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
