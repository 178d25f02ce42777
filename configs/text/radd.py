"""A time-free masked model of characters, RADD (arXiv 2406.03736), small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/text/radd.py --workdir=runs/radd

On the source of Python's standard library, which every installation has. Hardware: 1 CPU core, about 5
minutes for 1,500 steps. Full scale: configs/radd/openwebtext.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "standard_library", "length": 64, "stride": 16},
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 128,
            "depth": 4,
            "heads": 4,
            "max_length": 64,
            "time_conditioned": False,
        },
        method={
            "name": "masked",
            "objective": "count",
            "label_dropout": 0.0,
            "sampler": "first_hitting",
        },
        train=common.small_train(
            steps=1500,
            every=250,
            batch_size=16,
            optimizer="adamw",
            learning_rate=2e-3,
            ema=(0.995,),
        ),
        evaluate={"draws": 16, "num": 512},
    )
