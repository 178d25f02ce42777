"""Class-conditional stochastic interpolant between normal noise and scikit-learn's digits (8x8).

    python -m diffusion_jax train --config=configs/digits/interpolant.py --workdir=runs/interpolant

One network learns velocity and denoiser; the diffusion is chosen when sampling:

    python -m diffusion_jax sample --workdir=runs/interpolant --sampler=interpolant_euler --nfe=50 \\
        --option=epsilon=0.25 --num=40 --out=grid.png

Hardware: 2 CPU cores. Time: about a minute. Expected: Frechet distance 1.2 with the ODE and 0.9 with
epsilon 1, both at 100 calls of Heun (0.8 is held-out data; `python -m experiments.reproduce interpolants`).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits"},
        process={"name": "interpolant", "path": "linear", "gamma": "brownian"},
        network=common.small_dit(),
        method={
            "name": "interpolant",
            "coupling": "noise",
            "targets": ("velocity", "denoiser"),
            "sampler": "interpolant_heun",
            "nfe": 50,
        },
        train=common.small_train(steps=1800, every=600),
        evaluate={
            "samplers": (
                {"name": "interpolant_heun", "nfe": 20},
                {"name": "interpolant_heun", "nfe": 50},
                {"name": "interpolant_euler", "nfe": 50},
                {"name": "interpolant_euler", "nfe": 50, "epsilon": 0.25},
            )
        },
    )
