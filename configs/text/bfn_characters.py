"""Bayesian flow network on the characters of any text file, small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/text/bfn_characters.py --workdir=runs/bfn_text \\
        --config.data.path=some.txt

Hardware: 2 CPU cores, about 3 minutes for 700 steps. Full scale: configs/bfn/text8.py.
"""

from configs import common
from configs.text import characters


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data=characters.get_config().data,
        process={"name": "bfn_discrete", "beta1": 0.75},
        network={"name": "token_transformer", "width": 128, "depth": 3, "heads": 4},
        method={
            "name": "bayesian_flow",
            "label_dropout": 0.0,
            "sampler": "bfn_sde2m",
            "nfe": 20,
        },
        train=common.small_train(
            steps=700, every=350, batch_size=32, optimizer="adamw", learning_rate=1e-3
        ),
        evaluate={
            "samplers": ({"name": "bfn", "nfe": 21}, {"name": "bfn_sde2m", "nfe": 20}),
            "draws": 8,
        },
    )
