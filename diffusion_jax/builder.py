"""From a config to the things it names. Each section is a `name` and the keyword arguments of it.

    config.data     = {"name": "digits", ...}
    config.process  = {"name": "vp", "beta_max": 20.0}
    config.network  = {"name": "unet", "channels": 32}
    config.method   = {"name": "score", "parameterization": "edm"}
    config.train    = fields of `training.TrainConfig`, and `augment` for the data
    config.evaluate = fields of `evaluation_options`

What the data decide (number of classes, vocabulary, source channels) is filled in from them.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from diffusion_jax import registry
from diffusion_jax.data.source import DataSpec
from diffusion_jax.methods.base import Method
from diffusion_jax.methods.told import Told

SECTIONS = ("data", "process", "network", "method", "train", "evaluate")


class ConfigError(ValueError):
    """A config that cannot be built; the message names the section, the bad value and the valid ones."""


def section(config: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """`(name, keyword arguments)` of a section.

    Raises:
      ConfigError: the section, or its name, is missing.
    """
    if name not in config or "name" not in config[name]:
        raise ConfigError(f"config.{name}.name is missing")
    options = to_plain(config[name])
    return options.pop("name"), options


def to_plain(value: Any) -> Any:
    """Nested dicts, lists and scalars of a ConfigDict."""
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(to_plain(v) for v in value)
    return value


def check_sections(config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a section that nothing reads."""
    for name in config:
        if name not in (*SECTIONS, "description"):
            raise ConfigError(f"unknown config section {name!r}{registry.closest(name, SECTIONS)}")


def construct(kind: str, config: Mapping[str, Any], name: str, *arguments: Any, **defaults: Any):
    """Calls the registered constructor of a section; `defaults` are used where the config is silent.

    Raises:
      ConfigError: an unknown name, or arguments that the constructor does not take.
    """
    chosen, options = section(config, name)
    try:
        build = registry.get(kind, chosen)
    except registry.UnknownName as error:
        raise ConfigError(f"config.{name}.name: {error}") from error
    parameters = inspect.signature(build).parameters
    if not any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        valid = [
            n for n in list(parameters)[len(arguments) :] if n not in ("parent", "name", "process")
        ]
        for key in options:
            if key not in valid:
                near = registry.closest(key, valid)
                raise ConfigError(f"config.{name}.{key}: {chosen!r} has no such argument{near}")
        defaults = {k: v for k, v in defaults.items() if k in parameters}
    try:
        return build(*arguments, **{**defaults, **options})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"config.{name}: {error}") from error


def build_data(config: Mapping[str, Any], split: str):
    """The source of a split ("train" or "test").

    Raises:
      ConfigError: see `construct`; a data set that is not prepared.
    """
    _chosen, _ = section(config, "data")
    return construct("data", config, "data", split=split)


def build_process(config: Mapping[str, Any], spec: DataSpec):
    """The forward process; the vocabulary comes from the data.

    A `schedule`, and the `base` of an h-transform, are sections of their own with a name.
    """
    options = {"vocab_size": spec.vocab_size} if spec.vocab_size else {}
    plain = to_plain(config["process"]) if "process" in config else {}
    for part, kind in (("schedule", "schedule"), ("base", "process")):
        if isinstance(plain.get(part), Mapping):
            plain = {**plain, part: construct(kind, {part: plain[part]}, part)}
            config = {**config, "process": plain}
    return construct("process", config, "process", **options)


# Scale of the network's time features where it is told c_noise instead of t: log(sigma / alpha) / 4 for
# "edm", 250 log t for "ddbm". Features that turn often within its range make a model rough in time.
_TIME_SCALES = {"edm": 16.0, "ddbm": 1.0}


def _parameterization(config: Mapping[str, Any]) -> str | None:
    """The parameterization that the config's method has, by default or by name."""
    options = to_plain(config.get("method", {}))
    name = options.get("name")
    if name not in registry.names("method"):
        return None
    default = inspect.signature(registry.get("method", name)).parameters.get("parameterization")
    return options.get("parameterization", default.default if default else None)


def build_network(config: Mapping[str, Any], spec: DataSpec):
    """The network module; classes, vocabulary, voices and source channels come from the data.

    A `time_input` is not for it, but for `build_method`.
    """
    defaults: dict[str, Any] = {"num_classes": spec.num_classes}
    if spec.vocab_size:
        defaults["vocab_size"] = spec.vocab_size
    if "text" in spec.elements:
        defaults["symbols"] = spec.sizes["text"] - 1  # 0 is padding
        voices = spec.sizes.get("speaker", 1)
        defaults["speakers"] = voices if voices > 1 else 0
        defaults["mels"] = spec.shape[-1]
    if "source" in spec.elements:
        defaults["source_channels"] = spec.elements["source"].shape[-1]
    chosen, _ = section(config, "network")
    scale = _TIME_SCALES.get(_parameterization(config))
    if scale is not None and chosen not in registry.names("network", official=True):
        defaults["time_scale"] = scale
    config = _sized(config)
    fields = {k: v for k, v in to_plain(config["network"]).items() if k != "time_input"}
    return construct("network", {**config, "network": fields}, "network", **defaults)


def _told(config: Mapping[str, Any], process: Any, module: Any) -> Any:
    """The module, told the time as `network.time_input` says.

    Raises:
      ConfigError: another word than `preconditioning.TIME_INPUTS`, one that the process does not have, or a
        parameterization that tells the network something else already.
    """
    _, fields = section(_sized(config), "network")
    kind = fields.get("time_input", "time")
    if kind == "time":
        return module
    parameterization = _parameterization(config)
    if parameterization in _TIME_SCALES:
        raise ConfigError(
            f"config.network.time_input: the parameterization {parameterization!r} tells the network the"
            f" noise already, not {kind!r}"
        )
    try:
        return Told(module, process, kind)
    except ValueError as error:
        raise ConfigError(f"config.network.time_input: {error}") from error


def _sized(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with `network.size`, a published size by name, replaced by the fields it stands for.

    Fields that the section itself names keep their values.

    Raises:
      ConfigError: a size that the network has not.
    """
    chosen, options = section(config, "network")
    if "size" not in options or chosen not in registry.names("network"):
        return config
    sizes = registry.entry("network", chosen).meta.get("sizes", {})
    size = options.pop("size")
    if size not in sizes:
        near = registry.closest(size, sizes)
        raise ConfigError(f"config.network.size: {chosen!r} has no size {size!r}{near}")
    return {**config, "network": {"name": chosen, **sizes[size], **options}}


class Built(NamedTuple):
    """What a config makes without its data: `spec`, `process`, `module` and `method`."""

    spec: DataSpec
    process: Any
    module: Any
    method: Method


def build_method(config: Mapping[str, Any], spec: DataSpec) -> Built:
    """Process, network and method for data of this spec.

    Raises:
      ConfigError: an unknown name, section or argument, or parts that do not fit one another.
    """
    check_sections(config)
    process = build_process(config, spec)
    module = _told(config, process, build_network(config, spec))
    method = construct("method", config, "method", process, module, spec)
    return Built(spec, process, module, method)
