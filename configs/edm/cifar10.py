"""EDM on CIFAR-10, class-conditional (Karras et al., arXiv 2206.00364), at the paper's scale.

    python -m diffusion_jax train --config=configs/edm/cifar10.py --workdir=runs/edm

Hardware: 8 accelerators, 200 million images. The paper reports FID 1.79 with 35 network calls. Small
twin: configs/digits/score.py. Deviations: flips instead of the augmentation pipeline, of which the network is
then not told; an average of constant decay.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "cifar10"},
        process={"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
        network={"name": "song_unet", "size": "cifar10-32x32-cond-vp", "augment_dim": 0},
        method={
            "name": "score",
            "parameterization": "edm",
            "weighting": "edm",
            "times": "log_normal",
            "times_options": {"mean": -1.2, "std": 1.2},
            "sigma_data": 0.5,
            "label_dropout": 0.0,
            "clip": False,
            "sampler": "edm_heun",
            "nfe": 35,
        },
        train=common.train(
            steps=390_000,
            batch_size=512,
            learning_rate=1e-3,
            schedule={"name": "warmup", "warmup_steps": 20_000},
            ema=(0.9993,),
            every=20_000,
            augment=("flip",),
        ),
        evaluate={"num": 50_000},
    )
