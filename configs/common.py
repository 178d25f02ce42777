"""What configs share: the `train` section with every field that an override may want to name."""

from typing import Any

from ml_collections import ConfigDict


def train(
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    optimizer: str = "adam",
    schedule: dict[str, Any] | None = None,
    clip_norm: float = 1.0,
    ema: tuple[float, ...] = (0.9999,),
    every: int = 1000,
    augment: tuple[str, ...] = (),
    init_from: str = "",
    **options: Any,
) -> dict[str, Any]:
    """The section `train`; `every` is the period of samples and checkpoints, `options` the optimiser's."""
    return {
        "steps": steps,
        "batch_size": batch_size,
        "seed": 0,
        "optimizer": {
            "name": optimizer,
            "learning_rate": learning_rate,
            "schedule": schedule or {"name": "constant", "warmup_steps": 0},
            "clip_norm": clip_norm,
            **options,
        },
        "ema": ema,
        "ema_warmup": False,
        "microbatches": 1,
        "augment": augment,
        "log_every": min(100, every),
        "sample_every": every,
        "checkpoint_every": every,
        "keep": 3,
        "parallel": {"mode": "jit", "distributed": False, "data": -1, "fsdp": 1, "model": 1},
        "progress": True,
        "tensorboard": True,
        "init_from": init_from,
    }


def config(**sections: Any) -> ConfigDict:
    """A config from its sections."""
    return ConfigDict(sections)
