"""MMD-DDM (arXiv 2301.07969) on scikit-learn's digits: a score model fine-tuned for 5 calls of DDIM.

    python -m diffusion_jax train --config=configs/digits/score.py --workdir=runs/score
    python -m diffusion_jax train --config=configs/digits/mmd_ddm.py --workdir=runs/mmd_ddm \
        --config.train.init_from=runs/score

Hardware: 2 CPU cores. Time: about a minute after the score model's. Features are the pixels; for others
write a classifier with `evaluation.load_or_train` and name its file in `config.method.features`. Expected:
experiments/mmd_ddm.
"""

from configs import common
from configs.digits import score


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = score.get_config()
    return common.config(
        data=base.data,
        process=base.process,
        network=base.network,
        method={
            "name": "mmd",
            "parameterization": base.method.parameterization,
            "sigma_data": base.method.sigma_data,
            "sampler": "ddim",
            "nfe": 5,
            "kernel": "polynomial",
            "kernel_options": {"degree": 3},
            "features": "pixels",
            "saturation": "straight_through",
        },
        train=common.train(
            steps=100,
            batch_size=256,
            learning_rate=2e-4,
            clip_norm=0.5,
            ema=(),
            every=50,
            init_from="runs/score",
        ),
        evaluate={"samplers": ({"name": "ddim", "nfe": 5},)},
    )
