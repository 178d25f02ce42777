"""The training loop: it knows a `Method`, a data pipeline and a run folder, and nothing else."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils

from diffusion_jax.methods.base import Method
from diffusion_jax.training.agreement import common_config, environment
from diffusion_jax.training.checkpoints import CheckpointError, Checkpoints, restore_params
from diffusion_jax.training.config import TrainConfig, plain
from diffusion_jax.training.console import Clock, catch_signals, progress_bar
from diffusion_jax.training.metrics import MetricsWriter, Window
from diffusion_jax.training.processes import agree, guarded, on_host
from diffusion_jax.training.profiling import Profile, use_compilation_cache
from diffusion_jax.training.report import summary
from diffusion_jax.training.runfolder import CONFIG, open_run
from diffusion_jax.training.state import BAD_GRADIENT, SAMPLE_FOLD, TrainState, ema_name
from diffusion_jax.training.trainer import Trainer

_LOG = logging.getLogger(__name__)
SampleFn = Callable[[Any, jax.Array, int], Any]


class NonFiniteError(RuntimeError):
    """Training stopped because a loss, a gradient or a parameter was not finite.

    Attributes:
      step: the step (and batch) at fault, counted from 0.
      kept: the step of the last good checkpoint, None without one.
    """

    def __init__(self, message: str, step: int, kept: int | None):
        super().__init__(message)
        self.step, self.kept = step, kept


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      status: "finished", or "preempted" by a signal (saved, and to be resumed).
      step: number of steps done.
      state: the last state, of global arrays.
      metrics: the last row of metrics, empty if this call wrote none.
      report: what `describe` says.
    """

    status: str
    step: int
    state: TrainState
    metrics: dict[str, float]
    report: dict[str, Any]


