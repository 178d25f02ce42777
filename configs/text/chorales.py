"""Masked diffusion on Bach's chorales in four interleaved voices, small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/text/chorales.py --workdir=runs/chorales \\
        --config.data.path=jsb16.npz
    python -m diffusion_jax sample --workdir=runs/chorales --num=8 --out=chorales.png
    python -m diffusion_jax sample --workdir=runs/chorales --num=8 --out=harmony.png \\
        --prompt=A4___A4___B4___C5___

Samples are drawn as piano rolls; a prompt gives voices by the names of notes, here the soprano's of four
sixteenths. The file holds notes by split, see `data.chorales`. Hardware: 2 CPU cores, about 10 minutes for
1,500 steps.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.small_tokens({"name": "chorales", "path": "jsb16.npz", "steps": 32}, length=128)
