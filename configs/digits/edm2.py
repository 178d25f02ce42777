"""EDM2's magnitude-preserving U-Net (arXiv 2312.02696), small, on scikit-learn's digits (8x8).

    python -m diffusion_jax train --config=configs/digits/edm2.py --workdir=runs/edm2

Everything of the paper's training: weights forced to unit magnitude after every step, the learnt
uncertainty, the inverse square root decay, and averages with power-function profiles of which
`training.power_ema.reconstruct_run` makes one of any width. Hardware: 2 CPU cores. Time: two minutes.
Expected: class-conditional accuracy of samples at least 0.95 (measured: 0.97 with 20 network calls). Full
scale: configs/edm2/imagenet512.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits"},
        process={"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0},
        network={
            "name": "edm2_unet",
            "channels": 32,
            "channel_mults": (1, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (4,),
            "head_channels": 32,
            "log_variance_features": 32,
        },
        method=common.edm_score(
            sigma_data=0.85,
            times="log_normal",
            times_options={"mean": -0.8, "std": 1.6},
            uncertainty=True,
            label_dropout=0.0,
        ),
        train=common.train(
            steps=700,
            batch_size=64,
            learning_rate=0.02,
            b2=0.99,
            schedule={"name": "rsqrt", "warmup_steps": 50, "timescale": 200},
            clip_norm=0.0,
            ema=(0.1, 0.05),
            every=175,
        )
        | {"ema_warmup": "power", "keep": 8},
        evaluate={
            "samplers": (
                {"name": "dpmpp_2m", "nfe": 20},
                {"name": "edm_heun", "nfe": 35},
            )
        },
    )
