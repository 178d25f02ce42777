"""An autoregressive model of scikit-learn's digits, pixel by pixel: what DiDA begins with.

    python -m diffusion_jax train --config=configs/dida/autoregressive.py --workdir=runs/digits_ar

The digits are few: after 500 steps it begins to know them by heart, and then judges others' samples badly.
Hardware: one CPU core. Time: half a minute. Then: configs/dida/digits.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits_tokens"},
        process={"name": "absorbing", "schedule": "linear"},
        network=common.small_token_transformer(
            time_conditioned=False, attention="causal", max_length=65, dropout=0.1
        ),
        method={"name": "autoregressive", "sampler": "left_to_right"},
        train=common.small_train(
            steps=500,
            every=250,
            batch_size=32,
            learning_rate=3e-3,
            optimizer="adamw",
            weight_decay=0.01,
        ),
        evaluate={"draws": 1},
    )
