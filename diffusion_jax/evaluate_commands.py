"""`python -m diffusion_jax evaluate`: a run beside held-out data, or samples under judges that the user gives.

Without an option the run is judged with what comes with this package (`judge`); `--features` takes a network
of image features (`judge_features`), `--text_model` a language model (`judge_text`).
"""

import pathlib
from typing import Any

from diffusion_jax.commands import UsageError, chosen_sampler, need_workdir, pairs, refuse


def command_evaluate(arguments, rest) -> int:
    refuse(rest)
    if arguments.features is not None:
        return _evaluate_features(arguments)
    if arguments.text_model is not None:
        return _evaluate_text(arguments)
    for name in ("images", "reference", "statistics", "feature_weights", "texts"):
        if getattr(arguments, name) is not None:
            raise UsageError(f"--{name} goes with --features=inception or --text_model=FOLDER")
    if arguments.workdir is None:
        raise UsageError("--workdir=FOLDER is missing")
    workdir = need_workdir(arguments.workdir)
    import jax

    from diffusion_jax import evaluation
    from diffusion_jax import run as runs
    from diffusion_jax.judge import judge, table

    run = runs.open_run(workdir, arguments.weights, arguments.step)
    overrides: dict[str, Any] = {}
    if arguments.sampler or arguments.nfe or arguments.option:
        name = arguments.sampler or run.method.default_sampler.name
        chosen = {"name": name, **pairs(arguments.option)}
        overrides["samplers"] = [chosen | ({"nfe": arguments.nfe} if arguments.nfe else {})]
    asked = {name: getattr(arguments, name) for name in ("num", "seed", "batch_size")}
    overrides |= {name: value for name, value in asked.items() if value is not None}
    result = judge(run, **overrides)
    if jax.process_index():
        return 0  # the first process writes
    report = {k: result[k] for k in ("rows", "likelihood")}
    report |= {"step": run.step, "weights": run.weights, "checksum": runs.checksum(run.params)}
    evaluation.write_json(workdir / "evaluation.json", report)
    print(table(result["rows"]))
    if result["likelihood"]:
        print(", ".join(f"{k} {v:.4g}" for k, v in result["likelihood"].items()))
    print(f"written: {workdir / 'evaluation.json'}")
    return 0


def _evaluate_features(arguments) -> int:
    """Figures of images in the features of a network whose weights the user gives."""
    from diffusion_jax.registry import check_choice

    check_choice("--features", arguments.features, ("inception",))
    weights, item = arguments.feature_weights, arguments.weights
    if weights is None:
        weights, item = item, None
    if weights is None:
        raise UsageError(
            "--weights=FILE is missing: the Inception weights (.pth, .safetensors or .npz); they are not"
            " downloaded"
        )
    _one_of(arguments, "workdir", "images")
    if arguments.images and not (arguments.reference or arguments.statistics):
        raise UsageError("--images needs --reference to compare with, or --statistics to write")
    import jax

    from diffusion_jax import __version__, evaluation, judge_features
    from diffusion_jax import run as runs

    run = None
    if arguments.workdir:
        run = runs.open_run(need_workdir(arguments.workdir), item, arguments.step)
    seed, size = arguments.seed or 0, arguments.batch_size
    size = 64 if size is None else size
    options = {"preparation": arguments.preparation, "batch_size": size}
    if run is None:
        judged = judge_features.read_images(arguments.images)
    else:
        sampler = chosen_sampler(run, arguments) or run.method.default_sampler
        num = len(run.source("test")) if arguments.num is None else arguments.num
        judged = judge_features.run_samples(run, sampler, num, seed=seed)
    extractor = judge_features.Extractor(weights, **options)
    reference, folder = None, arguments.workdir
    if folder is None and arguments.statistics:
        folder = pathlib.Path(arguments.statistics).parent
    if arguments.reference:
        reference = extractor.reference(arguments.reference)
    elif run is not None:
        real = extractor.statistics(judge_features.run_images(run, "train"), folder=folder)
        reference = evaluation.reference_of(real, extractor.about)
    fake = extractor.statistics(judged, folder=folder)
    if jax.process_index():
        return 0  # the first process writes
    written = []
    if arguments.statistics:
        ours = evaluation.reference_of(fake, extractor.about)
        written.append(evaluation.write_reference(arguments.statistics, ours))
    named = None if reference is None else arguments.reference or "train data"
    row = {"name": judged.name, "reference": named, **evaluation.figures(reference, fake)}
    row["unknown_preparation"] = reference is not None and not reference.about
    print(judge_features.table([row]), end="")
    for line in judge_features.warnings(row):
        print(f"note: {line}")
    if run is not None:
        report = row | extractor.about | {"seed": seed, "version": __version__}
        report |= {"step": run.step, "weights": run.weights, "run": runs.checksum(run.params)}
        written.append(evaluation.write_json(run.workdir / "features.json", report))
    for path in written:
        print(f"written: {path}")
    return 0


def _one_of(arguments, first: str, second: str) -> None:
    if (getattr(arguments, first) is None) == (getattr(arguments, second) is None):
        raise UsageError(f"give either --{first} or --{second}")


def _evaluate_text(arguments) -> int:
    """Figures of texts under a language model that the user gives."""
    _one_of(arguments, "workdir", "texts")
    if arguments.mauve and arguments.texts and not arguments.reference:
        raise UsageError("--mauve needs --reference=FILE to compare with")
    import jax

    from diffusion_jax import __version__, evaluation, judge_text
    from diffusion_jax import run as runs

    run, seed = None, arguments.seed or 0
    if arguments.workdir:
        workdir = need_workdir(arguments.workdir)
        run = runs.open_run(workdir, arguments.weights, arguments.step)
        sampler = chosen_sampler(run, arguments) or run.method.default_sampler
        sets = judge_text.run_texts(run, sampler, arguments.num, seed=seed)
    else:
        sets = {arguments.texts: judge_text.read_texts(arguments.texts)}
    if arguments.reference:
        sets[arguments.reference] = judge_text.read_texts(arguments.reference)
    options = {"window": arguments.window, "stride": arguments.stride}
    options["batch_size"] = 8 if arguments.batch_size is None else arguments.batch_size
    model = judge_text.TextModel(arguments.text_model, **options)
    rows = judge_text.judge(model, sets, mauve=arguments.mauve, seed=seed)
    if jax.process_index():
        return 0  # the first process writes
    print(judge_text.table(rows), end="")
    if run is not None:
        report = {"rows": rows, "seed": seed, "step": run.step, "weights": run.weights}
        report |= {"checksum": runs.checksum(run.params), "text_model": model.about}
        path = evaluation.write_json(
            run.workdir / "texts.json", report | {"version": __version__}, nonfinite="null"
        )
        print(f"written: {path}")
    return 0
