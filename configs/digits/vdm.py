"""Variational diffusion model of scikit-learn's digits (8x8, 17 grey levels), judged by its likelihood.

    python -m diffusion_jax train --config=configs/digits/vdm.py --workdir=runs/vdm
    python -m diffusion_jax evaluate --workdir=runs/vdm

Hardware: 1 CPU core. Time: two minutes. Expected: 2.05 bits per dimension on held-out digits (labels
given), class accuracy of samples 0.93 with 250 ancestral steps. gamma_min is VDM's -13.3 moved by the
width of a level: 2 log(256 / 16) = 5.5 for 17 levels instead of 256.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits"},
        process={"name": "linear_log_snr", "gamma_min": -7.8, "gamma_max": 5.0},
        network=common.small_dit(patch_size=2, out_channels=1),
        method={
            "name": "vdm",
            "levels": 17,
            "fourier": (2, 3),
            "schedule": "fixed",
            "schedule_options": {},
            "schedule_loss": "bound",
            "sampler": "ddpm",
            "nfe": 250,
        },
        train=common.small_train(
            steps=1200, every=400, optimizer="adamw", b2=0.99, weight_decay=0.01
        ),
        evaluate={
            "samplers": (
                {"name": "ddpm", "nfe": 250},
                {"name": "dpmpp_2m", "nfe": 20},
            )
        },
    )
