"""MD4 on the characters of any text file: a cosine schedule and a network that sees the time.

    python -m diffusion_jax train --config=configs/text/md4.py --workdir=runs/md4 \\
        --config.data.path=some.txt

Hardware: 2 CPU cores, about 10 minutes for 2,000 steps. Full scale: configs/md4/text8.py. With
`--config.method.objective=count` the same network trains on a bound of less variance, and
`--config.method.objective=finite` on MD4's for a number of steps.
"""

from configs import common
from configs.text import characters


def get_config():
    """The config; override with `--config.section.field=value`."""
    config = characters.get_config()
    config.process = {
        "name": "absorbing",
        "schedule": {"name": "cosine", "eps_start": 1e-4, "eps_end": 1e-4},
        "t_min": 0.0,
    }
    config.network.time_conditioned = True
    config.method = {
        "name": "masked",
        "objective": "continuous",
        "label_dropout": 0.0,
        "sampler": "masked_ancestral",
        "nfe": 64,
    }
    return common.config(**config)
