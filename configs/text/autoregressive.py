"""An autoregressive model of the characters of any text file: the baseline of configs/text/characters.py.

    python -m diffusion_jax train --config=configs/text/autoregressive.py --workdir=runs/text_ar \\
        --config.data.path=some.txt

The same network but for its attention. Hardware: 2 CPU cores, about 10 minutes for 2,000 steps. Full scale:
`--config.network.width=768 --config.network.depth=12 --config.network.heads=12` and the data of
configs/radd/openwebtext.py.
"""

from configs.text import characters


def get_config():
    """The config; override with `--config.section.field=value`."""
    config = characters.get_config()
    config.network.attention = "causal"
    config.method = {
        "name": "autoregressive",
        "label_dropout": 0.0,
        "sampler": "left_to_right",
    }
    return config
