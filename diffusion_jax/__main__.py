"""`python -m diffusion_jax`: train, sample, evaluate, likelihood, statistics, inspect, list, doctor.

Mistakes of the user end in one line on standard error and exit status 2; `--debug` shows the traceback.
"""

import argparse
import importlib.util
import json
import logging
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

_DESCRIPTION = "Score, bridge and discrete diffusion models in JAX."
_EPILOG = """examples:
  python -m diffusion_jax train    --config=configs/digits/score.py --workdir=runs/score
  python -m diffusion_jax train    --config=configs/digits/score.py --workdir=runs/short \\
                                   --config.train.steps=200 --config.method.sampler=ddim
  python -m diffusion_jax sample   --workdir=runs/score --num=64 --sampler=dpmpp_2m --nfe=10 --out=grid.png
  python -m diffusion_jax evaluate --workdir=runs/score
  python -m diffusion_jax likelihood --workdir=runs/score --num=100
  python -m diffusion_jax statistics --workdir=runs/score
  python -m diffusion_jax inspect  --config=configs/digits/score.py
  python -m diffusion_jax list     samplers
  python -m diffusion_jax doctor
"""


class UsageError(ValueError):
    """A mistake on the command line."""


def load_config(arguments: Sequence[str]):
    """A config from `--config=FILE[:argument]` and overrides `--config.section.field=value`.

    Raises:
      UsageError: no file, a file without `get_config`, an unknown field, a value of the wrong type.
    """
    from absl import flags
    from ml_collections import config_flags

    from diffusion_jax.registry import closest

    values, line = flags.FlagValues(), ["diffusion_jax", *arguments]
    config_flags.DEFINE_config_file("config", None, "the config", flag_values=values, sys_argv=line)
    path = next((a.split("=", 1)[1] for a in arguments if a.startswith("--config=")), "")
    file = pathlib.Path(path.split(":", 1)[0])
    if path and not file.is_file():
        near = sorted(
            p.as_posix() for p in pathlib.Path("configs").glob("*/*.py") if p.stem[0] != "_"
        )
        raise UsageError(f"no config file {str(file)!r}{closest(str(file), near)}")
    try:
        values(line)
        config = values.config
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
        raise UsageError(_config_message(error, arguments, file)) from error
    if config is None:
        raise UsageError("--config=FILE is missing")
    return config


def _config_message(error: Exception, arguments: Sequence[str], file: pathlib.Path) -> str:
    """Which override is at fault, and the fields there are."""
    from ml_collections import ConfigDict

    from diffusion_jax.registry import closest

    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    node: Any = module.get_config() if hasattr(module, "get_config") else None
    for argument in arguments:
        if not argument.startswith("--config."):
            continue
        name = argument[2:].split("=", 1)[0]
        here = node
        for part in name.split(".")[1:]:
            if not isinstance(here, ConfigDict) or part not in here:
                valid = list(here.keys()) if isinstance(here, ConfigDict) else []
                return f"unknown config field {name!r}{closest(part, valid)}"
            here = here[part]
    return f"config: {' '.join(str(error).split())}"


def _pairs(options: Sequence[str]) -> dict[str, Any]:
    """`name=value` options of a sampler; values are JSON where they parse, text otherwise."""
    out = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not separator or not name:
            raise UsageError(f"--option takes name=value, got {option!r}")
        try:
            out[name] = json.loads(value)
        except json.JSONDecodeError:
            out[name] = value
    return out


def _need_workdir(path: str) -> pathlib.Path:
    workdir = pathlib.Path(path)
    if not workdir.is_dir():
        raise UsageError(f"no run folder {path!r}; train one with: python -m diffusion_jax train")
    return workdir


def _sampler(run, arguments):
    """The sampler asked for on the command line, or None for the run's own."""
    options = _pairs(arguments.option)
    if arguments.sampler is None and arguments.nfe is None and not options:
        return None
    from diffusion_jax.run import build_sampler

    return build_sampler(run, arguments.sampler, arguments.nfe, **options)


