"""Block diffusion (BD3LM, arXiv 2503.09573) on the characters of any text file.

    python -m diffusion_jax train --config=configs/text/block_diffusion.py --workdir=runs/text_blocks \\
        --config.data.path=some.txt

Blocks of 8 of 64 characters: between configs/text/autoregressive.py (blocks of 1) and
configs/text/characters.py (one block). `--config.network.block_size=16` is another size;
`--config.method.objective=continuous --config.method.clip="(0.3, 0.8)"` the paper's clipped schedule.

Hardware: 2 CPU cores, about 15 minutes for 2,000 steps: a step reads twice the length. Full scale:
configs/bd3lm/openwebtext.py.
"""

from configs.text import characters


def get_config():
    """The config; override with `--config.section.field=value`."""
    config = characters.get_config()
    config.network.attention = "block"
    config.network.block_size = 8
    config.method = {
        "name": "block_diffusion",
        "objective": "count",
        "clip": (0.0, 1.0),
        "label_dropout": 0.0,
        "sampler": "block_decoding",
    }
    return config
