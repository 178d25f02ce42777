"""A run from end to end: train a config into a folder, open the folder, draw samples from it.

`sample` and `evaluate` need only the folder: it holds the resolved config, the data's spec and the
checkpoints. Bridges also need the data set itself, for sources.
"""

import dataclasses
import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import multihost_utils

from diffusion_jax import builder, registry
from diffusion_jax.data import tokenizer
from diffusion_jax.data.pipeline import Pipeline
from diffusion_jax.data.source import TEXTUAL, DataSpec, Source
from diffusion_jax.evaluation.grids import (
    comparison_grid,
    image_grid,
    tokens_to_images,
    trajectory_strip,
)
from diffusion_jax.evaluation.speech import captions, mel_images, spectrogram_grid
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.samplers import ModelStatistics, model_statistics
from diffusion_jax.training import (
    Checkpoints,
    TrainConfig,
    TrainResult,
    make_optimizer,
    read_config,
    restore_params,
    train,
)
from diffusion_jax.training.agreement import common_config
from diffusion_jax.training.parallel import initialize_distributed, make_layout, put_local
from diffusion_jax.training.processes import agree, guarded, on_host
from diffusion_jax.training.state import ema_name

STATISTICS = "statistics.npz"
_SPEC = "spec.json"
_PREVIEW = 40  # samples in the grids drawn while training


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model.

    Attributes:
      workdir: the run folder.
      config: the resolved config, plain data.
      spec: the data's `DataSpec`.
      method: the `Method`.
      params: the parameters, averaged ones where there are any.
      weights: name of the checkpoint item they are from.
      step: training steps done.
    """

    workdir: pathlib.Path
    config: Mapping[str, Any]
    spec: DataSpec
    method: Any
    params: Any
    weights: str
    step: int

    def source(self, split: str) -> Source:
        """The data set of the run. Raises ValueError where its tokens mean others than the model's."""
        source = builder.build_data(self.config, split)
        check_same_tokens(self.spec, source.spec)
        return source


def train_config(config: Mapping[str, Any]) -> tuple[TrainConfig, Mapping[str, Any]]:
    """The loop's `TrainConfig`, and what else stands under `train` (data augmentation).

    Raises:
      ConfigError: a field, optimiser or schedule that does not exist, or a value out of range.
    """
    options = builder.to_plain(config["train"]) if "train" in config else {}
    augment = options.pop("augment", None)
    try:
        train_options = TrainConfig.from_mapping(options)
        make_optimizer(train_options.optimizer, train_options.steps)
        return train_options, {"augment": augment}
    except (TypeError, ValueError) as error:
        raise builder.ConfigError(f"config.train: {error}") from error


def train_run(
    config: Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    accept_changes: bool = False,
    fallback: bool = False,
) -> TrainResult:
    """Trains a config into a run folder, or goes on where the folder stands.

    Everything that can be wrong with the config is found before anything is written.

    Raises:
      ConfigError: a config that cannot be built.
      others: see `training.train`.
    """
    options, data_options = train_config(config)
    initialize_distributed(options.parallel.get("distributed", False))
    with guarded():
        agree(lambda: {"config": common_config(builder.to_plain(config))})
        return _train_run(config, workdir, options, data_options, accept_changes, fallback)


def _train_run(config, workdir, options, data_options, accept_changes, fallback) -> TrainResult:
    source = builder.build_data(config, "train")
    built = builder.build_method(config, source.spec)
    host = make_layout(options.parallel).host
    pipeline = Pipeline(source, options.batch_size, options.seed, host=host, **data_options)
    workdir = pathlib.Path(workdir)
    if (workdir / _SPEC).is_file() and not accept_changes:
        check_same_tokens(read_spec(workdir), source.spec)
    if options.init_from and (pathlib.Path(options.init_from) / _SPEC).is_file():
        check_same_tokens(read_spec(pathlib.Path(options.init_from)), source.spec)
    batch = first_conditions(source, _PREVIEW)

    def preview(params, key, step):
        drawn = built.method.sample(params, key, batch)
        return picture(source.spec, on_host(jnp.asarray(drawn)), batch)

    return train(
        built.method,
        _Announced(pipeline, lambda: write_spec(workdir, source.spec)),
        options,
        workdir,
        sample_fn=preview,
        resolved=builder.to_plain(config),
        accept_changes=accept_changes,
        fallback=fallback,
        about=_data(source) if jax.process_count() > 1 else None,
    )


