"""Centre inpainting of ImageNet at 256x256 with DBIM (Zheng et al., arXiv 2405.15885), at the paper's scale.

    python -m diffusion_jax train --config=configs/dbim/imagenet_inpainting.py --workdir=runs/imagenet \\
        --config.data.root=/path/to/imagenet

`root` holds the images in folders `train` and `test`, a subfolder a class. The hole is the middle 128x128,
grey in the source. Class-conditional; I2SB's schedule and network output (arXiv 2302.05872) with the
source as a further input; the loss counts in the hole, where alone predictions are taken. Hardware: 8
accelerators, 400k steps, about two weeks on A100s by the authors' account (built and shape-checked here,
not run). The paper reports FID 4.51 at 10 network calls (order 3: 4.34) and 3.91 at 100, DDBM's sampler
6.46 at 100. Deviation: the authors begin with the parameters of ADM's ImageNet model. Small twin:
configs/digits/inpaint.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "paired",
            "data": "image_folder",
            "root": "imagenet",
            "size": 256,
            "corruption": "inpaint",
            "options": {"size": 128, "fill": 0.0},
        },
        process={"name": "i2sb", "beta_min": 0.1, "beta_max": 1.0},
        network=common.adm("dbim-imagenet-256x256"),
        method={
            "name": "bridge",
            "parameterization": "i2sb",
            "masked": True,
            "sampler": "dbim",
            "nfe": 10,
        },
        train=common.train(
            steps=400_000, batch_size=256, optimizer="radam", learning_rate=1e-4, every=10_000
        ),
        evaluate={
            "samplers": (
                {"name": "dbim", "nfe": 10},
                {"name": "dbim", "nfe": 10, "order": 3},
                {"name": "dbim", "nfe": 100},
                {"name": "ddbm_heun", "nfe": 101},
            )
        },
    )
