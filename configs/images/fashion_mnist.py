"""Class-conditional score model of Fashion-MNIST (28x28 grey), EDM recipe on a VP schedule.

    python -m diffusion_jax.data.prepare --name=fashion_mnist --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/images/fashion_mnist.py --workdir=runs/fashion_mnist

Hardware: one GPU, a few hours (an estimate; not measured here).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.image_score(
        "fashion_mnist",
        channels=64,
        channel_mults=(1, 2, 2),
        num_res_blocks=2,
        attention=14,
        sigma_data=0.7,
        steps=100_000,
        batch_size=128,
    )
