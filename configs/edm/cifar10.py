"""EDM on CIFAR-10, class-conditional (Karras et al., arXiv 2206.00364), at the paper's scale.

    python -m diffusion_jax train --config=configs/edm/cifar10.py --workdir=runs/edm

Hardware: 8 accelerators, 200 million images. The paper reports FID 1.79 with 35 network calls. Small
twin: configs/digits/score.py. Deviations: this library's U-Net blocks; flips instead of the
augmentation pipeline; an average of constant decay.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "cifar10"},
        process={"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
        network={
            "name": "unet",
            "channels": 128,
            "channel_mults": (2, 2, 2),
            "num_res_blocks": 4,
            "attention_resolutions": (16,),
            "heads": 1,
            "dropout": 0.13,
        },
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
