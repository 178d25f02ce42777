"""`TrainConfig`: everything the training loop can be told, checked once, as plain data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_jax.registry import check_choice, closest

_OPTIMIZER = {"name": "adam", "learning_rate": 1e-3, "clip_norm": 1.0}
_PROFILE = {"first": 10, "steps": 0, "processes": "first"}


def plain(value: Any) -> Any:
    """Dicts, lists and scalars of a nested mapping (`ConfigDict` included), as JSON would hold it.

    Raises:
      TypeError: a value that JSON cannot hold.
    """
    if hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a config holds numbers, strings, lists and mappings; got {value!r}")


def check_keys(what: str, given: Mapping[str, Any], valid) -> None:
    """Raises ValueError for the first key of `given` that is not in `valid`."""
    for key in given:
        if key not in valid:
            raise ValueError(f"unknown {what} {key!r}{closest(key, valid)}")


def profile_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `profiling.Profile` with defaults.

    Raises:
      ValueError: an unknown field or a value out of range.
    """
    check_keys("train.profile field", given, _PROFILE)
    options = {**_PROFILE, **given}
    for name in ("first", "steps"):
        value = options[name]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"train.profile.{name} must be an integer >= 0; got {value!r}")
    check_choice("train.profile.processes", options["processes"], ("first", "all"))
    return options


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What `train` does, apart from the method and the data.

    Attributes:
      steps: number of updates; a run that has done fewer goes on.
      batch_size: size of the global batch, over all devices and hosts.
      seed: the base key is `jax.random.key(seed)`; step `n` uses `fold_in(base, n)`.
      optimizer: see `optim.make_optimizer`.
      ema: decays of the averaged parameters; the first is what the loss sees as `context.ema` and
        what samples are drawn with. Empty: none.
      ema_warmup: True: the decay is min(decay, (1 + t) / (10 + t)) after t updates. "power": averages of
        power-function profiles, of which `ema` are the relative widths (see `power_ema`).
      microbatches: number of parts the batch is computed in, one after the other (less memory, the
        same gradient).
      log_every: steps between rows of metrics (means over those steps).
      sample_every: steps between sample grids, the last step included; 0: never.
      checkpoint_every: steps between checkpoints; 0: only the last step's.
      keep: number of newest checkpoints that are kept.
      parallel: see `parallel.make_layout`.
      progress: show a progress bar when standard error is a terminal.
      tensorboard: write TensorBoard events when the package is installed.
      init_from: run folder whose weights (the averaged ones where there are any, of the newest
        checkpoint) are the first parameters; empty: fresh ones. A run that is resumed goes on from
        its own checkpoint and does not read that folder again.
      compilation_cache: folder in which compiled programs are kept for the next start; empty: none,
        unless JAX is told by itself (JAX_COMPILATION_CACHE_DIR).
      profile: see `profiling.Profile`.
    """

    steps: int = 10_000
    batch_size: int = 128
    seed: int = 0
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(_OPTIMIZER))
    ema: tuple[float, ...] = (0.999,)
    ema_warmup: bool | str = False
    microbatches: int = 1
    log_every: int = 100
    sample_every: int = 1000
    checkpoint_every: int = 1000
    keep: int = 3
    parallel: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    progress: bool = True
    tensorboard: bool = True
    init_from: str = ""
    compilation_cache: str = ""
    profile: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"train.{name} must be an integer >= {least}; got {value!r}")
        ema = (self.ema,) if isinstance(self.ema, int | float) else tuple(self.ema)
        object.__setattr__(self, "ema", tuple(float(d) for d in ema))
        for decay in self.ema:
            if not 0.0 <= decay < 1.0:
                raise ValueError(f"train.ema: a decay lies in [0, 1); got {decay}")
        if len(set(self.ema)) != len(self.ema):
            raise ValueError(f"train.ema: decays must differ; got {self.ema}")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of"
                f" train.microbatches {self.microbatches}"
            )
        for name in ("init_from", "compilation_cache"):
            object.__setattr__(self, name, str(getattr(self, name) or ""))
        for name in ("optimizer", "parallel", "profile"):
            object.__setattr__(self, name, plain(getattr(self, name)))
        profile_options(self.profile)

    @classmethod
    def from_mapping(cls, values: "Mapping[str, Any] | TrainConfig") -> "TrainConfig":
        """A config from a (nested) mapping; fields that are left out take their defaults.

        Raises:
          ValueError: an unknown field (with the nearest match), or a value out of range.
        """
        if isinstance(values, cls):
            return values
        check_keys("train config field", values, [f.name for f in dataclasses.fields(cls)])
        return cls(**plain(values))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_mapping` gives an equal config back."""
        values = plain(dataclasses.asdict(self))
        used = {"profile": profile_options(self.profile)["steps"]}
        for name in ("init_from", "compilation_cache", "profile"):
            if not used.get(
                name, values[name]
            ):  # not in the files of runs made before there was such a field
                del values[name]
        return values


_LEAST = {
    "steps": 0,
    "batch_size": 1,
    "seed": 0,
    "microbatches": 1,
    "log_every": 1,
    "sample_every": 0,
    "checkpoint_every": 0,
    "keep": 1,
}
