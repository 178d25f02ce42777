"""Tables on disk: a fitted solver is kept beside its model, as any table can be."""

import dataclasses
import os
from typing import Any

from diffusion_jax.array_files import read_arrays, write_arrays
from diffusion_jax.processes import GaussianProcess
from diffusion_jax.samplers.linear import D, LinearInit, LinearStep, Rows, Structure, Y
from diffusion_jax.samplers.model_statistics import describe
from diffusion_jax.samplers.scan import Sampler

_FORMAT = "diffusion_jax.table.1"


def _names(columns):
    return [list(column) for column in columns]


def save_table(path: str | os.PathLike, process: Any, sampler: Sampler) -> None:
    """Writes a table sampler of a Gaussian process as `.npz`: structure, coefficients, times.

    Raises:
      ValueError: not a table, one with noise given by `with_noise`, or another kind of process.
    """
    if not isinstance(sampler.step, LinearStep):
        raise ValueError(f"sampler {sampler.name!r} is not a table: it cannot be saved as one")
    if "z" in sampler.xs or "z" in sampler.start:
        raise ValueError(f"sampler {sampler.name!r} holds draws of its own: save it without them")
    structure = sampler.step.structure
    about = {
        "process": describe(process),
        "rows": [[output, _names(columns)] for output, columns in structure.rows],
        "history": structure.history,
        "noise": structure.noise,
        "init": [[output, list(columns)] for output, columns in structure.init],
        "source": structure.source,
        "nfe": sampler.nfe,
        "stochastic": sampler.stochastic,
        "order": sampler.order,
        "name": sampler.name,
    }
    arrays = {"scalars": sampler.xs["scalars"]}
    arrays |= {f"array.{i}": a for i, a in enumerate(sampler.xs["arrays"])}
    for part in ("point", "next"):
        arrays |= {f"{part}.{name}": v for name, v in sampler.xs[part].items()}
    for output, form in sampler.start.items():
        arrays |= {f"start.{output}.{name}": v for name, v in form.items()}
    if "draw" in sampler.xs:
        arrays["draw"] = sampler.xs["draw"]
    write_arrays(path, _FORMAT, about, arrays)


def load_table(
    path: str | os.PathLike,
    process: Any,
    *,
    nfe: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Sampler:
    """Reads what `save_table` wrote: the same sampler, bit for bit. Nothing in the file is executed.

    Args:
      path: the file.
      process: the process it must have been made for (its training interval does not count).
      nfe: the number of network calls it must make.
      shape: of one example; coefficients with data axes must fit it.
    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file or none of a table, another process, another `nfe` or shape.
    """
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"a saved table needs a Gaussian process, got {type(process).__name__}")
    made_for, sampler = read_arrays(
        path,
        _FORMAT,
        "solver table",
        lambda about, arrays: (about["process"], _restore(about, arrays)),
    )
    if made_for != describe(process):
        raise ValueError(f"{path} was made for {made_for}, not for {describe(process)}")
    if nfe is not None and nfe != sampler.nfe:
        raise ValueError(f"{path} makes {sampler.nfe} network calls, {nfe} are asked for")
    for array in sampler.xs["arrays"]:
        if shape is not None and not _fits(array.shape[1:], tuple(shape)):
            raise ValueError(f"{path} was made for examples {array.shape[1:]}, not {tuple(shape)}")
    return sampler


def _fits(own, shape):
    return len(own) <= len(shape) and all(
        a in (1, b) for a, b in zip(reversed(own), reversed(shape))
    )


def _restore(about, arrays) -> Sampler:
    structure = Structure(
        rows=tuple((o, tuple((n, kind) for n, kind in columns)) for o, columns in about["rows"]),
        history=about["history"],
        noise=about["noise"],
        init=tuple((output, tuple(columns)) for output, columns in about["init"]),
        source=about["source"],
    )
    xs = {
        "scalars": arrays["scalars"],
        "arrays": tuple(arrays[f"array.{i}"] for i in range(_count(structure, "v"))),
    }
    for part in ("point", "next"):
        prefix = f"{part}."
        xs[part] = {n[len(prefix) :]: v for n, v in arrays.items() if n.startswith(prefix)}
    if structure.noise == "some":
        xs["draw"] = arrays["draw"]
    start = {
        output: {name: _number(arrays[f"start.{output}.{name}"]) for name in columns}
        for output, columns in structure.init
    }
    scalars = (about["nfe"], _count(structure, "s"))
    if xs["scalars"].shape != scalars:
        raise ValueError(f"its coefficients have shape {xs['scalars'].shape}, not {scalars}")
    columns = [*xs["arrays"], *xs["point"].values(), *xs["next"].values()]
    if "t" not in xs["point"] or any(len(v) != about["nfe"] for v in columns):
        raise ValueError(f"its columns do not have {about['nfe']} rows")
    table = Rows()
    point = {"t": 0.0}
    table.add(point, Y, push=D)
    return dataclasses.replace(
        table.sampler(point),
        init=LinearInit(structure),
        step=LinearStep(structure),
        xs=xs,
        start=start,
        nfe=about["nfe"],
        stochastic=about["stochastic"],
        order=about["order"],
        name=about["name"],
    )


def _count(structure, kind):
    return sum(k == kind for _, columns in structure.rows for _, k in columns)


def _number(value):
    return float(value) if value.ndim == 0 else value
