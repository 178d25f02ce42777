"""Class-conditional score model of CIFAR-10 (32x32 colour), EDM recipe on a VP schedule.

    python -m diffusion_jax.data.prepare --name=cifar10 --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/images/cifar10.py --workdir=runs/cifar10

Hardware: 8 accelerators, about a day (an estimate; not measured here).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "cifar10"},
        process={"name": "vp"},
        network={
            "name": "unet",
            "channels": 128,
            "channel_mults": (1, 2, 2, 2),
            "num_res_blocks": 3,
            "attention_resolutions": (16,),
            "heads": 4,
            "dropout": 0.1,
            "dtype": "float32",
        },
        method={
            "name": "score",
            "parameterization": "edm",
            "weighting": "edm",
            "sigma_data": 0.5,
            "guidance": 1.0,
            "sampler": "dpmpp_2m",
            "nfe": 20,
        },
        train=common.train(
            steps=500_000,
            batch_size=512,
            learning_rate=2e-4,
            schedule={"name": "warmup", "warmup_steps": 5000},
            every=5000,
            augment=("flip",),
        ),
        evaluate={"num": 10_000},
    )
