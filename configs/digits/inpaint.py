"""Bridge that fills a hole of 24 pixels in scikit-learn's digits (8x8): the yardstick of `experiments/dbim`.

    python -m diffusion_jax train --config=configs/digits/inpaint.py --workdir=runs/inpaint

Hardware: 2 CPU cores. Time: about 3 minutes. Expected: Frechet distances in
experiments/dbim/results.md.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "paired",
            "data": "digits",
            "corruption": "inpaint",
            "options": {"size": (4, 6)},
        },
        process={"name": "vp_bridge"},
        network=common.small_dit(num_classes=0),
        method={
            "name": "bridge",
            "parameterization": "ddbm",
            "sigma_data": 0.85,
            "sigma_source": 0.69,
            "covariance": 0.48,
            "masked": True,
            "sampler": "dbim",
            "nfe": 20,
        },
        train=common.small_train(steps=4000, every=2000),
        evaluate={
            "samplers": (
                {"name": "dbim", "nfe": 5},
                {"name": "dbim", "nfe": 20},
                {"name": "ddbm_heun", "nfe": 101},
            )
        },
    )
