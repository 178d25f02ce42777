"""Official weights in, a run folder out: what `sample`, `evaluate` and `likelihood` take, and `init_from`.

    python -m diffusion_jax.interop.import_torch PRESET FILE --workdir=RUN
    python -m diffusion_jax.interop.import_torch list

A preset is a published checkpoint: it knows the network, the process, the parameterization and the sampler,
and `list` says where its file comes from. Nothing is downloaded. FILE is `.safetensors`, or a `.pt`, `.pth`,
`.ckpt` or `.bin` of PyTorch's, which needs torch (pip install 'diffusion_jax[torch]'). Only arrays are read:
a file with code in it is refused.

    python -m diffusion_jax.interop.import_torch DiT-XL-2-256x256 DiT-XL-2-256x256.pt --workdir=runs/dit
    python -m diffusion_jax sample --workdir=runs/dit --num=8 --label=207 --out=latents.npz

Weights of one's own, of any network that has an official layout (`python -m diffusion_jax list networks`),
come with a config in place of a preset; data that are not here are described in it:

    python -m diffusion_jax.interop.import_torch FILE --workdir=RUN --config=my.py
        data = {"name": "described", "kind": "image", "shape": (32, 32, 3), "num_classes": 10}

The way back writes the official state dict of a run's weights, the averaged ones where there are any:

    python -m diffusion_jax.interop.import_torch --export=FILE.safetensors --workdir=RUN

Nothing is written unless all of the file fits.
"""

import argparse
import inspect
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import builder, commands, registry
from diffusion_jax import run as runs
from diffusion_jax.data.source import DataSpec
from diffusion_jax.interop import files, presets
from diffusion_jax.interop.mapping import Weights, WeightsError, export_state, import_state
from diffusion_jax.methods.told import Told
from diffusion_jax.training import Checkpoints, TrainConfig
from diffusion_jax.training.runfolder import CONFIG, open_run
from diffusion_jax.training.state import RUNNING, TrainState


class Imported(NamedTuple):
    """What was done.

    Attributes:
      parameters: their number.
      arrays: arrays of the file that hold them.
      left_out: arrays of the file that belong to something else than the network.
    """

    parameters: int
    arrays: int
    left_out: tuple[str, ...]


def layout(config: Mapping[str, Any], built: builder.Built) -> Weights:
    """The official layout of the network of a config.

    Raises:
      ConfigError: a network without one, or fields of it that official weights do not have.
    """
    name, _ = builder.section(config, "network")
    try:
        build = registry.get("weights", name)
    except registry.UnknownName as error:
        names = ", ".join(registry.names("weights"))
        raise builder.ConfigError(
            f"config.network.name: {name!r} has no official weights; networks that have: {names}"
        ) from error
    shape = built.spec.shape
    known = {"image_size": shape[0], "resolution": min(shape[:2])}
    takes = inspect.signature(build).parameters
    try:
        return build(
            built.module.module if isinstance(built.module, Told) else built.module,
            **{name: value for name, value in known.items() if name in takes},
        )
    except ValueError as error:
        raise builder.ConfigError(f"config.network: {error}") from error


def abstract_params(built: builder.Built) -> Any:
    """Shapes of the parameters; nothing is computed."""
    return jax.eval_shape(built.method.init, jax.random.key(0), built.spec.zeros(2))


def import_run(
    config: Mapping[str, Any],
    spec: DataSpec,
    file: str | pathlib.Path,
    workdir: str | pathlib.Path,
    *,
    key: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Imported:
    """Makes a run folder of a file of official weights.

    Args:
      config: sections `process`, `network`, `method`, and perhaps `data` and `evaluate`.
      spec: of the data that the model learned.
      file, key: see `files.read_state`.
      workdir: a folder without a run.
      about: plain data, kept in the checkpoint beside the file's name.
      progress: show a progress bar when standard error is a terminal.

    Raises:
      ConfigError: a config that cannot be built, or a network without official weights.
      FileError, ImportError: a file that cannot be read.
      WeightsError: weights of another network or size.
      ValueError: a folder that holds a run already.
    """
    workdir, file = pathlib.Path(workdir), pathlib.Path(file).expanduser()
    if (workdir / CONFIG).exists() or (workdir / "checkpoints").exists():
        raise ValueError(f"{workdir} holds a run already; name another folder")
    config = builder.to_plain(config)
    built = builder.build_method(config, spec)
    weights, shapes = layout(config, built), abstract_params(built)
    names = set(weights.names())
    state = files.read_state(file, key, names=names, progress=progress)
    state, outside = files.without_prefix(state, names)
    params = import_state(weights, state, shapes)
    del state

    train = TrainConfig(ema=(), steps=0).to_dict()
    runs.write_spec(workdir, spec)
    open_run(workdir, {**config, "train": train}, started=False)
    made = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={},
        opt_state=(),
        method_state=None,
        halt=jnp.full((), RUNNING, jnp.int32),
    )
    extra = {"default_item": "params", "imported": {"file": file.name, **(about or {})}}
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(made, extra)
        checkpoints.wait()
    count = sum(np.size(leaf) for leaf in jax.tree.leaves(params))
    return Imported(count, len(names), tuple(outside))


