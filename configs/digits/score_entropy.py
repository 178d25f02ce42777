"""SEDD on scikit-learn's digits: a class-conditional network of concrete scores, 64 tokens of 17 greys.

    python -m diffusion_jax train --config=configs/digits/score_entropy.py --workdir=runs/sedd

The uniform graph: `--config.process.name=uniform`. Hardware: 2 CPU cores, about 2 minutes. Full scale:
configs/sedd/openwebtext.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={"name": "absorbing", "schedule": {"name": "linear", "eps_end": 1e-3}},
        network=common.small_token_transformer(),
        method={"name": "score_entropy", "guidance": 1.0, "sampler": "score_analytic", "nfe": 33},
        train=common.small_train(
            steps=1400, every=700, batch_size=32, optimizer="adamw", weight_decay=0.01
        ),
        evaluate={
            "samplers": (
                {"name": "score_analytic", "nfe": 65},
                {"name": "score_euler", "nfe": 65},
            ),
            "draws": 16,
        },
    )
