"""Score SDE, DDPM++ continuous VP on CIFAR-10 (Song et al., arXiv 2011.13456), at the paper's scale.

    python -m diffusion_jax train --config=configs/score_sde/cifar10_vp.py --workdir=runs/score_sde

Hardware: 8 accelerators, 950k steps of batch 128. The paper reports FID 2.41 for the deep model. Small
twin: configs/digits/score.py. Deviations: this library's U-Net blocks, uniform times on [1e-3, 1].
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "cifar10"},
        process={"name": "vp", "beta_min": 0.1, "beta_max": 20.0},
        network={
            "name": "unet",
            "channels": 128,
            "channel_mults": (1, 2, 2, 2),
            "num_res_blocks": 8,
            "attention_resolutions": (16,),
            "heads": 1,
            "dropout": 0.1,
            "num_classes": 0,
        },
        method={
            "name": "score",
            "parameterization": "eps",
            "weighting": "eps",
            "sampler": "ddpm",
            "nfe": 1000,
            "sampler_options": {"grid": "uniform"},
        },
        train=common.train(
            steps=950_000,
            batch_size=128,
            learning_rate=2e-4,
            schedule={"name": "warmup", "warmup_steps": 5000},
            every=50_000,
            augment=("flip",),
        ),
        evaluate={"num": 50_000},
    )