def command_train(arguments, rest) -> int:
    config = load_config(rest)
    from diffusion_jax import run as runs
    from diffusion_jax.training import NonFiniteError

    try:
        result = runs.train_run(
            config,
            arguments.workdir,
            accept_changes=arguments.accept_changes,
            fallback=arguments.fallback,
        )
    except NonFiniteError as error:
        print(f"diffusion_jax: {error}", file=sys.stderr)
        return 3
    print(f"{result.status} after {result.step} steps: {arguments.workdir}")
    if result.metrics:
        print(", ".join(f"{k} {v:.4g}" for k, v in result.metrics.items()))
    return 0


def command_sample(arguments, rest) -> int:
    _refuse(rest)
    workdir, out = _need_workdir(arguments.workdir), pathlib.Path(arguments.out)
    if out.suffix not in (".png", ".npz", ".txt"):
        raise UsageError(f"--out must end in .png, .npz or .txt, got {arguments.out!r}")
    if arguments.trajectory and out.suffix != ".png":
        raise UsageError("--trajectory draws a strip: --out must end in .png")
    import jax
    import numpy as np

    from diffusion_jax import __version__, evaluation
    from diffusion_jax import run as runs

    run = runs.open_run(workdir, arguments.weights, arguments.step)
    sampler = _sampler(run, arguments) or run.method.default_sampler
    batch = runs.conditions(run, arguments.num, label=arguments.label)
    textual = run.spec.show in ("text", "bytes")
    if (out.suffix == ".txt") and not textual:
        raise UsageError(
            f"the model makes {run.spec.kind}, not text: --out must end in .png or .npz"
        )
    drawn = runs.draw(
        run,
        batch,
        jax.random.key(arguments.seed),
        sampler=sampler,
        batch_size=arguments.batch_size,
        progress=True,
        trajectory=arguments.trajectory,
    )
    samples, path = drawn if arguments.trajectory else (drawn, None)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, samples=samples, **{k: v for k, v in batch.items() if k != "index"})
    elif textual:
        texts = run.spec.decode(samples)
        if out.suffix == ".txt":
            out.write_text("\n".join(texts) + "\n")
        else:
            evaluation.save_png(out, evaluation.text_image(texts))
    elif run.spec.show is None:
        raise UsageError("the model makes points, not pictures: --out must end in .npz")
    elif arguments.trajectory:
        evaluation.save_png(out, runs.strip_of(run.spec, path[:, :8]))
    else:
        evaluation.save_png(out, runs.grid_of(run.spec, samples, batch))
    evaluation.write_json(
        out.with_name(out.name + ".json"),
        {
            "sampler": sampler.name,
            "nfe": sampler.nfe,
            "times": np.asarray(sampler.times),
            "options": _pairs(arguments.option),
            "num": arguments.num,
            "seed": arguments.seed,
            "workdir": str(workdir),
            "step": run.step,
            "weights": run.weights,
            "checksum": runs.checksum(run.params),
            "version": __version__,
        },
    )
    print(f"{arguments.num} samples, {sampler.name}, {sampler.nfe} network calls: {out}")
    return 0


def command_evaluate(arguments, rest) -> int:
    _refuse(rest)
    workdir = _need_workdir(arguments.workdir)
    from diffusion_jax import evaluation
    from diffusion_jax import run as runs
    from diffusion_jax.judge import judge, table

    run = runs.open_run(workdir, arguments.weights, arguments.step)
    overrides: dict[str, Any] = {}
    if arguments.sampler or arguments.nfe or arguments.option:
        name = arguments.sampler or run.method.default_sampler.name
        chosen = {"name": name, **_pairs(arguments.option)}
        overrides["samplers"] = [chosen | ({"nfe": arguments.nfe} if arguments.nfe else {})]
    if arguments.num:
        overrides["num"] = arguments.num
    result = judge(run, **overrides)
    report = {k: result[k] for k in ("rows", "likelihood")}
    report |= {"step": run.step, "weights": run.weights, "checksum": runs.checksum(run.params)}
    evaluation.write_json(workdir / "evaluation.json", report)
    print(table(result["rows"]))
    if result["likelihood"]:
        print(", ".join(f"{k} {v:.4g}" for k, v in result["likelihood"].items()))
    print(f"written: {workdir / 'evaluation.json'}")
    return 0


