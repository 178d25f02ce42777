"""What the processes of a run must have in common, as plain data that can be compared."""

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diffusion_jax.training.runfolder import versions


class ProcessesDiffer(ValueError):
    """The processes of a run were started with different configs, code, versions or data."""


def difference(told: Sequence[Sequence[Sequence[str]]]) -> str:
    """The first field in which lists of (name, JSON) differ from the first list; "" if none does."""
    first = dict(told[0])
    for process, leaves in enumerate(told):
        other = dict(leaves)
        names = [*first, *(name for name in other if name not in first)]
        wrong = [name for name in names if first.get(name) != other.get(name)]
        if wrong:
            ours, theirs = (table.get(wrong[0], "absent") for table in (first, other))
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            return f"{wrong[0]} is {ours} on process 0, {theirs} on process {process}{more}"
    return ""


def common_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without `train.parallel.distributed`, which may hold the index of the process."""
    train = dict(config.get("train", {}))
    parallel = {k: v for k, v in train.get("parallel", {}).items() if k != "distributed"}
    return {**config, "train": {**train, "parallel": parallel}}


def environment() -> dict[str, Any]:
    """What else decides what a process computes: versions, source code, settings of JAX."""
    settings = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")
    found = versions()
    return {
        "versions": {name: found[name] for name in found if name not in ("devices", "processes")},
        "jax": {name: getattr(jax.config, name, None) for name in settings},
        "devices of a process": f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}",
        "code": source_code(),
    }


def source_code() -> dict[str, str]:
    """File of this package -> the first digits of its SHA-256."""
    root = pathlib.Path(__file__).parents[1]
    files = sorted(root.rglob("*.py"))
    return {
        f"{root.name}/{path.relative_to(root).as_posix()}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()[:12]
        for path in files
    }
