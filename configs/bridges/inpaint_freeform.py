"""Inpainting: brush strokes over 20 to 30% of 32x32 patches of photographs (I2SB with the source told).

    python -m diffusion_jax train --config=configs/bridges/inpaint_freeform.py --workdir=runs/inpaint_freeform

Hardware: 2 CPU cores. Time: 4 minutes on one. Full scale: configs/i2sb/inpaint_freeform.py. With
`:cifar10` behind the file name, or another TFDS image set that is prepared, the pairs are made
from it. Expected: the figures in experiments/bridges/results.md.
"""

from configs import restoration


def get_config(data="photos"):
    """The config; override with `--config.section.field=value`."""
    pairs = restoration.pairs(data, "inpaint", {"hole": "freeform", "fill": "noise"})
    return restoration.i2sb(pairs, beta_max=1.0, masked=True)
