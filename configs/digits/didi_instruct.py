"""DiDi-Instruct (arXiv 2509.25035) on scikit-learn's digits: a masked model distilled into few steps.

    python -m diffusion_jax train --config=configs/digits/masked.py --workdir=runs/masked
    python -m diffusion_jax train --config=configs/digits/didi_instruct.py --workdir=runs/didi_instruct \
        --config.train.init_from=runs/masked

Hardware: 2 CPU cores. Time: about five minutes after the masked model's. Expected: experiments/didi_instruct.
"""

from configs import common
from configs.digits import masked


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = masked.get_config()
    return common.config(
        data=base.data,
        process=base.process,
        network=base.network,
        method={
            "name": "didi_instruct",
            "group": 4,
            "policy": 1.0,
            "divergence": (0.01, 0.01),
            "entropy": 0.02,
            "critic_learning_rate": 1e-3,
            "critic_blocks": 2,
            "sampler": "masked_ancestral",
            "nfe": 8,
        },
        train=common.small_train(
            steps=600,
            every=300,
            batch_size=16,
            learning_rate=2e-4,
            clip_norm=0.5,
            ema=(0.98,),
            init_from="runs/masked",
        ),
        evaluate={
            "samplers": (
                {"name": "masked_ancestral", "nfe": 8},
                {"name": "masked_ancestral", "nfe": 16},
            ),
            "draws": 4,
        },
    )
