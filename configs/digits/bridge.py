"""Bridge that restores scikit-learn's digits (8x8) from a blurred and masked copy.

    python -m diffusion_jax train --config=configs/digits/bridge.py --workdir=runs/bridge

Hardware: 2 CPU cores. Time: about a minute. Expected: restored digits at least 3 dB closer to the truth
than their sources with DBIM (the table of `make demo`).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "paired", "data": "digits", "corruption": "blur_mask"},
        process={"name": "vp_bridge"},
        network={
            "name": "dit",
            "patch_size": 4,
            "width": 96,
            "depth": 4,
            "heads": 2,
            "remat": "full",
            "num_classes": 0,
        },
        method={
            "name": "bridge",
            "parameterization": "ddbm",
            "sigma_data": 0.85,
            "sigma_source": 0.57,
            "covariance": 0.4,
            "sampler": "dbim",
            "nfe": 20,
        },
        train=common.train(
            steps=1500,
            batch_size=64,
            learning_rate=2e-3,
            schedule={"name": "cosine", "warmup_steps": 100},
            ema=(0.99,),
            every=600,
        ),
        evaluate={
            "samplers": (
                {"name": "dbim", "nfe": 5},
                {"name": "dbim", "nfe": 20},
                {"name": "dbim", "nfe": 20, "eta": 1.0},
                {"name": "ddbm_heun", "nfe": 20},
                {"name": "ddbm_heun", "nfe": 50},
            )
        },
    )
