"""Stochastic interpolant on Oxford flowers at 128x128, a data set of arXiv 2303.08797.

    python -m diffusion_jax.data.prepare --name=oxford_flowers102 --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/interpolants/flowers.py --workdir=runs/flowers

Hardware: 8 accelerators, about a day (an estimate; not measured here). The paper shows pictures of this set
and gives no figure; sizes of network and run are of this library. Small twin:
configs/digits/interpolant.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "oxford_flowers102", "size": 128},
        process={"name": "interpolant", "path": "linear", "gamma": "brownian"},
        network={
            "name": "unet",
            "channels": 128,
            "channel_mults": (1, 1, 2, 3, 4),
            "num_res_blocks": 2,
            "attention_resolutions": (16, 8),
            "heads": 4,
            "dropout": 0.1,
            "remat": "full",
        },
        method={
            "name": "interpolant",
            "coupling": "noise",
            "targets": ("velocity", "denoiser"),
            "label_dropout": 0.1,
            "sampler": "interpolant_heun",
            "nfe": 100,
        },
        train=common.train(
            steps=300_000,
            batch_size=128,
            learning_rate=1e-4,
            schedule={"name": "warmup", "warmup_steps": 5000},
            every=5000,
            augment=("flip",),
        ),
        evaluate={
            "samplers": tuple(
                {"name": "interpolant_euler", "nfe": 250, "epsilon": epsilon}
                for epsilon in (0.0, 0.25, 1.0)
            )
        },
    )
