"""Masked diffusion on the characters of any text file, small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/text/characters.py --workdir=runs/text \\
        --config.data.path=some.txt

Hardware: 2 CPU cores, about 10 minutes for 2,000 steps. Full scale: configs/mdlm/text8.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "text",
            "path": "README.md",
            "length": 64,
            "unit": "characters",
            "tokenizer": "",
            "stride": 16,
        },
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 128,
            "depth": 4,
            "heads": 4,
            "time_conditioned": False,
        },
        method={"name": "masked", "label_dropout": 0.0, "sampler": "first_hitting"},
        train=common.small_train(
            steps=2000, every=500, optimizer="adamw", learning_rate=1e-3, ema=(0.995,)
        ),
        evaluate={"draws": 16},
    )