def command_likelihood(arguments, rest) -> int:
    _refuse(rest)
    workdir = _need_workdir(arguments.workdir)
    out = None if arguments.out is None else pathlib.Path(arguments.out)
    if out is not None and out.suffix != ".npz":
        raise UsageError(f"--out must end in .npz, got {arguments.out!r}")
    from diffusion_jax.samplers.probability_flow import SOLVERS

    if arguments.sampler is not None:
        raise UsageError(
            f"--sampler={arguments.sampler!r} has no likelihood: samplers take fixed steps, or draw noise."
            " The likelihood is that of the probability-flow ODE; choose its --solver:"
            f" {', '.join(sorted(SOLVERS))}"
        )
    import jax
    import numpy as np

    from diffusion_jax import __version__, evaluation
    from diffusion_jax import run as runs

    run = runs.open_run(workdir, arguments.weights, arguments.step)
    options = {name: getattr(arguments, name) for name in _LIKELIHOOD}
    found, report = evaluation.score_run(
        run, jax.random.key(arguments.seed), num=arguments.num, progress=True, **options
    )
    report |= {"seed": arguments.seed, "step": run.step, "weights": run.weights}
    report |= {"checksum": runs.checksum(run.params), "version": __version__}
    evaluation.write_json(workdir / "likelihood.json", report, nonfinite="null")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, latents=found.latents, log_p=found.log_p)
    print(
        f"{found.bits_per_dim:.4f} bits per dimension, standard error {found.standard_error:.4f}:"
        f" {report['num']} held-out examples of {report['levels']} levels"
    )
    if arguments.draws > 1:
        print(f"{found.importance_bits:.4f} with {arguments.draws} draws importance-weighted")
    print(
        f"{found.nfe} network calls ({found.nfe_mean:.1f} an example), round trip within"
        f" {found.round_trip:.1e}"
    )
    print(f"written: {workdir / 'likelihood.json'}{'' if out is None else f', {out}'}")
    return 0


_LIKELIHOOD = (
    "divergence",
    "probes",
    "noise",
    "dequantisation",
    "draws",
    "levels",
    "batch_size",
    "solver",
    "rtol",
    "atol",
    "max_steps",
)


def command_statistics(arguments, rest) -> int:
    _refuse(rest)
    workdir = _need_workdir(arguments.workdir)
    out = workdir / "statistics.npz" if arguments.out is None else pathlib.Path(arguments.out)
    if out.suffix != ".npz":
        raise UsageError(f"--out must end in .npz, got {arguments.out!r}")
    from diffusion_jax import run as runs

    begin = time.perf_counter()
    run = runs.open_run(workdir, arguments.weights, arguments.step)
    names = ("num", "intervals", "seed", "batch_size", "probes", "t_start", "t_end")
    options = {name: getattr(arguments, name) for name in names}
    statistics = runs.measure_statistics(run, progress=True, **options)
    out.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(out)
    lam, l, s = statistics.lam, statistics.l, statistics.s
    print(
        f"{statistics.num} examples, lam {lam[0]:.2f} to {lam[-1]:.2f} in {statistics.intervals} "
        f"intervals: mean l {l[0].mean():.4f} to {l[-1].mean():.4f}, mean s {s[0].mean():.3f} to "
        f"{s[-1].mean():.3f}; {time.perf_counter() - begin:.0f} s: {out}"
    )
    return 0


