"""Bridge from edges to clothes: Fashion-MNIST (28x28 grey) from its own Sobel edges, on two CPU cores.

    python -m diffusion_jax.data.prepare --name=fashion_mnist --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/images/fashion_mnist_bridge.py --workdir=runs/edges

Hardware: 2 CPU cores. Time: about 6 minutes. Expected: Frechet distances in experiments/dbim/results.md.
The larger twin of configs/digits/inpaint.py and the small one of configs/ddbm/edges2handbags.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "paired",
            "data": "tfds",
            "dataset": "fashion_mnist",
            "corruption": "edges",
        },
        process={"name": "vp_bridge"},
        network=common.small_dit(num_classes=0, remat="none"),
        method={
            "name": "bridge",
            "parameterization": "ddbm",
            "sigma_data": 0.83,
            "sigma_source": 1.0,
            "covariance": 0.35,
            "sampler": "dbim",
            "nfe": 20,
        },
        train=common.small_train(steps=2000, every=1000, learning_rate=1.5e-3, ema=(0.995,)),
        evaluate={
            "num": 300,
            "samplers": (
                {"name": "dbim", "nfe": 5},
                {"name": "dbim", "nfe": 20},
                {"name": "ddbm_heun", "nfe": 101},
            ),
        },
    )
