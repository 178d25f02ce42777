"""Deblurring: 32x32 patches of photographs from their Gaussian blur of 2 pixels (I2SB).

    python -m diffusion_jax train --config=configs/bridges/deblur.py --workdir=runs/deblur

Hardware: 2 CPU cores. Time: 4 minutes on one. Full scale: configs/i2sb/deblur.py. As in I2SB's
restoration the network is not told the source. With `:cifar10` behind the file name, or another
TFDS image set that is prepared, the pairs are made from it. Expected: the figures in
experiments/bridges/results.md.
"""

from configs import restoration


def get_config(data="photos"):
    """The config; override with `--config.section.field=value`."""
    pairs = restoration.pairs(data, "blur", {"kernel": "gaussian", "sigma": 2.0})
    return restoration.i2sb(pairs, beta_max=0.3, source_input=False)
