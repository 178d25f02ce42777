"""Checkpoints: orbax items `params`, `ema_<decay>`, `opt`, `method` and a JSON `meta`.

Saving is asynchronous and atomic (a killed save leaves no checkpoint). `meta` lists every leaf with
its shape, dtype and a checksum, because the storage neither compares dtypes nor notices a flipped
byte in an array.
"""

import json
import logging
import pathlib
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from diffusion_jax.registry import closest
from diffusion_jax.training.checksums import checksum
from diffusion_jax.training.parallel import leaf_names
from diffusion_jax.training.state import RUNNING, TrainState

FORMAT = 1
_LOG = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or of another model; the message names the leaf."""


class CheckpointMismatch(CheckpointError):
    """A sound checkpoint whose leaves are not those asked for."""


def _items(state: TrainState) -> dict[str, Any]:
    """The parts of a state that hold arrays, by item name."""
    items = {"params": state.params, **{f"ema_{d}": tree for d, tree in state.ema.items()}}
    items |= {"opt": state.opt_state, "method": state.method_state}
    return {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}


def _table(tree: Any) -> dict[str, list]:
    """Leaf name -> [shape, dtype name]."""
    leaves = zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
    return {name: [list(leaf.shape), str(leaf.dtype)] for name, leaf in leaves}


class Checkpoints:
    """The checkpoints of a run folder.

    Args:
      workdir: the run folder; checkpoints lie in `checkpoints/<step>` below it.
      keep: number of newest checkpoints that are kept.
      read_only: never create or delete anything.

    Raises:
      CheckpointError: `read_only` and there is no checkpoint folder.
    """

    def __init__(self, workdir: str | pathlib.Path, keep: int = 3, read_only: bool = False):
        self.directory = pathlib.Path(workdir).absolute() / "checkpoints"
        if read_only and not self.directory.is_dir():
            raise CheckpointError(f"no checkpoints in {workdir}: {self.directory} does not exist")
        if read_only:
            options = ocp.CheckpointManagerOptions(create=False)
        else:
            self.directory.mkdir(parents=True, exist_ok=True)
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts saving; returns when the arrays may be donated. Every process must call it.

        Args:
          state: of global arrays; a step that is saved already is left alone.
          extra: JSON data to find again in `restore`.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = _items(state)
        leaves = {
            name: {
                leaf: [*entry, checksum(x)]
                for (leaf, entry), x in zip(
                    _table(tree).items(), jax.tree.leaves(tree), strict=True
                )
            }
            for name, tree in items.items()
        }
        body = {"format": FORMAT, "step": step, "leaves": leaves, "extra": dict(extra or {})}
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["meta"] = ocp.args.JsonSave({"body": body, "crc32": _crc(body)})
        self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self) -> None:
        """Blocks until a running save has ended."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for a running save and frees the threads."""
        self._manager.close()

    def reached_preemption(self, step: int) -> bool:
        """Whether all processes of a distributed run are to stop after `step` (call every step)."""
        return self._manager.reached_preemption(step)

    def meta(self, step: int) -> dict[str, Any]:
        """What is known of a checkpoint: `step`, `leaves` and `extra`.

        Raises:
          CheckpointError: it is absent or damaged.
        """
        self._check_step(step)
        stored = self._load(step, "meta", ocp.args.JsonRestore(), ())
        try:
            body, crc = stored["body"], stored["crc32"]
        except (KeyError, TypeError):
            body, crc = None, None
        if crc != _crc(body):
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} is damaged: meta (checksum)"
            )
        if body["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} has format {body['format']}; this version"
                f" reads format {FORMAT}"
            )
        return body

    def restore(
        self, target: TrainState, step: int | None = None, fallback: bool = False
    ) -> tuple[TrainState, dict[str, Any]]:
        """A state as saved, placed as the target says.

        Args:
          target: a state of `ShapeDtypeStruct`s with shardings; any mesh will do.
          step: default the newest.
          fallback: go on to the next older checkpoint when one is damaged or does not fit.

        Returns:
          `(state, extra)`.

        Raises:
          CheckpointError: no checkpoint, or a damaged one.
          CheckpointMismatch: a leaf is missing, left over, or of another shape or dtype.
        """
        return self._first_good(lambda n: self._restore_state(target, n), step, fallback)

    def restore_item(
        self,
        name: str | None = None,
        target: Any = None,
        step: int | None = None,
        fallback: bool = False,
    ) -> Any:
        """One item, such as "params" or "ema_0.999"; default what the run samples with.

        Args:
          name: the item.
          target: pytree of `ShapeDtypeStruct`s; default what was saved, as nested dicts and lists,
            on the first device.
          step, fallback: as for `restore`.

        Raises:
          CheckpointError, CheckpointMismatch: as for `restore`.
        """
        return self._first_good(lambda n: self._restore_named(name, target, n), step, fallback)

    def set_aside(self, after: int) -> list[int]:
        """Renames the checkpoints of later steps to `<step>.damaged`, so that they can be redone."""
        later = [n for n in self.steps() if n > after]
        for n in later:
            if jax.process_index() == 0:
                source = self.directory / str(n)
                source.rename(_unused(source.with_name(f"{n}.damaged")))
        if later:
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("diffusion_jax:set_aside")
            self._manager.reload()
        return later

    def _check_step(self, step: int) -> None:
        if step not in self.steps():
            held = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(
                f"no checkpoint of step {step} in {self.directory}; there are: {held}"
            )

    def _first_good(self, restore: Any, step: int | None, fallback: bool) -> Any:
        steps = self.steps() if step is None else [n for n in self.steps() if n <= step]
        if step is not None and not fallback:
            steps = [step]
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        first_error = None
        for n in reversed(steps):
            try:
                return restore(n)
            except CheckpointError as error:
                first_error = first_error or error
                if not fallback:
                    if len(steps) > 1 and not isinstance(error, CheckpointMismatch):
                        older = (
                            f"{error}; older ones exist (steps {steps[:-1]}): ask for the fallback"
                        )
                        raise CheckpointError(older) from error
                    raise
                _LOG.warning("%s; falling back", error)
        raise first_error

    def _restore_state(self, target: TrainState, step: int) -> tuple[TrainState, dict[str, Any]]:
        meta = self.meta(step)
        wanted = _items(target)
        self._compare_items(step, meta, wanted)
        restored = self._read(step, meta, wanted)
        state = target.replace(
            step=_scalar(meta["step"], target.step),
            halt=_scalar(RUNNING, target.halt),
            params=restored["params"],
            ema={d: restored[f"ema_{d}"] for d in target.ema},
            opt_state=restored.get("opt", target.opt_state),
            method_state=restored.get("method", target.method_state),
        )
        return state, meta["extra"]

    def _restore_named(self, name: str | None, target: Any, step: int) -> Any:
        meta = self.meta(step)
        name = name or meta["extra"].get("default_item", "params")
        if name not in meta["leaves"]:
            raise CheckpointMismatch(
                f"checkpoint {self.directory / str(step)} has no item {name!r}"
                f"{closest(name, meta['leaves'])}"
            )
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        if target is None:
            target = _nested(meta["leaves"][name])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape,
                x.dtype,
                sharding=x.sharding or one,
            ),
            target,
        )
        self._compare(step, name, meta["leaves"][name], _table(target))
        return self._read(step, meta, {name: target})[name]

    def _compare_items(self, step: int, meta: Mapping, wanted: Mapping[str, Any]) -> None:
        for name, tree in wanted.items():
            if name not in meta["leaves"]:
                raise CheckpointMismatch(
                    f"checkpoint {self.directory / str(step)} has no item {name!r}; it holds:"
                    f" {', '.join(meta['leaves'])}"
                )
            self._compare(step, name, meta["leaves"][name], _table(tree))
        for name in meta["leaves"]:
            if name not in wanted:
                raise CheckpointMismatch(
                    f"checkpoint {self.directory / str(step)} holds {name!r}, which this run lacks"
                )

    def _compare(self, step: int, item: str, saved: Mapping, wanted: Mapping) -> None:
        wrong = []
        for leaf in [*saved, *(n for n in wanted if n not in saved)]:
            ours, theirs = wanted.get(leaf), saved.get(leaf)
            if ours != (theirs and theirs[:2]):
                wrong.append(
                    f"{item}/{leaf} is {_show(theirs)} in the checkpoint, {_show(ours)} here"
                )
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise CheckpointMismatch(f"checkpoint {self.directory / str(step)}: {wrong[0]}{more}")

    def _read(self, step: int, meta: Mapping, targets: Mapping[str, Any]) -> dict[str, Any]:
        restored = {}
        for item, target in targets.items():
            args = ocp.args.StandardRestore(target)
            restored[item] = self._load(step, item, args, meta["leaves"][item])
            leaves = zip(meta["leaves"][item].items(), jax.tree.leaves(restored[item]), strict=True)
            for (leaf, (_, _, expected)), x in leaves:
                if checksum(x) != expected:
                    raise CheckpointError(
                        f"checkpoint {self.directory / str(step)} is damaged: {item}/{leaf} (checksum)"
                    )
        return restored

    def _load(self, step: int, item: str, args: Any, leaves: Iterable[str]) -> Any:
        """An item as orbax reads it; whatever goes wrong there is a `CheckpointError`."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:
            _ignore_given_up_reads()
            _LOG.debug("reading %s of checkpoint %d failed", item, step, exc_info=True)
            kind, text = type(error).__name__, str(error)
        paths = {leaf: leaf.replace("/", ".") for leaf in leaves}
        named = [
            leaf for leaf, path in paths.items() if re.search(f"[\"']{re.escape(path)}/", text)
        ]
        where = f"{item}/{named[0]}" if named else item
        said = text.split(". See full", 1)[0].split("\n", 1)[0][:150]
        raise CheckpointError(
            f"checkpoint {self.directory / str(step)} is damaged: {where} ({kind}: {said})"
        )


def restore_params(
    workdir: str | pathlib.Path,
    which: str | None = None,
    step: int | None = None,
    target: Any = None,
    fallback: bool = False,
) -> Any:
    """Parameters of a run, for sampling and evaluation; needs nothing but the run folder.

    Args:
      workdir: the run folder.
      which: "params" or "ema_<decay>"; default the first average of the run's config, else "params".
      step: default the newest.
      target: pytree of `ShapeDtypeStruct`s (with shardings, or on the first device); default nested
        dicts and lists as saved.
      fallback: go on to the next older checkpoint when one is damaged.

    Raises:
      CheckpointError: no such checkpoint, or a damaged one (the leaf is named).
      CheckpointMismatch: no such item, or a leaf is not as in the target.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.restore_item(which, target, step, fallback)


