"""Bridge that fills a hole of 24 pixels in scikit-learn's digits (8x8): the yardstick of `experiments/dbim`.

    python -m diffusion_jax train --config=configs/digits/inpaint.py --workdir=runs/inpaint

With `:mlp` behind the file name the network is a small MLP (width 128, two blocks) that is not told the mask,
trained for 5000 steps: a network whose errors show.

Hardware: 2 CPU cores. Time: about 3 minutes, with `:mlp` half a minute. Expected: Frechet distances in
experiments/dbim/results.md.
"""

from configs import common


def get_config(network="dit"):
    """The config; override with `--config.section.field=value`."""
    if network not in ("dit", "mlp"):
        raise ValueError(f"unknown network {network!r}; valid: dit, mlp")
    mlp = {"name": "mlp", "width": 128, "depth": 2, "num_classes": 0}
    return common.config(
        data={
            "name": "paired",
            "data": "digits",
            "corruption": "inpaint",
            "options": {"size": (4, 6)},
        },
        process={"name": "vp_bridge"},
        network=common.small_dit(num_classes=0) if network == "dit" else mlp,
        method={
            "name": "bridge",
            "parameterization": "ddbm",
            "sigma_data": 0.85,
            "sigma_source": 0.69,
            "covariance": 0.48,
            "masked": network == "dit",
            "sampler": "dbim",
            "nfe": 20,
        },
        train=common.small_train(steps=4000, every=2000)
        if network == "dit"
        else common.small_train(
            steps=5000, every=2500, batch_size=128, learning_rate=1e-3, ema=(0.995,)
        ),
        evaluate={
            "samplers": (
                {"name": "dbim", "nfe": 5},
                {"name": "dbim", "nfe": 20},
                {"name": "ddbm_heun", "nfe": 101},
            )
        },
    )
