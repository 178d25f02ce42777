"""Training: `train(method, pipeline, config, workdir)` and the pieces it is made of."""

import importlib
from typing import Any

_HOMES = {
    "config": ("TrainConfig",),
    "checkpoints": ("CheckpointError", "CheckpointMismatch", "Checkpoints", "restore_params"),
    "loop": ("NonFiniteError", "TrainResult", "train"),
    "optim": ("Optimizer", "make_optimizer", "make_schedule", "optimizer_names"),
    "agreement": ("ProcessesDiffer",),
    "parallel": ("Layout", "initialize_distributed", "make_layout"),
    "runfolder": ("ConfigChanged", "read_config"),
    "state": ("TrainState", "create_state", "ema_name", "ema_rate", "update_ema"),
    "step": ("make_train_step",),
    "trainer": ("Trainer",),
}
_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    # Orbax takes long to import; looking at a config or a schedule should not pay for it.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
