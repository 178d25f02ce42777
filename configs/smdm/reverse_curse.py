"""SMDM's reversal of facts (arXiv 2410.18514, section 5): invented people, told of in one direction.

    python -m diffusion_jax train --config=configs/smdm/reverse_curse.py --workdir=runs/reverse
    python -m diffusion_jax train --config=configs/smdm/reverse_curse.py:autoregressive \\
        --workdir=runs/reverse_ar

200 people are told of as "name is description", 50 further ones both ways. Masked and autoregressive
networks differ in their attention alone.

Hardware: one CPU core. Time: 3 minutes, the baseline one. Expected: experiments/smdm.
"""

from configs import common
from configs.smdm.ladder import family


def get_config(kind: str = "masked"):
    """The config of a kind, "masked" or "autoregressive"; override with `--config.section.field=value`."""
    attention, method = family(kind)
    if kind == "masked":
        method |= {"sampler": "llada", "nfe": 12, "prompt_guidance": 0.8}
    return common.config(
        data={"name": "descriptions", "people": 200, "both": 50},
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 128,
            "depth": 3,
            "heads": 4,
            "positions": "learned",
            "max_length": 12,
            "time_conditioned": False,
            **attention,
        },
        method=method,
        train=common.small_train(
            steps=8000 if kind == "masked" else 3000,  # when the baseline knows all by heart
            every=1000,
            batch_size=16,
            optimizer="adamw",
            learning_rate=2e-3,
            ema=(0.99,),
        ),
        evaluate={"draws": 16},
    )