def export_run(
    workdir: str | pathlib.Path,
    file: str | pathlib.Path,
    *,
    weights: str | None = None,
    step: int | None = None,
) -> tuple[runs.Run, int]:
    """Writes the official state dict of a run; returns the run and the number of parameters.

    Args:
      workdir, weights, step: see `run.open_run`.
      file: `.safetensors`.

    Raises:
      ValueError: as `run.open_run`; a network without official weights; another ending.
    """
    run = runs.open_run(workdir, weights, step)
    state = export_state(layout(run.config, builder.build_method(run.config, run.spec)), run.params)
    files.write_state(file, state)
    return run, sum(np.size(leaf) for leaf in jax.tree.leaves(run.params))


def changed(config: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A config with `section.field=value` settings; values are JSON where they parse, text otherwise.

    Raises:
      UsageError: a setting of another form, or of a section that is none.
    """
    config = builder.to_plain(config)
    for setting in settings:
        name, separator, value = setting.partition("=")
        section, *path = name.split(".")
        if not separator or section not in builder.SECTIONS:
            raise commands.UsageError(
                f"--set takes section.field=value with a section of {', '.join(builder.SECTIONS)};"
                f" got {setting!r}"
            )
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass
        node = config
        for part in (section, *path)[:-1]:
            node[part] = dict(node.get(part) or {})
            node = node[part]
        node[(section, *path)[-1]] = value
    return config


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m diffusion_jax.interop.import_torch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s PRESET FILE --workdir=RUN  |  FILE --config=CONFIG --workdir=RUN  |"
        "  --export=FILE --workdir=RUN  |  list",
    )
    parser.add_argument(
        "names", nargs="*", metavar="PRESET FILE", help='or "list": the presets and their files'
    )
    parser.add_argument("--workdir", help="run folder: a new one, or with --export the run")
    parser.add_argument("--key", help='where in a nested file the weights lie, such as "ema"')
    parser.add_argument(
        "--tokenizer", help="tokenizer.json that numbered a text model's tokens, to read samples"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change the config, such as method.nfe=50 or data.root=/path; may be repeated",
    )
    parser.add_argument(
        "--export", metavar="FILE", help=".safetensors to write a run's official state dict to"
    )
    parser.add_argument("--weights", help='--export: "params" or "ema_<decay>" (the first average)')
    parser.add_argument("--step", type=int, help="--export: of the checkpoint (the newest)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _import(arguments: argparse.Namespace, rest: list[str]) -> int:
    named = any(argument.startswith("--config=") for argument in rest)
    if len(arguments.names) != (1 if named else 2):
        wanted = "FILE with --config" if named else "PRESET FILE, or FILE with --config=CONFIG"
        raise commands.UsageError(f"needs {wanted}; got {arguments.names}; see --help")
    *preset, file = arguments.names
    about: dict[str, Any] = {}
    if named:
        config = changed(commands.load_config(rest), arguments.set)
        if arguments.tokenizer:
            config = changed(config, [f"data.tokenizer={arguments.tokenizer}"])
        spec, key = builder.build_data(config, "train").spec, arguments.key
    else:
        commands.refuse(rest)
        found = presets.get(preset[0])
        about = {"preset": preset[0]}
        config = changed(found.config(), arguments.set)
        spec, key = found.spec(arguments.tokenizer), arguments.key or found.key
    done = import_run(config, spec, file, arguments.workdir, key=key, about=about, progress=True)
    print(f"{done.parameters:,} parameters in {done.arrays} arrays of {file}: {arguments.workdir}")
    if done.left_out:
        more = f" and {len(done.left_out) - 1} more" if len(done.left_out) > 1 else ""
        print(f"left out, of something else than the network: {done.left_out[0]}{more}")
    shown = "samples.png" if spec.show in ("image", "pixels", "mel") else "samples.npz"
    shown = "samples.txt" if spec.show in ("tokenizer", "text", "bytes") else shown
    print(
        f"next: python -m diffusion_jax sample --workdir={arguments.workdir} --num=16 --out={shown}"
    )
    if "source" in spec.elements:
        print(
            "it starts from sources: name their data set with --set data.root=... if it is not yet"
        )
    print(f"to go on training: a config with this network and train.init_from={arguments.workdir}")
    return 0


def _export(arguments: argparse.Namespace, rest: list[str]) -> int:
    commands.refuse([*arguments.names, *rest])
    options = {"weights": arguments.weights, "step": arguments.step}
    run, count = export_run(arguments.workdir, arguments.export, **options)
    print(f"{count:,} parameters of {run.weights} at step {run.step}: {arguments.export}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    arguments, rest = build_parser().parse_known_args(argv)
    try:
        if arguments.names == ["list"]:
            commands.refuse(rest)
            print(presets.table())
            return 0
        if arguments.workdir is None:
            raise commands.UsageError("--workdir=RUN is required; see --help")
        return (_export if arguments.export else _import)(arguments, rest)
    except (ValueError, ImportError, OSError) as error:
        if arguments.debug:
            raise
        lines = str(error) if isinstance(error, WeightsError) else " ".join(str(error).split())
        print(f"import_torch: {lines}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
