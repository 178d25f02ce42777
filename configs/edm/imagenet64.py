"""EDM on ImageNet at 64x64, class-conditional (Karras et al., arXiv 2206.00364), at the paper's scale.

    python -m diffusion_jax train --config=configs/edm/imagenet64.py --workdir=runs/edm_imagenet \\
        --config.data.root=/path/to/imagenet

`root` holds folders `train` and `test` with a folder for each class. ADM's U-Net in EDM's form. Hardware: 32
accelerators, 2,500 million images. The paper reports FID 1.36 with 511 network calls of the stochastic
sampler. Small twin: configs/digits/score.py. Deviations: bfloat16 instead of float16 and its loss scaling; an
average of constant decay.
"""

from configs import common

BATCH = 4096
IMAGES = 2_500_000_000
WARMUP = 10_000_000  # images
HALF_LIFE = 50_000_000  # of the average, in images


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "image_folder", "root": "imagenet", "size": 64},
        process={"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
        network=common.adm("edm-imagenet-64x64-cond"),
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
            "nfe": 511,
            "sampler_options": {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003},
        },
        train=common.train(
            steps=IMAGES // BATCH,
            batch_size=BATCH,
            learning_rate=1e-4,
            schedule={"name": "warmup", "warmup_steps": WARMUP // BATCH},
            ema=(0.5 ** (BATCH / HALF_LIFE),),
            every=10_000,
        ),
        evaluate={"num": 50_000},
    )
