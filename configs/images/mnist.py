"""Class-conditional score model of MNIST (28x28 grey), EDM recipe on a VP schedule.

    python -m diffusion_jax.data.prepare --name=mnist --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/images/mnist.py --workdir=runs/mnist

Hardware: one GPU, half an hour, or an evening on a few CPU cores (an estimate; not measured here).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.image_score(
        "mnist",
        channels=32,
        channel_mults=(1, 2, 2),
        num_res_blocks=2,
        attention=14,
        sigma_data=0.7,
        steps=20_000,
        batch_size=128,
        augment=(),
    )
