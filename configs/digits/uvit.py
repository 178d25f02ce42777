"""U-ViT (arXiv 2209.12152), small, on scikit-learn's digits (8x8).

    python -m diffusion_jax train --config=configs/digits/uvit.py --workdir=runs/uvit

Class-conditional, VP schedule, the noise predicted, as the authors train it. Hardware: 2 CPU cores. Time:
four minutes. Expected: class accuracy of samples 0.95 with DPM-Solver++(2M) (real digits 0.99). It begins
with small weights, and the conditions are tokens among others: for the first hundreds of steps little is
learned, and patches of 2 pixels want many more. Full scale: configs/uvit/cifar10.py,
configs/uvit/imagenet.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits"},
        process={"name": "vp"},
        network={
            "name": "uvit",
            "patch_size": 4,
            "width": 128,
            "depth": 4,
            "heads": 4,
            "time_scale": 999.0,
            "remat": "full",
        },
        method={
            "name": "score",
            "parameterization": "eps",
            "weighting": "eps",
            "label_dropout": 0.1,
            "sampler": "dpmpp_2m",
            "nfe": 50,
        },
        train=common.small_train(steps=3000, every=1000),
        evaluate={
            "samplers": (
                {"name": "dpmpp_2m", "nfe": 20},
                {"name": "dpmpp_2m", "nfe": 50},
                {"name": "euler_maruyama", "nfe": 200},
            )
        },
    )
