"""The files of a run folder beside metrics, samples and checkpoints: `config.json`, `versions.json`."""

import importlib.metadata
import json
import logging
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from diffusion_jax.training.config import plain

CONFIG, VERSIONS = "config.json", "versions.json"
_LOG = logging.getLogger(__name__)

# Entries (or whole sections) of a config that may change when a run is resumed: they change neither
# the model nor what a step computes.
FREE = (
    "train.steps",
    "train.log_every",
    "train.sample_every",
    "train.checkpoint_every",
    "train.keep",
    "train.parallel",
    "train.progress",
    "train.tensorboard",
    "train.compilation_cache",
    "train.profile",
    "sample",
    "evaluate",
    "workdir",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class ConfigChanged(ValueError):
    """A run folder was made with a config that gives another model or other steps."""


def read_config(workdir: str | pathlib.Path) -> dict[str, Any]:
    """The resolved config of a run.

    Raises:
      ValueError: the folder holds no run.
    """
    path = pathlib.Path(workdir) / CONFIG
    if not path.is_file():
        raise ValueError(f"{workdir} is not a run folder: it has no {CONFIG}")
    return json.loads(path.read_text())


def config_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences outside `FREE`, each as "name: old -> new"."""
    old_leaves, new_leaves = dict(config_leaves(old)), dict(config_leaves(new))
    names = [*old_leaves, *(n for n in new_leaves if n not in old_leaves)]
    show = lambda leaves, name: json.dumps(leaves[name]) if name in leaves else "absent"
    return [
        f"{name}: {show(old_leaves, name)} -> {show(new_leaves, name)}"
        for name in names
        if show(old_leaves, name) != show(new_leaves, name)
        and not any(name == free or name.startswith(free + ".") for free in FREE)
    ]


def open_run(
    workdir: str | pathlib.Path,
    config: Mapping[str, Any],
    started: bool,
    accept_changes: bool = False,
) -> None:
    """Writes config and versions; refuses a config that does not belong to what is in the folder.

    Args:
      workdir: the run folder; made if it does not exist.
      config: the resolved config; plain data or anything `config.plain` takes.
      started: whether the folder holds a checkpoint to go on from.
      accept_changes: take the new config all the same; the old one is kept beside it.

    Raises:
      ConfigChanged: the saved config differs in more than `FREE`.
    """
    workdir = pathlib.Path(workdir)
    config = plain(config)
    path = workdir / CONFIG
    if started and path.is_file():
        old = read_config(workdir)
        changes = config_changes(old, config)
        if changes and not accept_changes:
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise ConfigChanged(
                f"{workdir} was trained with another config: {changes[0]}{more}; use another run"
                " folder, or accept_changes=True to go on with the new values"
            )
        if changes and jax.process_index() == 0:
            count = len(list(workdir.glob("config.*.json")))
            _replace(workdir / f"config.{count}.json", old)
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        _warn_of_versions(workdir / VERSIONS, started)
        _replace(path, config)
        _replace(workdir / VERSIONS, versions())


def _replace(path: pathlib.Path, data: Any) -> None:
    # Other processes may be reading: they find the old file or the new one, never a part.
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(data, indent=2) + "\n")
    os.replace(fresh, path)


def versions() -> dict[str, Any]:
    """Versions of Python and of the packages that results depend on, and the devices."""
    found = {"python": platform.python_version(), "diffusion_jax": _version("diffusion_jax")}
    found |= {name: _version(name) for name in _PACKAGES}
    devices = jax.devices()
    found["devices"] = f"{len(devices)} x {devices[0].device_kind}"
    found["processes"] = jax.process_count()
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _warn_of_versions(path: pathlib.Path, started: bool) -> None:
    if not (started and path.is_file()):
        return
    old, new = json.loads(path.read_text()), versions()
    changed = [f"{n} {old.get(n)} -> {new[n]}" for n in new if old.get(n) != new[n]]
    if changed:
        _LOG.warning("resumed with other versions, bits may differ: %s", ", ".join(changed))


def config_leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`(dotted name, value)` of the leaves of nested mappings."""
    if isinstance(tree, Mapping) and tree:
        for key, value in tree.items():
            yield from config_leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
