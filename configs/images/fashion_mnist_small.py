"""Class-conditional score model of Fashion-MNIST that two CPU cores can train.

    python -m diffusion_jax.data.prepare --name=fashion_mnist --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/images/fashion_mnist_small.py --workdir=runs/fashion

Hardware: 2 CPU cores. Time: about 10 minutes. The small twin of `fashion_mnist.py`.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "fashion_mnist"},
        process={"name": "vp"},
        network={
            "name": "dit",
            "patch_size": 4,
            "width": 128,
            "depth": 5,
            "heads": 2,
            "remat": True,
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
            steps=2500,
            batch_size=64,
            learning_rate=1.5e-3,
            schedule={"name": "cosine", "warmup_steps": 200},
            ema=(0.995,),
            every=1000,
            augment=("flip",),
        ),
        evaluate={"num": 2000},
    )