def command_inspect(arguments, rest) -> int:
    config = load_config(rest)
    from diffusion_jax import builder
    from diffusion_jax import run as runs
    from diffusion_jax.data.pipeline import Pipeline
    from diffusion_jax.training import Trainer
    from diffusion_jax.training.report import summary

    options, data_options = runs.train_config(config)
    source = builder.build_data(config, "train")
    built = builder.build_method(config, source.spec)
    print(config)
    print(f"data: {len(source)} examples of {source.spec.kind}")
    for name, element in source.spec.elements.items():
        print(f"  {name}: {element.dtype} {list(element.shape)}")
    pipeline = Pipeline(source, options.batch_size, options.seed, **data_options)
    trainer = Trainer(built.method, pipeline.batch(0), options)
    print(summary(trainer.report))
    sampler = built.method.default_sampler
    print(f"sampler: {sampler.name}, {sampler.nfe} network calls a sample")
    return 0


_LISTS = {
    "processes": "process",
    "schedules": "schedule",
    "samplers": "sampler",
    "time_grids": "time_grid",
    "networks": "network",
    "methods": "method",
    "weightings": "weighting",
    "times": "times",
    "data": "data",
}


def command_list(arguments, rest) -> int:
    _refuse(rest)
    from diffusion_jax import registry

    if arguments.what not in (None, "papers", *_LISTS):
        raise UsageError(
            f"unknown list {arguments.what!r}{registry.closest(arguments.what, [*_LISTS, 'papers'])}"
        )
    for title, kind in _LISTS.items():
        if arguments.what not in (None, title):
            continue
        print(f"{title}:")
        for name in registry.names(kind):
            found = registry.entry(kind, name)
            meta = " ".join(f"{k}={v}" for k, v in found.meta.items() if v is not None)
            summary = (found.build.__doc__ or "").strip().split("\n")[0]
            print(f"  {name:18s} {summary}  [{meta}]" if meta else f"  {name:18s} {summary}")
    if arguments.what in (None, "papers"):
        print("papers:")
        for paper, used in sorted(_papers().items()):
            print(f"  arXiv {paper}: {', '.join(used)}")
    return 0


def _papers() -> dict[str, list[str]]:
    from diffusion_jax import registry

    papers: dict[str, list[str]] = {}
    for kind in _LISTS.values():
        for name in registry.names(kind):
            paper = registry.entry(kind, name).meta.get("paper")
            if paper:
                papers.setdefault(paper, []).append(f"{kind} {name}")
    return papers


def command_doctor(arguments, rest) -> int:
    _refuse(rest)
    from diffusion_jax.doctor import examine

    return examine()