def _data(source: Source) -> dict[str, Any]:
    """What tells one data set from another: its size, its spec and three of its examples."""
    spec = source.spec.to_json()
    if spec.get("tokenizer"):
        del spec["tokenizer"]["path"]  # the file may lie elsewhere on another host
    count, digest = len(source), hashlib.sha256()
    for _, value in sorted(source.take(np.array([0, count // 2, count - 1])).items()):
        digest.update(np.ascontiguousarray(value).tobytes())
    found = {"examples": count, "first, middle and last": digest.hexdigest()[:12]}
    return {"data": {**found, "spec": spec}}


def write_spec(workdir: pathlib.Path, spec: DataSpec) -> None:
    """Puts the spec into a run folder, and the tokenizer file where the tokens are of one."""
    workdir.mkdir(parents=True, exist_ok=True)
    fields = spec.to_json()
    if spec.tokenizer is not None:
        kept, given = workdir / tokenizer.FILE, pathlib.Path(spec.tokenizer["path"])
        if given != kept.resolve():
            shutil.copyfile(given, kept)
        fields["tokenizer"]["path"] = tokenizer.FILE
    (workdir / _SPEC).write_text(json.dumps(fields) + "\n")


def read_spec(workdir: pathlib.Path) -> DataSpec:
    """The spec in a run folder. Raises ValueError where there is none, or it is damaged."""
    path = workdir / _SPEC
    if not path.is_file():
        raise ValueError(f"{workdir} is not a run folder: it has no {_SPEC}")
    try:
        fields = json.loads(path.read_text())
        if fields.get("tokenizer"):
            fields["tokenizer"]["path"] = str((workdir / fields["tokenizer"]["path"]).resolve())
        return DataSpec.from_json(fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check_same_tokens(trained: DataSpec, found: DataSpec) -> None:
    """Raises ValueError where the tokens of data are not those that a model was trained on."""
    if trained.vocab_size != found.vocab_size:
        raise ValueError(
            f"the data have a vocabulary of {found.vocab_size} tokens, the model was trained on one of"
            f" {trained.vocab_size}"
        )
    if trained.kind == "tokens" and trained.symbols != found.symbols:
        pairs = zip(trained.symbols or (), found.symbols or ())
        first = next((f"; the first that differ: {b!r} for {a!r}" for a, b in pairs if a != b), "")
        raise ValueError(f"the data number other symbols than the model was trained on{first}")
    files = [(spec.tokenizer or {}).get("sha256", "") for spec in (trained, found)]
    if files[0] != files[1]:
        raise ValueError(
            f"the data are numbered by another tokenizer file (SHA-256 {files[1][:12]}) than the model"
            f" was trained on ({files[0][:12]})"
        )


class _Announced:
    """A pipeline that runs a function when training starts to read, after all checks have passed."""

    def __init__(self, pipeline: Pipeline, first: Callable[[], None]):
        self._pipeline, self._first = pipeline, first

    def batch(self, step):
        return self._pipeline.batch(step)

    def iterate(self, start):
        if jax.process_index() == 0:
            self._first()
        return self._pipeline.iterate(start)


def open_run(
    workdir: str | pathlib.Path, weights: str | None = None, step: int | None = None
) -> Run:
    """Opens a run folder.

    Args:
      workdir: the folder.
      weights: "params" or "ema_<decay>"; default the first average, else "params".
      step: of the checkpoint; default the newest.
    Raises:
      ValueError: no run folder, no such checkpoint or weights, or one that does not fit the config.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise ValueError(f"no run folder {str(workdir)!r}")
    config = read_config(workdir)
    spec = read_spec(workdir)
    built = builder.build_method(config, spec)
    if weights is None:
        options, _ = train_config(config)
        weights = f"ema_{ema_name(options.ema[0])}" if options.ema else "params"
    shapes = jax.eval_shape(built.method.init, jax.random.key(0), spec.zeros(2))
    params = restore_params(workdir, weights, step, target=shapes)
    done = step if step is not None else _newest(workdir)
    return Run(workdir, config, spec, built.method, params, weights, done)


def _newest(workdir) -> int:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.steps()[-1]


def checksum(params: Any) -> str:
    """Twelve hexadecimal digits of the parameters' bytes."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def build_sampler(run: Run, name: str | None = None, nfe: int | None = None, **options: Any):
    """A sampler by name on a run's process; default the name of the run's own.

    One that needs statistics of the model takes those in the run folder (`STATISTICS`), unless they are
    among the options.

    Raises:
      ValueError: as `samplers.build_sampler`; statistics that are missing, damaged, or of another process,
        data shape or checkpoint. The message holds the command that makes them.
    """
    name = name or run.method.default_sampler.name
    known = name in registry.names("sampler")
    if known and registry.entry("sampler", name).meta.get("needs") == "statistics":
        if "statistics" not in options:
            options["statistics"] = read_statistics(run)
    return run.method.build_sampler(name, nfe, **options)


def read_statistics(run: Run) -> ModelStatistics:
    """The model statistics in a run folder, checked against the run. Raises ValueError."""
    path = run.workdir / STATISTICS
    remedy = f"make them with: python -m diffusion_jax statistics --workdir={run.workdir}"
    if not path.is_file():
        raise ValueError(
            f"the sampler needs statistics of the model, and {path} does not exist; {remedy}"
        )
    remedy += f" --weights={run.weights} --step={run.step}"
    try:
        statistics = ModelStatistics.load(path)
        statistics.check(run.method.process, run.spec.shape)
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from error
    if statistics.checksum != checksum(run.params):
        raise ValueError(
            f"{path} is of parameters {statistics.checksum}, not of {run.weights} at step {run.step} "
            f"({checksum(run.params)}); {remedy}"
        )
    return statistics


def measure_statistics(
    run: Run,
    *,
    num: int = 512,
    intervals: int = 120,
    seed: int = 0,
    batch_size: int = 64,
    probes: int = 1,
    t_start: float | None = None,
    t_end: float | None = None,
    progress: bool = False,
) -> ModelStatistics:
    """`samplers.model_statistics` of a run on its training data, labels with their images.

    The denoiser is the one that samples, with the guidance and the clipping of the config. Beyond its
    size the data set is gone through again, with other noise.

    Raises:
      ValueError: not a model of a Gaussian process, or a number out of range.
    """
    if num < 2:
        raise ValueError(f"num must be at least 2, got {num}")
    if not isinstance(run.method.process, GaussianProcess):
        kind = type(run.method.process).__name__
        raise ValueError(f"statistics are of models of a Gaussian process; the run's is {kind}")
    source = run.source("train")
    rows = np.resize(np.random.default_rng(seed).permutation(len(source)), num)
    data = source.take(rows) | {"index": np.arange(num, dtype=np.int32)}
    x0 = data.pop(run.spec.kind)
    with tqdm.tqdm(
        total=num, disable=None if progress else True, desc="statistics", unit="example"
    ) as bar:
        return model_statistics(
            run.method.process,
            lambda batch: run.method.denoiser(run.params, batch),
            jax.random.key(seed),
            x0,
            conditions=data,
            intervals=intervals,
            t_start=t_start,
            t_end=t_end,
            batch_size=batch_size,
            probes=probes,
            checksum=checksum(run.params),
            progress=lambda done, _: bar.update(done - bar.n),
        )


def first_conditions(source: Source, num: int) -> dict[str, np.ndarray]:
    """The first `num` examples of a source as conditions (labels, sources), over and over if short."""
    return _conditions_of(source, np.arange(len(source)), num)


def _conditions_of(source: Source, rows: np.ndarray, num: int) -> dict[str, np.ndarray]:
    return source.take(np.resize(rows, num)) | {"index": np.arange(num, dtype=np.int32)}


def conditions(
    run: Run,
    num: int,
    *,
    label: int | None = None,
    split: str = "test",
    prompts: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """What `num` samples are drawn under.

    Labels go round all classes, or are all `label`; a bridge takes the sources of `split` (and then
    "image" holds the truth), a speech model its texts and speakers (those of `label`; and "points"
    holds the truth). A model whose data have prompts (puzzles) takes those of `split`, unless `prompts`
    are given: int [P, L] with the mask id at what is to be filled, in turn.

    Raises:
      ValueError: num below 1, a label that the model, or the split, does not have, or prompts for a
        model without masks.
    """
    if num < 1:
        raise ValueError(f"num must be positive, got {num}")
    spec = run.spec
    if "source" in spec.elements or ("prompt" in spec.elements and prompts is None):
        return first_conditions(run.source(split), num)
    if spec.show == "mel":
        source = run.source(split)
        rows = np.arange(len(source))
        if label is not None:
            labels = source.take(rows)["label"] if "label" in spec.elements else rows * 0 - 1
            rows = rows[labels == label]
        if not len(rows):
            raise ValueError(f"no example of split {split!r} has the label {label}")
        return _conditions_of(source, rows, num)
    batch = {"index": np.arange(num, dtype=np.int32)}
    if spec.num_classes:
        if label is not None and not 0 <= label < spec.num_classes:
            raise ValueError(f"label must lie in 0..{spec.num_classes - 1}, got {label}")
        labels = np.arange(num) % spec.num_classes if label is None else np.full(num, label)
        batch["label"] = labels.astype(np.int32)
    elif label is not None:
        raise ValueError("the model has no classes: label cannot be asked for")
    if prompts is not None:
        if getattr(run.method.process, "mask_id", None) is None:
            raise ValueError("the model has no mask: prompts cannot be filled in")
        batch["prompt"] = np.asarray(prompts, np.int32)[np.arange(num) % len(prompts)]
    return batch


def draw(
    run: Run,
    batch: Mapping[str, Any],
    key: jax.Array,
    *,
    sampler: Any = None,
    batch_size: int = 256,
    progress: bool = False,
    whole_chunks: bool = False,
    **options: Any,
) -> Any:
    """Samples for every row of `batch`, in chunks; chunking does not change them.

    A chunk is spread over the devices of a process; several processes draw chunks in turn, and all
    get all samples.

    Args:
      batch: conditions `[N, ...]` with "index".
      key: of the samples; sample i depends on it and `index[i]` alone.
      sampler: default the method's own.
      batch_size: rows at a time (of each process). The last chunk is padded to it, so one program serves all.
      progress: show a progress bar when standard error is a terminal.
      whole_chunks: pad even a batch smaller than `batch_size`, to reuse a compiled program.
      options: of `samplers.sample` (`trajectory`, `hook`, ...).
    Returns:
      NumPy samples `[N, ...]`; with `trajectory`, also `[steps + 1, N, ...]`.
    """
    count, hosts = len(batch["index"]), jax.process_count()
    size = batch_size if whole_chunks else min(batch_size, -(-count // hosts))
    size += -size % jax.local_device_count()
    params, chunks = put_local(run.params), []
    walk = tqdm.trange(
        0, count, size * hosts, disable=None if progress else True, desc="sample", unit="chunk"
    )
    for begin in walk:
        first = begin + jax.process_index() * size
        rows = np.minimum(np.arange(first, first + size), count - 1)
        part = put_local({k: np.asarray(v)[rows] for k, v in batch.items()}, split=True)
        drawn = run.method.sample(params, key, part, sampler, **options)
        chunks.append(drawn if options.get("trajectory") else (drawn,))
        chunks[-1] = [np.asarray(x) for x in chunks[-1]]
    whole = [
        np.take(_of_all_processes(parts, axis), np.arange(count), axis)
        for axis, parts in enumerate(zip(*chunks))
    ]
    return tuple(whole) if options.get("trajectory") else whole[0]


def _of_all_processes(chunks: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """The chunks of all processes side by side, the first of each, the second of each, ..."""
    if jax.process_count() > 1:
        gathered = multihost_utils.process_allgather(np.stack(chunks))
        chunks = gathered.swapaxes(0, 1).reshape(-1, *gathered.shape[2:])
    return np.concatenate(list(chunks), axis=axis)


def as_images(spec: DataSpec, values: np.ndarray) -> np.ndarray:
    """Images `[N, H, W, C]` float in [-1, 1] of an image model, or of a model of pixel tokens; the
    spectrograms of a speech model as `[N, T, M, 1]`."""
    if spec.show == "mel":
        return values[..., None]
    if spec.show != "pixels":
        return values
    levels = np.asarray(values, np.float32) * (2.0 / (spec.vocab_size - 1)) - 1.0
    return levels.reshape(-1, *spec.grid)


def _visible(spec: DataSpec, values: np.ndarray) -> np.ndarray:
    """Like `as_images`, with masked pixels in a colour of their own, and spectrograms in colours."""
    if spec.show == "mel":
        return mel_images(values)
    if spec.show != "pixels":
        return values
    if spec.grid[-1] != 1:
        return spec.decode(values.reshape(-1, *spec.shape)).reshape(*values.shape[:-1], *spec.grid)
    return tokens_to_images(values, spec.vocab_size, spec.grid[:2])


def picture(spec: DataSpec, samples: np.ndarray, batch: Mapping[str, Any]) -> Any:
    """What to show of samples: images by name, strings, or raw points as they are."""
    if spec.show in TEXTUAL:
        return spec.decode(samples)
    if spec.show is None:
        return {}
    shown = {"samples": _visible(spec, samples)}
    if spec.show == "mel":
        return shown | {"truth": _visible(spec, np.asarray(batch[spec.kind]))}
    if "source" in batch:
        shown |= {"source": np.asarray(batch["source"]), "truth": np.asarray(batch[spec.kind])}
    return shown


def grid_of(
    spec: DataSpec, samples: np.ndarray, batch: Mapping[str, Any], columns=None
) -> np.ndarray:
    """One picture of image samples; a bridge's beside its sources and the truth, speech below it."""
    if spec.show == "mel":
        sets = {"truth": np.asarray(batch[spec.kind]), "sample": samples}
        return spectrogram_grid(sets, captions(spec, batch), columns=columns or 5)
    shown = picture(spec, samples, batch)
    if "source" not in shown:
        columns = columns or (spec.num_classes if spec.num_classes else None)
        return image_grid(shown["samples"], columns=columns)
    width = columns or 10
    rows = [
        comparison_grid(
            {
                "source": shown["source"][i : i + width],
                "restored": shown["samples"][i : i + width],
                "truth": shown["truth"][i : i + width],
            }
        )
        for i in range(0, len(samples) - len(samples) % width or len(samples), width)
    ]
    return stack(rows)


def strip_of(spec: DataSpec, path: np.ndarray, columns: int = 10) -> np.ndarray:
    """How samples come about: states `[S, N, ...]`, a row an example, time from left to right."""
    return trajectory_strip(_visible(spec, path), columns=columns)


def stack(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures below one another, on white."""
    width = max(p.shape[1] for p in pictures)
    padded = [
        np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures
    ]
    return np.concatenate(padded)
