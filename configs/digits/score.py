"""Class-conditional score model of scikit-learn's digits (8x8).

    python -m diffusion_jax train --config=configs/digits/score.py --workdir=runs/score

Hardware: 2 CPU cores. Time: about 1 minute. Expected: class-conditional accuracy of samples at least
0.95 with DPM-Solver++(2M), 20 network calls (the table of `make demo`).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The config; override with `--config.section.field=value`."""
    return ConfigDict(
        {
            "data": {"name": "digits"},
            "process": {"name": "vp"},
            "network": {"name": "unet", "channels": 32, "channel_mults": (1, 2)},
            "method": {
                "name": "score",
                "parameterization": "edm",
                "weighting": "edm",
                "sigma_data": 0.75,
                "guidance": 1.0,
                "sampler": "dpmpp_2m",
                "nfe": 20,
            },
            "train": {
                "steps": 1500,
                "batch_size": 128,
                "seed": 0,
                "optimizer": {
                    "name": "adam",
                    "learning_rate": 2e-3,
                    "clip_norm": 1.0,
                    "schedule": {"name": "cosine", "warmup_steps": 100},
                },
                "ema": (0.99,),
                "log_every": 100,
                "sample_every": 500,
                "checkpoint_every": 500,
            },
            "evaluate": {"num": 1000, "batch_size": 500},
        }
    )