def _nested(table: Mapping[str, Sequence]) -> Any:
    """A tree of `ShapeDtypeStruct`s by leaf names; keys 0..n-1 become a list."""
    tree: dict[str, Any] = {}
    for name, (shape, dtype, _) in table.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))

    def lists(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        node = {key: lists(child) for key, child in node.items()}
        indices = [str(n) for n in range(len(node))]
        return [node[i] for i in indices] if set(indices) == set(node) else node

    return lists(tree)


def _crc(body: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _show(entry: Sequence | None) -> str:
    return "missing" if entry is None else f"{entry[1]}{list(entry[0])}"


def _scalar(value: int, like: Any) -> jax.Array:
    whole = np.asarray(value, like.dtype)
    return jax.make_array_from_callback((), like.sharding, lambda _: whole)


def _unused(path: pathlib.Path) -> pathlib.Path:
    names = [path, *(path.with_name(f"{path.name}.{n}") for n in range(1, 1000))]
    return next(p for p in names if not p.exists())


def _ignore_given_up_reads() -> None:
    """Drops the pages that other reads print when one has failed: they bury the line that matters.

    They come when the interpreter collects them, as late as at its exit, so the hook stays.
    """
    hook = sys.unraisablehook
    if getattr(hook, "ignores_given_up_reads", False):
        return

    def quieter(info: Any) -> None:
        given_up = "_read_array_index" in repr(info.object)
        if not given_up and str(info.exc_value) != "Event loop is closed":
            hook(info)

    quieter.ignores_given_up_reads = True
    sys.unraisablehook = quieter
