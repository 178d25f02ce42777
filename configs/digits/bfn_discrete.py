"""Class-conditional Bayesian flow network of scikit-learn's digits: 64 tokens of 17 grey levels.

    python -m diffusion_jax train --config=configs/digits/bfn_discrete.py --workdir=runs/bfn_discrete

Hardware: 2 CPU cores. Time: about two minutes. Expected: nats per pixel below an order-0 histogram,
and samples that a classifier takes for the digits asked for. Full scale: configs/bfn/text8.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={"name": "bfn_discrete", "beta1": 2.0},
        network=common.small_token_transformer(),
        method={"name": "bayesian_flow", "sampler": "bfn_sde2m", "nfe": 20},
        train=common.small_train(
            steps=3200,
            every=1600,
            batch_size=32,
            learning_rate=3e-3,
            optimizer="adamw",
            weight_decay=0.01,
        ),
        evaluate={
            "samplers": (
                {"name": "bfn", "nfe": 21},
                {"name": "bfn", "nfe": 51},
                {"name": "bfn_ode2m", "nfe": 20},
                {"name": "bfn_sde2m", "nfe": 20},
            ),
            "draws": 16,
        },
    )
