"""Class-conditional score model of scikit-learn's digits (8x8).

    python -m diffusion_jax train --config=configs/digits/score.py --workdir=runs/score

Hardware: 2 CPU cores. Time: about a minute. Expected: class-conditional accuracy of samples at least
0.95 with DPM-Solver++(2M), 20 network calls (the table of `make demo`).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits"},
        process={"name": "vp"},
        network=common.small_dit(),
        method=common.edm_score(sigma_data=0.85),
        train=common.small_train(steps=1800, every=600),
        evaluate={
            "samplers": (
                {"name": "ddim", "nfe": 10},
                {"name": "dpmpp_2m", "nfe": 10},
                {"name": "dpmpp_2m", "nfe": 20},
                {"name": "sde_dpmpp_2m", "nfe": 20},
                {"name": "edm_heun", "nfe": 35},
            )
        },
    )
