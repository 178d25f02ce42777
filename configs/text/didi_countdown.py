"""DiDi-Instruct (arXiv 2509.25035) on countdown sequences (experiments/lsd): a masked model in few steps.

    python -m experiments.lsd.countdown countdown.npz
    python -m diffusion_jax train --config=configs/text/countdown_masked.py --workdir=runs/countdown_masked
    python -m diffusion_jax train --config=configs/text/didi_countdown.py --workdir=runs/didi_countdown \
        --config.train.init_from=runs/countdown_masked

Hardware: 2 CPU cores, about five minutes after the masked model's. Expected: experiments/didi_instruct. Full
scale: configs/didi_instruct/openwebtext.py.
"""

from configs import common
from configs.text import countdown_masked


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = countdown_masked.get_config()
    return common.config(
        data=base.data,
        process=base.process,
        network=base.network,
        method={
            "name": "didi_instruct",
            "group": 4,
            "policy": 1.0,
            "divergence": (0.05, 0.05),
            "entropy": 0.05,
            "critic_learning_rate": 3e-3,
            "critic_blocks": 2,
            "sampler": "masked_ancestral",
            "nfe": 8,
        },
        train=common.small_train(
            steps=350,
            every=350,
            batch_size=16,
            learning_rate=5e-5,
            clip_norm=0.5,
            ema=(0.98,),
            init_from="runs/countdown_masked",
        ),
        evaluate={"draws": 4, "num": 256},
    )
