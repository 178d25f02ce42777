"""Class-conditional masked model of scikit-learn's digits: 64 tokens of 17 grey levels.

    python -m diffusion_jax train --config=configs/digits/masked.py --workdir=runs/masked

Hardware: 2 CPU cores. Time: about a minute. Expected: nats per pixel at least 0.3 below an order-0
histogram (the table of `make demo`).
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.small_token_transformer(time_conditioned=False),
        method={"name": "masked", "guidance": 1.0, "sampler": "masked_ancestral", "nfe": 32},
        train=common.small_train(
            steps=1400,
            every=700,
            batch_size=32,
            learning_rate=3e-3,
            optimizer="adamw",
            weight_decay=0.01,
        ),
        evaluate={
            "samplers": (
                {"name": "masked_ancestral", "nfe": 16},
                {"name": "masked_ancestral", "nfe": 64},
                {"name": "first_hitting"},
            ),
            "draws": 16,
        },
    )