def _refuse(rest: Sequence[str]) -> None:
    if rest:
        raise UsageError(f"unknown argument {rest[0]!r}; see --help")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m diffusion_jax",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def add(name, run, text):
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.add_argument("--debug", action="store_true", help="show tracebacks")
        made.set_defaults(run=run)
        return made

    def add_sampling(made):
        made.add_argument("--sampler", help="a registered name (see: list samplers)")
        made.add_argument("--nfe", type=int, help="network calls to spend at most")
        made.add_argument(
            "--option",
            action="append",
            default=[],
            metavar="NAME=VALUE",
            help="an argument of the sampler, such as eta=0.5 or grid=karras; may be repeated",
        )
        made.add_argument(
            "--weights", help='"params" or "ema_<decay>" (default: the first average)'
        )
        made.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")

    configured = "--config=FILE is required; override fields with --config.section.field=value"
    train = add("train", command_train, f"train a config, or go on. {configured}")
    train.add_argument("--workdir", required=True, help="run folder; an existing run goes on")
    train.add_argument(
        "--accept_changes", action="store_true", help="resume although the config changed"
    )
    train.add_argument(
        "--fallback", action="store_true", help="resume from an older checkpoint if damaged"
    )
    sample = add("sample", command_sample, "draw samples from a run folder into a picture or file")
    sample.add_argument("--workdir", required=True, help="run folder")
    sample.add_argument("--num", type=int, default=64, help="number of samples (default 64)")
    sample.add_argument("--seed", type=int, default=0, help="sample i depends on seed and i alone")
    sample.add_argument("--label", type=int, help="one class for all (default: all in turn)")
    sample.add_argument("--batch_size", type=int, default=256, help="samples at a time")
    sample.add_argument("--out", required=True, help="file: .png, .npz, or .txt for text")
    sample.add_argument("--trajectory", action="store_true", help="draw how 8 samples come about")
    add_sampling(sample)
    evaluate = add("evaluate", command_evaluate, "judge a run against held-out data and noise")
    evaluate.add_argument("--workdir", required=True, help="run folder")
    evaluate.add_argument("--num", type=int, help="samples (default: as many as held-out examples)")
    add_sampling(evaluate)
    likelihood = add(
        "likelihood",
        command_likelihood,
        "bits per dimension of held-out images by the probability-flow ODE",
    )
    likelihood.add_argument("--workdir", required=True, help="run folder")
    likelihood.add_argument("--num", type=int, help="held-out examples (default: all)")
    likelihood.add_argument("--divergence", default="hutchinson", help="hutchinson or exact")
    likelihood.add_argument("--probes", type=int, default=1, help="of hutchinson, an example")
    likelihood.add_argument("--noise", default="rademacher", help="probes: rademacher or gaussian")
    likelihood.add_argument(
        "--dequantisation", default="centred", help="centred, tiled (arXiv 2011.13456) or none"
    )
    likelihood.add_argument("--draws", type=int, default=1, help="dequantisations an example")
    likelihood.add_argument("--levels", type=int, help="grey levels (default: found in the data)")
    likelihood.add_argument("--solver", default="dopri5", help="adaptive ODE solver")
    likelihood.add_argument("--rtol", type=float, default=1e-5, help="relative tolerance")
    likelihood.add_argument("--atol", type=float, default=1e-5, help="absolute tolerance")
    likelihood.add_argument("--max_steps", type=int, default=4096, help="steps tried at most")
    likelihood.add_argument("--seed", type=int, default=0, help="of noise and probes")
    likelihood.add_argument("--batch_size", type=int, default=100, help="examples at a time")
    likelihood.add_argument("--out", help="file .npz for latents and log densities")
    likelihood.add_argument("--sampler", help=argparse.SUPPRESS)
    likelihood.add_argument(
        "--weights", help='"params" or "ema_<decay>" (default: the first average)'
    )
    likelihood.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    statistics = add(
        "statistics",
        command_statistics,
        "measure the statistics of a run's model that --sampler=dpm_solver_v3 needs",
    )
    statistics.add_argument("--workdir", required=True, help="run folder")
    statistics.add_argument(
        "--num", type=int, default=512, help="training examples (default 512; papers: to 4096)"
    )
    statistics.add_argument("--intervals", type=int, default=120, help="of lam (default 120)")
    statistics.add_argument("--seed", type=int, default=0, help="of examples, noise and probes")
    statistics.add_argument("--batch_size", type=int, default=64, help="examples at a time")
    statistics.add_argument("--probes", type=int, default=1, help="random vectors an example")
    statistics.add_argument("--t_start", type=float, help="first time (default: the samplers')")
    statistics.add_argument("--t_end", type=float, help="last time (default: the samplers')")
    statistics.add_argument("--out", help="file .npz (default: statistics.npz in the run folder)")
    statistics.add_argument(
        "--weights", help='"params" or "ema_<decay>" (default: the first average)'
    )
    statistics.add_argument("--step", type=int, help="step of the checkpoint (default: the newest)")
    add("inspect", command_inspect, f"resolved config, shapes, cost; trains nothing. {configured}")
    lists = add("list", command_list, "names that configs and command lines take")
    lists.add_argument("what", nargs="?", help=f"one of {', '.join([*_LISTS, 'papers'])}")
    add("doctor", command_doctor, "versions, devices, optional packages, a self-test of seconds")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("diffusion_jax").setLevel(logging.INFO)
    try:
        return arguments.run(arguments, rest)
    except (ValueError, ImportError, OSError) as error:
        if arguments.debug:
            raise
        print(f"diffusion_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
