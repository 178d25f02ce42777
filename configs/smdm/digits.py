"""Masked model of scikit-learn's digits without labels, for guidance by the given half of a picture.

    python -m diffusion_jax train --config=configs/smdm/digits.py --workdir=runs/smdm_digits

64 tokens of 17 grey levels. Batches with a "prompt" are completed with SMDM's guidance (arXiv 2410.18514).

Hardware: one CPU core. Time: a minute and a half. Expected: experiments/smdm. Full scale:
configs/smdm/mdm_170m.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.small_token_transformer(time_conditioned=False, num_classes=0),
        method={
            "name": "masked",
            "label_dropout": 0.0,
            "prompt_guidance": 0.8,
            "sampler": "masked_ancestral",
            "nfe": 32,
        },
        train=common.small_train(
            steps=1400,
            every=700,
            batch_size=32,
            learning_rate=3e-3,
            optimizer="adamw",
            weight_decay=0.01,
        ),
        evaluate={"draws": 16},
    )
