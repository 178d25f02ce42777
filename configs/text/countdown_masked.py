"""Countdown sequences (experiments/lsd) on the absorbing graph, for two CPU cores.

    python -m experiments.lsd.countdown countdown.npz
    python -m diffusion_jax train --config=configs/text/countdown_masked.py --workdir=runs/countdown_masked

Hardware: 2 CPU cores, about two minutes. Expected: experiments/lsd.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "arrays", "path": "countdown.npz", "vocab_size": 32},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.small_token_transformer(time_conditioned=False, positions="rotary"),
        method={"name": "masked", "label_dropout": 0.0, "nfe": 16},
        train=common.small_train(
            steps=1500, every=1500, batch_size=32, learning_rate=3e-3, clip_norm=1.0
        ),
        evaluate={"draws": 4, "num": 256},
    )
