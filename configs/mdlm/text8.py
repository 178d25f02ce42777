"""Masked diffusion on text8 characters, MDLM and MD4 (arXiv 2406.07524, 2406.04329), at the papers' scale.

    python -m diffusion_jax train --config=configs/mdlm/text8.py --workdir=runs/text8 \\
        --config.data.path=/path/to/text8

Hardware: 8 accelerators, 1M steps of batch 512 at length 256. MD4 reports at most 1.37 bits per
character. Small twin: configs/digits/masked.py, and configs/text/characters.py for any text file.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "text", "path": "text8", "length": 256, "clean": "text8"},
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 768,
            "depth": 12,
            "heads": 12,
            "max_length": 256,
            "dropout": 0.05,
            "time_conditioned": False,
        },
        method={
            "name": "masked",
            "objective": "continuous",
            "label_dropout": 0.0,
            "sampler": "masked_ancestral",
            "nfe": 256,
        },
        train=common.train(
            steps=1_000_000,
            batch_size=512,
            optimizer="adamw",
            learning_rate=5e-4,
            b2=0.999,
            weight_decay=0.03,
            schedule={"name": "cosine", "warmup_steps": 2000},
            every=10_000,
        ),
        evaluate={"draws": 64},
    )
