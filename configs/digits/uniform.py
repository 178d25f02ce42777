"""UDLM on scikit-learn's digits: uniform noise over 17 grey levels, class-conditional.

    python -m diffusion_jax train --config=configs/digits/uniform.py --workdir=runs/uniform

Neighbouring greys instead of any: `--config.process.name=ctmc --config.process.rates=nearest_neighbour`
(after adding the field: `rates`). Hardware: 2 CPU cores, about 2 minutes. Full scale:
configs/udlm/text8.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={"name": "uniform", "schedule": "linear"},
        network=common.small_token_transformer(),
        method={
            "name": "uniform",
            "parameterization": "leave_one_out",
            "guidance": 1.0,
            "sampler": "discrete_ancestral",
            "nfe": 64,
        },
        train=common.small_train(
            steps=1400, every=700, batch_size=32, optimizer="adamw", weight_decay=0.01
        ),
        evaluate={
            "samplers": (
                {"name": "discrete_ancestral", "nfe": 64},
                {"name": "tau_leaping", "nfe": 64},
            ),
            "draws": 16,
        },
    )
