"""U-ViT-S/2 on CIFAR-10, unconditional (Bao et al., arXiv 2209.12152), at the paper's scale.

    python -m diffusion_jax train --config=configs/uvit/cifar10.py --workdir=runs/uvit

Hardware: 4 accelerators, 500k steps of batch 128 (not run here). The authors report FID 3.11 of 50,000 samples
with 1000 steps of Euler-Maruyama. The network is the official one, so that official weights continue
here. Small twin: configs/digits/uvit.py. Deviation: stratified times on [1e-3, 1].
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "cifar10"},
        process={"name": "vp", "beta_min": 0.1, "beta_max": 20.0},
        network={"name": "uvit", "size": "CIFAR-10 S/2", "time_scale": 999.0, "dtype": "bfloat16"},
        method={
            "name": "score",
            "parameterization": "eps",
            "weighting": "eps",
            "label_dropout": 0.0,
            "clip": False,
            "sampler": "euler_maruyama",
            "nfe": 1000,
            "sampler_options": {"grid": "uniform"},
        },
        train=common.train(
            steps=500_000,
            batch_size=128,
            optimizer="adamw",
            learning_rate=2e-4,
            weight_decay=0.03,
            b1=0.99,
            b2=0.999,
            schedule={"name": "warmup", "warmup_steps": 2500},
            clip_norm=0.0,
            every=50_000,
            augment=("flip",),
        ),
        evaluate={"num": 50_000},
    )
