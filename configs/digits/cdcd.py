"""CDCD on scikit-learn's digits: mask-and-replace in 32 steps with the contrastive term.

    python -m diffusion_jax train --config=configs/digits/cdcd.py --workdir=runs/cdcd

VQ-Diffusion: `--config.method.contrast=0.0`. Hardware: 2 CPU cores, about 3 minutes. Full scale:
configs/cdcd/codes.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={"name": "mask_replace", "num_steps": 32},
        network=common.small_token_transformer(),
        method={
            "name": "d3pm",
            "auxiliary": 5e-4,
            "auxiliary_weight": "falling",
            "contrast": 5e-5,
            "contrast_options": {"negatives": "intra", "num_negatives": 10, "wise": "step"},
            "sampler": "discrete_ancestral",
        },
        train=common.small_train(
            steps=1400, every=700, batch_size=32, optimizer="adamw", weight_decay=0.01
        ),
        evaluate={"samplers": ({"name": "discrete_ancestral", "nfe": 32},), "draws": 16},
    )
