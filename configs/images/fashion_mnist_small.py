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
        network=common.small_dit(width=128, depth=5),
        method=common.edm_score(sigma_data=0.7),
        train=common.small_train(
            steps=2500,
            every=1000,
            learning_rate=1.5e-3,
            schedule={"name": "cosine", "warmup_steps": 200},
            ema=(0.995,),
            augment=("flip",),
        ),
        evaluate={"num": 2000},
    )
