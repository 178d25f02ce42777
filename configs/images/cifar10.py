"""Class-conditional score model of CIFAR-10 (32x32 colour), EDM recipe on a VP schedule.

    python -m diffusion_jax.data.prepare --name=cifar10 --data_dir=~/tensorflow_datasets
    python -m diffusion_jax train --config=configs/images/cifar10.py --workdir=runs/cifar10

Hardware: 8 accelerators, about a day (an estimate; not measured here).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.image_score(
        "cifar10",
        channels=128,
        channel_mults=(1, 2, 2, 2),
        num_res_blocks=3,
        attention=16,
        sigma_data=0.5,
        steps=500_000,
        batch_size=512,
    )
