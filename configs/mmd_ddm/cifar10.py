"""MMD-DDM on CIFAR-10 (Aiello et al., arXiv 2301.07969), at the paper's scale: DDIM with 5 calls.

    python -m diffusion_jax train --config=configs/score_sde/cifar10_vp.py --workdir=runs/score_sde
    python -m diffusion_jax train --config=configs/mmd_ddm/cifar10.py --workdir=runs/mmd_ddm \
        --config.train.init_from=runs/score_sde --config.method.features=features.npz

Hardware: 1 accelerator; memory is that of one network call and its gradient at batch 64. Official values:
batch 64, Adam 5e-6, gradients clipped at 0.5, cubic kernel, no average of the weights, a few thousand
updates; the paper's FID of about 5.5 at 5 calls is in the features it trained on. Small twin:
configs/digits/mmd_ddm.py. Deviations: the starting model is this library's VP model instead of DDPM's,
features are a classifier's (`evaluation.load_or_train`) instead of Inception's, the times are
uniform in t.
"""

from configs import common
from configs.score_sde import cifar10_vp


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = cifar10_vp.get_config()
    return common.config(
        data=base.data,
        process=base.process,
        network=base.network,
        method={
            "name": "mmd",
            "parameterization": base.method.parameterization,
            "sampler": "ddim",
            "nfe": 5,
            "sampler_options": {"grid": "uniform"},
            "clip": False,
            "kernel": "polynomial",
            "kernel_options": {"degree": 3},
            "features": "pixels",
            "feature_layer": "features",
            "saturation": "hard",
        },
        train=common.train(
            steps=3000,
            batch_size=64,
            learning_rate=5e-6,
            clip_norm=0.5,
            ema=(),
            every=50,
            augment=("flip",),
            init_from="runs/score_sde",
        ),
        evaluate={"num": 50_000, "samplers": ({"name": "ddim", "nfe": 5, "grid": "uniform"},)},
    )
