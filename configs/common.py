"""What configs share: sections with every field that an override may want to name."""

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
        "parallel": {
            "mode": "jit",
            "distributed": False,
            "data": -1,
            "fsdp": 1,
            "model": 1,
            "rules": "auto",
        },
        "progress": True,
        "tensorboard": True,
        "init_from": init_from,
        "compilation_cache": "",
        "profile": {"first": 10, "steps": 0, "processes": "first"},
    }


def small_dit(**fields: Any) -> dict[str, Any]:
    """The section `network` of a transformer that two CPU cores train on 8x8 images in minutes."""
    return {
        "name": "dit",
        "patch_size": 4,
        "width": 96,
        "depth": 4,
        "heads": 2,
        "time_features": 64,
        "condition_stddev": None,  # learns labels within minutes
        "remat": "full",
    } | fields


def small_token_transformer(**fields: Any) -> dict[str, Any]:
    """The section `network` of a transformer over the 64 tokens of an 8x8 image, for two CPU cores."""
    return {
        "name": "token_transformer",
        "width": 64,
        "depth": 2,
        "heads": 2,
        "remat": "full",
        "positions": "learned",
        "max_length": 64,
    } | fields


def base_token_transformer(**fields: Any) -> dict[str, Any]:
    """The section `network` of a text model of 12 layers, of the size of SEDD's, MDLM's and RADD's."""
    return {
        "name": "token_transformer",
        "width": 768,
        "depth": 12,
        "heads": 12,
        "time_conditioned": False,
        "dtype": "bfloat16",
        "remat": "full",
    } | fields


def official_token_transformer(size: str, **fields: Any) -> dict[str, Any]:
    """The section `network` of SEDD's, MDLM's or RADD's own model, a size of the network `ddit`."""
    return {"name": "ddit", "size": size, "dtype": "bfloat16", "remat": "full"} | fields


def text_train(*, steps: int) -> dict[str, Any]:
    """The section `train` of a text model, as SEDD, MDLM and RADD have it: batch 512, AdamW at 3e-4."""
    return train(
        steps=steps,
        batch_size=512,
        optimizer="adamw",
        learning_rate=3e-4,
        weight_decay=0.0,
        schedule={"name": "warmup", "warmup_steps": 2500},
        every=10_000,
    )


def small_tokens(data: dict[str, Any], *, length: int) -> ConfigDict:
    """A masked model of rows of tokens that two CPU cores train in minutes."""
    return config(
        data=data,
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 128,
            "depth": 4,
            "heads": 4,
            "max_length": length,
            "time_conditioned": False,
        },
        method={
            "name": "masked",
            "objective": "count",
            "label_dropout": 0.0,
            "sampler": "first_hitting",
        },
        train=small_train(
            steps=1500,
            every=500,
            optimizer="adamw",
            learning_rate=2e-3,
            batch_size=32,
            ema=(0.995,),
        ),
        evaluate={"draws": 16},
    )


def small_sequences(*, path: str, length: int, **options: Any) -> ConfigDict:
    """`small_tokens` of the sequences of a file; `options` are those of `data.sequences`."""
    usual = {
        "name": "sequences",
        "path": path,
        "length": length,
        "test_path": "",
        "alphabet": "file",
        "unit": "characters",
        "column": "",
        "label": "",
        "long": "cut",
        "unknown": "error",
    }
    return small_tokens(usual | options, length=length)


def small_train(*, steps: int, every: int, **options: Any) -> dict[str, Any]:
    """The section `train` of a run of minutes on two CPU cores: `train` with a cosine to its end."""
    usual = {
        "batch_size": 64,
        "learning_rate": 2e-3,
        "schedule": {"name": "cosine", "warmup_steps": 100},
        "ema": (0.99,),
    }
    return train(steps=steps, every=every, **(usual | options))


def edm_score(*, sigma_data: float, **fields: Any) -> dict[str, Any]:
    """The section `method` of a score model in EDM's parameterisation, sampled by DPM-Solver++(2M)."""
    return {
        "name": "score",
        "parameterization": "edm",
        "weighting": "edm",
        "sigma_data": sigma_data,
        "guidance": 1.0,
        "sampler": "dpmpp_2m",
        "nfe": 20,
    } | fields


def image_score(
    dataset: str,
    *,
    channels: int,
    channel_mults: tuple[int, ...],
    num_res_blocks: int,
    attention: int,
    sigma_data: float,
    steps: int,
    batch_size: int,
    augment: tuple[str, ...] = ("flip",),
) -> ConfigDict:
    """A class-conditional score model of a TFDS image set: U-Net, EDM recipe, VP schedule.

    `attention` is the resolution that has it; sizes are those of the network and the run.
    """
    return config(
        data={"name": "tfds", "dataset": dataset},
        process={"name": "vp"},
        network={
            "name": "unet",
            "channels": channels,
            "channel_mults": channel_mults,
            "num_res_blocks": num_res_blocks,
            "attention_resolutions": (attention,),
            "heads": 4,
            "dropout": 0.1,
            "dtype": "float32",
        },
        method=edm_score(sigma_data=sigma_data),
        train=train(
            steps=steps,
            batch_size=batch_size,
            learning_rate=2e-4,
            schedule={"name": "warmup", "warmup_steps": 5000},
            every=5000,
            augment=augment,
        ),
        evaluate={"num": 10_000},
    )


def image_latents(path: str = "latents/train.npz", **options: Any) -> dict[str, Any]:
    """The section `data` of ImageNet's latents, made beforehand: arrays "image" and "label"."""
    return {
        "name": "arrays",
        "path": path,
        "num_classes": 1000,
        "test_fraction": 0.01,
        "bounded": False,
        "max_bytes": 2**37,
    } | options


def adm(size: str, **fields: Any) -> dict[str, Any]:
    """The section `network` of a published size of ADM's U-Net (arXiv 2105.05233), as bridges use it."""
    return {"name": "adm_unet", "size": size, "dtype": "bfloat16", "remat": "full"} | fields


def config(**sections: Any) -> ConfigDict:
    """A config from its sections."""
    return ConfigDict(sections)