def train(
    method: Method,
    pipeline: Any,
    config: TrainConfig | Mapping[str, Any],
    workdir: str | pathlib.Path,
    *,
    sample_fn: SampleFn | None = None,
    resolved: Mapping[str, Any] | None = None,
    accept_changes: bool = False,
    fallback: bool = False,
    devices: Sequence[jax.Device] | None = None,
    about: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains, or goes on training, in a run folder.

    Goes on from the newest checkpoint in the folder. SIGTERM and SIGINT (in a distributed run:
    SIGTERM to any process) end it after the running step with a checkpoint.

    Args:
      method: the model family.
      pipeline: has `batch(step) -> dict of NumPy arrays`, a pure function of the step, and perhaps
        `iterate(first_step)` yielding `(step, batch)`; each host loads its part (`Layout.host`).
      config: see `TrainConfig`.
      workdir: the run folder.
      sample_fn: `(params, key, step) -> samples` as `MetricsWriter.write_samples` takes them, with
        the averaged parameters if there are any; the key is the same each time.
      resolved: the whole config of the experiment, for `config.json`.
      accept_changes: resume although the saved config is another one.
      fallback: resume from an older checkpoint if the newest is damaged, which is set aside.
      devices: default all.
      about: more plain data that all processes of a distributed run must have in common.

    Raises:
      ProcessesDiffer: the processes were started with different configs, data, code or versions, or
        do not share the run folder; nothing is written.
      NonFiniteError: a loss, gradient or parameter was not finite; the last good state is saved.
      CheckpointError: the checkpoint to go on from, or to take the first weights from, is absent,
        damaged or of another model.
      ConfigChanged: it was made with another config.
      ValueError: a config that fits neither the devices nor the batches.
    """
    config = TrainConfig.from_mapping(config)
    workdir = pathlib.Path(workdir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(guarded())
        use_compilation_cache(config.compilation_cache)
        everything = {**plain(resolved or {}), "train": config.to_dict()}
        first = pipeline.batch(0)
        agree(lambda: _common(everything, first, workdir, about))
        checkpoints = stack.enter_context(Checkpoints(workdir, keep=config.keep))
        saved = checkpoints.steps()
        if config.init_from and not saved:
            _check_init_from(config.init_from, workdir)
        open_run(workdir, everything, bool(saved), accept_changes)
        _check_shared(workdir)
        trainer = Trainer(method, first, config, devices)
        layout = trainer.layout
        window = Window(trainer.names, last=("learning_rate", "param_norm"), guard="halt")
        if saved:
            state, extra = checkpoints.restore(trainer.abstract, fallback=fallback)
            checkpoints.set_aside(after=int(state.step))
            window.from_json(extra.get("window"))
        else:
            state = trainer.create(first, _first_params(config.init_from, trainer))
        start = int(state.step)
        state = layout.to_device(state)
        _LOG.info("%s", summary(trainer.report))
        main = jax.process_index() == 0
        writer = None
        if main:
            (workdir / "report.json").write_text(json.dumps(trainer.report, indent=2) + "\n")
            writer = MetricsWriter(workdir, after=start, tensorboard=config.tensorboard)
            stack.callback(writer.close)
        bar = stack.enter_context(progress_bar(config.steps, start, main and config.progress))
        interrupted = stack.enter_context(catch_signals())
        profile = Profile(config.profile, workdir, start)
        stack.callback(profile.close)
        status, row, clock = "finished", {}, Clock(start)

        def save() -> None:
            item = f"ema_{ema_name(config.ema[0])}" if config.ema else "params"
            extra = {"window": window.to_json(), "default_item": item}
            checkpoints.save(layout.to_global(state), extra)

        for step, batch in _batches(pipeline, start, config.steps, stack):
            with profile.step(step):
                state, vector = trainer.step(state, batch)
            profile.after(step, vector)
            window.add(vector)
            window.wait(behind=layout.max_in_flight)
            bar.update()
            done = step + 1
            last = done == config.steps
            stop = interrupted() or checkpoints.reached_preemption(done)
            log, checkpoint, sample = (
                every and (done % every == 0 or last)
                for every in (config.log_every, config.checkpoint_every, config.sample_every)
            )
            if log or checkpoint or sample or stop or last:
                window.collect()
                if window.failed:
                    _stop(layout.to_global(state), window.failed, checkpoints, save)
            if log:
                row = window.row() | clock.rates(done, config.batch_size)
                del row["halt"]
                bar.set_postfix(loss=f"{row['loss']:.4g}")
                if writer:
                    writer.write(done, row)
            with clock.paused():
                if checkpoint or stop or last:
                    save()
                if sample and sample_fn is not None:
                    samples = _sample(sample_fn, layout.to_global(state), config, trainer.key)
                    if writer:
                        writer.write_samples(done, samples)
            if stop and not last:
                status = "preempted"
                _LOG.warning("stopped by a signal after %d steps; saved in %s", done, workdir)
                break
        save()
        checkpoints.wait()
        state = layout.to_global(state)
        return TrainResult(status, int(state.step), state, row, trainer.report)


def _common(
    everything: Mapping[str, Any],
    batch: Mapping[str, Any],
    workdir: pathlib.Path,
    about: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What the processes of a distributed run must have in common to do the same steps."""
    saved = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
    return {
        "config": common_config(everything),
        "batch of a process": {k: f"{v.dtype}{list(v.shape)}" for k, v in batch.items()},
        "newest checkpoint": max(saved, default=None),
        **(about or {}),
        **environment(),
    }


def _check_shared(workdir: pathlib.Path) -> None:
    """Raises ProcessesDiffer unless all processes see the files that the first one has written."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("diffusion_jax:run_folder")
        path = workdir / CONFIG
        seen = hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.is_file() else "absent"
        remedy = f"; {workdir} must lie on a file system that all processes share"
        agree(lambda: {f"{CONFIG} in the run folder": seen}, remedy)


def _check_init_from(folder: str, workdir: pathlib.Path) -> None:
    """Raises CheckpointError unless the folder holds a checkpoint, before anything is written."""
    if pathlib.Path(folder).absolute() == workdir.absolute():
        raise CheckpointError(f"train.init_from is the run folder itself: {folder}")
    with Checkpoints(folder, read_only=True) as other:
        if not other.steps():
            raise CheckpointError(f"train.init_from: no checkpoint in {other.directory}")


def _first_params(folder: str, trainer: Trainer) -> Any:
    """The weights of another run as this run's first parameters, or None without such a run."""
    if not folder:
        return None
    try:
        params = restore_params(folder, target=trainer.abstract.params)
    except CheckpointError as error:
        raise type(error)(f"train.init_from: {error}") from error
    _LOG.info("first weights from %s", folder)
    return params


def _batches(pipeline: Any, start: int, stop: int, stack: contextlib.ExitStack) -> Any:
    """`(step, batch)` of the steps from `start` to `stop`."""
    if start >= stop:
        return ()
    if not hasattr(pipeline, "iterate"):
        return ((step, pipeline.batch(step)) for step in range(start, stop))
    batches = pipeline.iterate(start)
    if hasattr(batches, "close"):
        stack.callback(batches.close)
    return itertools.islice(batches, stop - start)


def _stop(
    state: TrainState, failed: dict[str, float], checkpoints: Checkpoints, save: Callable[[], None]
) -> None:
    """Saves what is good and raises `NonFiniteError`."""
    step = int(state.step)
    if int(state.halt) == BAD_GRADIENT:
        save()
    else:
        step -= 1
    checkpoints.wait()
    kept = checkpoints.steps()[-1] if checkpoints.steps() else None
    values = ", ".join(f"{n} {failed[n]:g}" for n in ("loss", "grad_norm", "param_norm"))
    where = "no checkpoint was saved before" if kept is None else f"kept: step {kept}'s checkpoint"
    raise NonFiniteError(f"not finite at step {step}: {values}; {where}", step, kept)


def _sample(sample_fn: SampleFn, state: TrainState, config: TrainConfig, key: jax.Array) -> Any:
    params = state.ema[ema_name(config.ema[0])] if config.ema else state.params
    samples = sample_fn(params, jax.random.fold_in(key, SAMPLE_FOLD), int(state.step))
    return jax.tree.map(lambda x: on_host(x) if isinstance(x, jax.Array) else x, samples)
