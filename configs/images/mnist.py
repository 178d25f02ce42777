"""Class-conditional score model of MNIST (28x28 grey), EDM recipe on a VP schedule.

    python -m diffusion_jax.data.prepare --name=mnist --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/images/mnist.py --workdir=runs/mnist

Hardware: one GPU, half an hour, or an evening on a few CPU cores (an estimate; not measured here).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "mnist"},
        process={"name": "vp"},
        network={
            "name": "unet",
            "channels": 32,
            "channel_mults": (1, 2, 2),
            "num_res_blocks": 2,
            "attention_resolutions": (14,),
            "heads": 4,
            "dropout": 0.1,
            "dtype": "float32",
        },
        method={
            "name": "score",
            "parameterization": "edm",
            "weighting": "edm",
            "sigma_data": 0.7,
            "guidance": 1.0,
            "sampler": "dpmpp_2m",
            "nfe": 20,
        },
        train=common.train(
            steps=20_000,
            batch_size=128,
            learning_rate=2e-4,
            schedule={"name": "warmup", "warmup_steps": 5000},
            every=5000,
            augment=(),
        ),
        evaluate={"num": 10_000},
    )
