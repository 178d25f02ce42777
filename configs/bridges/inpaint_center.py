"""Inpainting: the middle 16x16 pixels of 32x32 patches of photographs (I2SB with the source told, DBIM).

    python -m diffusion_jax train --config=configs/bridges/inpaint_center.py --workdir=runs/inpaint_center

Hardware: 2 CPU cores. Time: 4 minutes on one. Full scale: configs/i2sb/inpaint_center.py,
configs/dbim/imagenet_inpainting.py. With `:cifar10` behind the file name, or another TFDS image
set that is prepared, the pairs are made from it. Expected: the figures in
experiments/bridges/results.md.
"""

from configs import restoration


def get_config(data="photos"):
    """The config; override with `--config.section.field=value`."""
    pairs = restoration.pairs(data, "inpaint", {"hole": "center", "size": 16, "fill": "noise"})
    return restoration.i2sb(pairs, beta_max=1.0, masked=True)
