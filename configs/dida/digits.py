"""DiDA (arXiv 2510.26583) on scikit-learn's digits: an autoregressive model taught to fill in 16 pixels at once.

    python -m diffusion_jax train --config=configs/dida/autoregressive.py --workdir=runs/digits_ar
    python -m diffusion_jax train --config=configs/dida/digits.py --workdir=runs/digits_dida \\
        --config.train.init_from=runs/digits_ar

Hardware: one CPU core. Time: two minutes. Expected: experiments/dida. Full scale: configs/dida/image_tokens.py.
"""

from configs import common
from configs.dida import autoregressive


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = autoregressive.get_config()
    return common.config(
        data=base.data,
        process=base.process,
        network=base.network.to_dict() | {"block_size": 16},
        method={
            "name": "dida",
            "next_token": 1.0,
            "objective": "count",
            "sampler": "block_decoding",
            "nfe": 16,
        },
        train=common.small_train(
            steps=800,
            every=400,
            batch_size=32,
            learning_rate=2e-3,
            optimizer="adamw",
            weight_decay=0.01,
            init_from="runs/digits_ar",
        ),
        evaluate={
            "samplers": (
                {"name": "block_decoding", "nfe": 4},
                {"name": "block_decoding", "nfe": 16},
                {"name": "block_decoding", "nfe": 64},
            ),
            "draws": 4,
        },
    )
