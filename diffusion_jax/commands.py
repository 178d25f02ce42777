"""What each command of `python -m diffusion_jax` does: `(arguments, rest) -> exit status`.

`rest` are arguments the parser does not know: overrides of a config, or a mistake.
"""

import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any


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


def pairs(options: Sequence[str]) -> dict[str, Any]:
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


def need_workdir(path: str) -> pathlib.Path:
    """A run folder that is there. Raises UsageError."""
    workdir = pathlib.Path(path)
    if not workdir.is_dir():
        raise UsageError(f"no run folder {path!r}; train one with: python -m diffusion_jax train")
    return workdir


def chosen_sampler(run, arguments):
    """The sampler asked for on the command line, or None for the run's own."""
    options = pairs(arguments.option)
    if arguments.sampler is None and arguments.nfe is None and not options:
        return None
    from diffusion_jax.run import build_sampler

    return build_sampler(run, arguments.sampler, arguments.nfe, **options)


def run_command(arguments, rest) -> int:
    """The chosen command, as one of several processes where the command line says so."""
    names = ("coordinator", "num_processes", "process_id")
    given = {name: getattr(arguments, name, None) for name in names}
    heartbeat = getattr(arguments, "heartbeat", None)
    if not getattr(arguments, "distributed", False) and set(given.values()) == {None}:
        return arguments.run(arguments, rest)
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(names):
        raise UsageError(f"{', '.join(missing)} missing: the three describe a cluster together")
    from diffusion_jax.training.parallel import initialize_distributed
    from diffusion_jax.training.processes import guarded

    given["coordinator_address"] = given.pop("coordinator")
    given["heartbeat_timeout_seconds"] = heartbeat
    initialize_distributed({k: v for k, v in given.items() if v is not None} or True)
    with guarded():
        return arguments.run(arguments, rest)


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
    refuse(rest)
    workdir, out = need_workdir(arguments.workdir), pathlib.Path(arguments.out)
    if out.suffix not in (".png", ".npz", ".txt"):
        raise UsageError(f"--out must end in .png, .npz or .txt, got {arguments.out!r}")
    if arguments.trajectory and out.suffix != ".png":
        raise UsageError("--trajectory draws a strip: --out must end in .png")
    import jax
    import numpy as np

    from diffusion_jax import __version__, evaluation
    from diffusion_jax import run as runs
    from diffusion_jax.data.source import TEXTUAL

    run = runs.open_run(workdir, arguments.weights, arguments.step)
    sampler = chosen_sampler(run, arguments) or run.method.default_sampler
    prompts = _prompts(run.spec, arguments)
    batch = runs.conditions(run, arguments.num, label=arguments.label, prompts=prompts)
    textual = run.spec.show in TEXTUAL
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
    if jax.process_index():
        return 0  # the first process writes
    samples, path = drawn if arguments.trajectory else (drawn, None)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, samples=samples, **{k: v for k, v in batch.items() if k != "index"})
    elif textual:
        texts = run.spec.decode(samples)
        if out.suffix == ".txt":
            out.write_text("\n".join(texts) + "\n")
        elif run.spec.show == "notes":
            rolls = evaluation.piano_rolls(samples, run.spec.symbols)
            evaluation.save_png(out, evaluation.image_grid(rolls, columns=4))
        else:
            evaluation.save_png(out, evaluation.text_image(texts))
    elif run.spec.show is None:
        raise UsageError("the model makes points, not pictures: --out must end in .npz")
    elif arguments.trajectory:
        evaluation.save_png(out, runs.strip_of(run.spec, path[:, :8]))
    else:
        evaluation.save_png(out, runs.grid_of(run.spec, samples, batch))
    if run.spec.show == "mel" and out.suffix == ".png":
        speech = evaluation.speech
        folder = out.with_name(f"{out.stem}_wav")
        speech.write_waves(folder, samples, run.spec.audio, speech.captions(run.spec, batch))
        print(f"wav files by Griffin-Lim: {folder}")
    evaluation.write_json(
        out.with_name(out.name + ".json"),
        {
            "sampler": sampler.name,
            "nfe": sampler.nfe,
            "times": np.asarray(sampler.times),
            "options": pairs(arguments.option),
            "num": arguments.num,
            "seed": arguments.seed,
            "prompt": arguments.prompt or arguments.prompt_file,
            "workdir": str(workdir),
            "step": run.step,
            "weights": run.weights,
            "checksum": runs.checksum(run.params),
            "version": __version__,
        },
    )
    print(f"{arguments.num} samples, {sampler.name}, {sampler.nfe} network calls: {out}")
    return 0


def _prompts(spec, arguments):
    """The prompts asked for on the command line as tokens `[P, L]`, or None."""
    if arguments.prompt is not None and arguments.prompt_file is not None:
        raise UsageError("give either --prompt or --prompt_file")
    texts = None if arguments.prompt is None else [arguments.prompt]
    if arguments.prompt_file is not None:
        from diffusion_jax.data.transcripts import read_text

        texts = [line for line in read_text(arguments.prompt_file).splitlines() if line]
        if not texts:
            raise UsageError(f"--prompt_file={arguments.prompt_file!r} holds no prompts")
    if texts is None:
        return None
    import numpy as np

    from diffusion_jax.data.codecs import encode_prompt

    return np.stack([encode_prompt(spec, text, arguments.mask_symbol) for text in texts])


