"""D3PM with the discretised Gaussian on scikit-learn's digits: 17 grey levels, 100 steps.

    python -m diffusion_jax train --config=configs/digits/d3pm.py --workdir=runs/d3pm

Measured after 300 steps of batch 32, one seed, bits per dimension of held-out digits: Gaussian 2.41, uniform
2.32; with `--config.method.first_step=network`, the paper's L_1, Gaussian 2.43, uniform 3.07 (errors of the
estimate 0.01 to 0.03).

Another kernel: `--config.process.kernel=uniform` and drop beta_min and beta_max. Hardware: 2 CPU cores,
about 2 minutes. Full scale: configs/d3pm/text8.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={
            "name": "d3pm",
            "kernel": "gaussian",
            "num_steps": 100,
            "beta_min": 2e-3,
            "beta_max": 0.2,
        },
        network=common.small_token_transformer(),
        method={
            "name": "d3pm",
            "auxiliary": 0.001,
            "first_step": "chain",
            "sampler": "discrete_ancestral",
        },
        train=common.small_train(
            steps=1400, every=700, batch_size=32, optimizer="adamw", weight_decay=0.01
        ),
        evaluate={"samplers": ({"name": "discrete_ancestral", "nfe": 100},), "draws": 16},
    )
