"""Shows a paper's headline claim again: `python -m experiments.reproduce <paper> [--scale=cpu|full]`.

Trains the paper's config (or goes on with a run that stands), samples it with the samplers that the
claim compares, over several seeds, and prints claim, measured figures and verdict; `results.json` in
the paper's folder holds the rows. `--scale=cpu` is the small twin that two cores can train in minutes,
`--scale=full` the paper's own config. `--config.section.field=value` changes fields of its configs.

A folder's module `claim` says TITLE, CLAIM, CONFIGS (scale -> config module), `verdicts(rows)`, and
either SAMPLERS, which are judged on the trained run, or `measure(options) -> rows` where the claim
needs another experiment than that; `report(rows)` may lay the table out in its own way. `results.md`
beside `results.json` is what was printed.
"""

import argparse
import dataclasses
import importlib
import pathlib
import pkgutil
import statistics
import sys
from typing import Any

import experiments
from diffusion_jax import builder, commands, evaluation, judge
from diffusion_jax import run as runs
from diffusion_jax.registry import closest
from diffusion_jax.training.runfolder import versions

FIGURES = ("frechet", "accuracy", "texture", "psnr_gain", "seconds_per_1000")


@dataclasses.dataclass(frozen=True)
class Options:
    """What a claim's `measure` is told.

    Attributes:
      scale: "cpu" or "full".
      config: the config of that scale.
      workdir: folder where runs are kept.
      seeds: number of sampling seeds.
      num: samples a seed, or None for the claim's own number.
      home: folder of the results, for pictures beside them.
      overrides: `--config.section.field=value` of the command, which `config` has had.
    """

    scale: str
    config: Any
    workdir: pathlib.Path
    seeds: int
    num: int | None
    home: pathlib.Path = pathlib.Path()
    overrides: tuple[str, ...] = ()

    def load(self, module: str, argument: str = ""):
        """The config of a module, with the command's overrides; `argument` is that of its function."""
        return load(module, self.overrides, argument)

    @property
    def classifier(self) -> pathlib.Path:
        """The file of the classifier that judges every run of one data set alike."""
        return self.workdir / f"classifier_{_data_name(self.config)}.npz"


def _data_name(config) -> str:
    named = ("dataset", "data", "name")  # pairs are named by the images they are made of
    return str(next(config.data[field] for field in named if field in config.data))


def load(module: str, overrides=(), argument: str = ""):
    """The config of a module with overrides. Raises `commands.UsageError` for one that does not fit."""
    found = importlib.import_module(module)
    if not overrides:
        return found.get_config(*([argument] if argument else []))
    file = f"{found.__file__}:{argument}" if argument else found.__file__
    return commands.load_config([f"--config={file}", *overrides])


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


def trained(config, workdir, name) -> runs.Run:
    """The run of a config in the folder `name`, trained as far as it is not."""
    runs.train_run(config, workdir / name)
    return runs.open_run(workdir / name)


def run_name(module: str) -> str:
    """The run folder of a config module."""
    return module.replace("configs.", "").replace(".", "_")


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
    arguments, rest = parser.parse_known_args(argv)
    overrides = tuple(value for value in rest if value.startswith("--config."))
    if len(overrides) < len(rest):
        parser.error(f"unrecognized arguments: {' '.join(v for v in rest if v not in overrides)}")
    if arguments.paper not in papers():
        parser.error(f"unknown paper {arguments.paper!r}{closest(arguments.paper, papers())}")
    claim = importlib.import_module(f"experiments.{arguments.paper}.claim")
    try:
        config = load(claim.CONFIGS[arguments.scale], overrides)
    except commands.UsageError as error:
        parser.error(str(error))
    if arguments.num:
        config.evaluate.num = arguments.num
    print(f"{claim.TITLE}\nclaim: {claim.CLAIM}", flush=True)
    home = pathlib.Path(experiments.__path__[0]) / arguments.paper
    out = pathlib.Path(arguments.out) if arguments.out else home / "results.json"
    options = Options(
        arguments.scale,
        config,
        pathlib.Path(arguments.workdir),
        arguments.seeds,
        arguments.num,
        out.parent,
        overrides,
    )
    if hasattr(claim, "measure"):
        try:
            rows = claim.measure(options)
        except builder.ConfigError as error:
            parser.error(str(error))
    else:
        module = claim.CONFIGS[arguments.scale]
        run = trained(config, options.workdir, run_name(module))
        rows = measure(run, claim.SAMPLERS, range(options.seeds), options.classifier)
    verdicts = [
        {"statement": what, "measured": measured, "holds": bool(holds)}
        for what, measured, holds in claim.verdicts(rows)
    ]
    every = list(dict.fromkeys(k for row in rows for k in row))
    table = (
        claim.report(rows) if hasattr(claim, "report") else evaluation.markdown_table(rows, every)
    )
    table += "\n" + evaluation.markdown_table(verdicts, ["statement", "measured", "holds"])
    print(table)
    evaluation.write_json(
        out,
        {
            "claim": claim.CLAIM,
            "scale": arguments.scale,
            "config": claim.CONFIGS[arguments.scale],
            "seeds": arguments.seeds,
            "num": arguments.num,
            "rows": rows,
            "verdicts": verdicts,
            "versions": versions(),
        },
    )
    header = f"# {claim.TITLE}\n\nClaim: {claim.CLAIM}.\n\n"
    asked = f"--scale={arguments.scale} --seeds={arguments.seeds}"
    asked += "" if arguments.num is None else f" --num={arguments.num}"
    header += f"`python -m experiments.reproduce {arguments.paper} {asked}`\n\n"
    out.with_suffix(".md").write_text(header + table)
    print(f"written: {out}")
    return 0 if all(v["holds"] for v in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