def command_likelihood(arguments, rest) -> int:
    refuse(rest)
    workdir = need_workdir(arguments.workdir)
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
    if run.spec.kind == "tokens":
        return _perplexities(run, arguments, out)
    if arguments.text:
        raise UsageError(f"--text needs a model of text; the run models {run.spec.kind}")
    arguments.draws = 1 if arguments.draws is None else arguments.draws
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


def _perplexities(run, arguments, out) -> int:
    """Perplexities of the texts named on the command line, or of held-out data."""
    import numpy as np

    from diffusion_jax import __version__, evaluation
    from diffusion_jax import run as runs

    perplexity = evaluation.perplexity
    if arguments.num is not None and arguments.num < 1:
        raise UsageError(f"num must be positive, got {arguments.num}")
    sets, about = {}, {}
    for name, path in _named_paths(arguments.text).items():
        text = perplexity.read_text_set(
            run.spec, name, path, clean=arguments.clean, unknown=arguments.unknown
        )
        sets[name] = {"tokens": text.tokens[: arguments.num]}
        about[name] = {"path": path, "left_over": text.left_over, "changed": text.changed}
    if not sets:
        source = run.source("test")
        rows = np.arange(len(source) if arguments.num is None else min(arguments.num, len(source)))
        sets["held-out"] = source.take(rows)
        if run.config["method"].get("answers_only"):
            sets["held-out"]["scored"] = sets["held-out"]["prompt"] == run.spec.vocab_size
    draws = 16 if arguments.draws is None else arguments.draws
    rows, nats = perplexity.score_sets(
        run.method,
        run.params,
        sets,
        draws=draws,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=True,
    )
    report = {"sets": [row | about.get(row["set"], {}) for row in rows], "draws": draws}
    report |= {"clean": arguments.clean, "unknown": arguments.unknown, "seed": arguments.seed}
    report |= {"step": run.step, "weights": run.weights, "checksum": runs.checksum(run.params)}
    path = run.workdir / "likelihood.json"
    evaluation.write_json(path, report | {"version": __version__}, nonfinite="null")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        np.savez(out, **nats)
    print(perplexity.markdown(rows), end="")
    print(f"written: {path}{'' if out is None else f', {out}'}")
    return 0


def _named_paths(options: Sequence[str]) -> dict[str, str]:
    """`name=path` options; a path alone is named by its stem."""
    out: dict[str, str] = {}
    for option in options:
        name, separator, path = option.partition("=")
        name, path = (name, path) if separator else (pathlib.Path(option).stem, option)
        if not name or not path:
            raise UsageError(f"--text takes name=path, got {option!r}")
        if name in out:
            raise UsageError(f"--text: the name {name!r} occurs twice")
        out[name] = path
    return out


def command_statistics(arguments, rest) -> int:
    refuse(rest)
    workdir = need_workdir(arguments.workdir)
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


LISTS = {
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
MORE_LISTS = ("papers", "presets")


def command_list(arguments, rest) -> int:
    refuse(rest)
    from diffusion_jax import registry

    valid = (*LISTS, *MORE_LISTS)
    if arguments.what not in (None, *valid):
        raise UsageError(
            f"unknown list {arguments.what!r}{registry.closest(arguments.what, valid)}"
        )
    for title, kind in LISTS.items():
        if arguments.what not in (None, title):
            continue
        print(f"{title}:")
        for name in registry.names(kind):
            found = registry.entry(kind, name)
            meta = " ".join(
                f"{k}={v}" for k, v in found.meta.items() if v is not None and k != "sizes"
            )
            summary = (found.build.__doc__ or "").strip().split("\n")[0]
            print(f"  {name:18s} {summary}  [{meta}]" if meta else f"  {name:18s} {summary}")
            if found.meta.get("sizes"):
                print(f"  {'':18s} size: {', '.join(found.meta['sizes'])}")
    if arguments.what in (None, "presets"):
        from diffusion_jax.interop import presets

        print("presets (official weights: python -m diffusion_jax.interop.import_torch):")
        for name, preset in presets.PRESETS.items():
            print(f"  {name:28s} {preset.what}")
    if arguments.what in (None, "papers"):
        print("papers:")
        for paper, used in sorted(_papers().items()):
            print(f"  arXiv {paper}: {', '.join(used)}")
    return 0


def _papers() -> dict[str, list[str]]:
    from diffusion_jax import registry

    papers: dict[str, list[str]] = {}
    for kind in LISTS.values():
        for name in registry.names(kind):
            paper = registry.entry(kind, name).meta.get("paper")
            if paper:
                papers.setdefault(paper, []).append(f"{kind} {name}")
    return papers


def command_doctor(arguments, rest) -> int:
    refuse(rest)
    from diffusion_jax.doctor import examine

    return examine()


def refuse(rest: Sequence[str]) -> None:
    """Raises UsageError for arguments that no parser knew."""
    if rest:
        raise UsageError(f"unknown argument {rest[0]!r}; see --help")
