"""Shows a paper's headline claim again: `python -m experiments.reproduce <paper> [--scale=cpu|full]`.

Trains the paper's config (or goes on with a run that stands), samples it with the samplers that the
claim compares, over several seeds, and prints claim, measured figures and verdict; `results.json` in
the paper's folder holds the rows. `--scale=cpu` is the small twin that two cores can train in minutes,
`--scale=full` the paper's own config.
"""

import argparse
import importlib
import pathlib
import pkgutil
import statistics
import sys

import experiments
from diffusion_jax import evaluation, judge
from diffusion_jax import run as runs
from diffusion_jax.registry import closest
from diffusion_jax.training.runfolder import versions

FIGURES = ("frechet", "accuracy", "texture", "psnr_gain", "seconds_per_1000")


def papers() -> list[str]:
    """The papers that can be shown: folders of `experiments` with a module `claim`."""
    found = []
    for module in pkgutil.iter_modules(experiments.__path__):
        folder = pathlib.Path(experiments.__path__[0]) / module.name
        if module.ispkg and (folder / "claim.py").is_file():
            found.append(module.name)
    return found


def label(sampler) -> str:
    """How a row is called: the name and options of a sampler, without the number of calls."""
    options = [f"{k}={v}" for k, v in sampler.items() if k not in ("name", "nfe")]
    return " ".join([sampler["name"], *options])


def measure(run, samplers, seeds, cache):
    """One row a sampler: mean and standard deviation over the seeds of every figure."""
    judged = []
    for seed in seeds:
        print(f"== seed {seed}", flush=True)
        judged.append(
            judge.judge(run, samplers=tuple(samplers), seed=seed, judge_seed=0, cache=cache)
        )
    rows = []
    for i, name in enumerate(row["sampler"] for row in judged[0]["rows"]):
        same = [result["rows"][i] for result in judged]
        row = {"sampler": label(samplers[i]) if i < len(samplers) else name, "nfe": same[0]["nfe"]}
        for figure in FIGURES:
            values = [r[figure] for r in same if r.get(figure) is not None]
            if values:
                row[figure] = statistics.mean(values)
                row[f"{figure}_std"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows


def pick(rows, sampler, nfe, figure="frechet"):
    """The mean figure of one row.

    Raises:
      KeyError: no such row.
    """
    for row in rows:
        if (row["sampler"], row["nfe"]) == (sampler, nfe):
            return row[figure]
    raise KeyError(f"no row {sampler} {nfe}")


def main(argv=None) -> int:
    """Runs the comparison; returns 0 if every claim holds."""
    parser = argparse.ArgumentParser(
        "python -m experiments.reproduce", description=__doc__.split("\n")[0]
    )
    parser.add_argument("paper", help=f"one of {', '.join(papers())}")
    parser.add_argument("--scale", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--workdir", default="runs/reproduce", help="where runs are kept")
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds")
    parser.add_argument(
        "--num", type=int, help="samples a seed (default: as many as held-out data)"
    )
    parser.add_argument("--out", help="results file (default: in the paper's folder)")
    arguments = parser.parse_args(argv)
    if arguments.paper not in papers():
        parser.error(f"unknown paper {arguments.paper!r}{closest(arguments.paper, papers())}")
    claim = importlib.import_module(f"experiments.{arguments.paper}.claim")
    config = importlib.import_module(claim.CONFIGS[arguments.scale]).get_config()
    if arguments.num:
        config.evaluate.num = arguments.num
    folder = pathlib.Path(arguments.workdir)
    workdir = folder / claim.CONFIGS[arguments.scale].replace("configs.", "").replace(".", "_")
    print(f"{claim.TITLE}\nclaim: {claim.CLAIM}", flush=True)
    runs.train_run(config, workdir)
    run = runs.open_run(workdir)
    rows = measure(run, claim.SAMPLERS, range(arguments.seeds), folder / "classifier.npz")
    verdicts = [
        {"statement": what, "measured": measured, "holds": bool(holds)}
        for what, measured, holds in claim.verdicts(rows)
    ]
    print(evaluation.markdown_table(rows, ["sampler", "nfe", *_columns(rows)]))
    print(evaluation.markdown_table(verdicts, ["statement", "measured", "holds"]))
    home = pathlib.Path(experiments.__path__[0]) / arguments.paper
    out = pathlib.Path(arguments.out) if arguments.out else home / "results.json"
    evaluation.write_json(
        out,
        {
            "claim": claim.CLAIM,
            "scale": arguments.scale,
            "config": claim.CONFIGS[arguments.scale],
            "step": run.step,
            "seeds": arguments.seeds,
            "rows": rows,
            "verdicts": verdicts,
            "versions": versions(),
        },
    )
    print(f"written: {out}")
    return 0 if all(v["holds"] for v in verdicts) else 1


def _columns(rows):
    return [f for figure in FIGURES for f in (figure, f"{figure}_std") if figure in rows[0]]


if __name__ == "__main__":
    sys.exit(main())
