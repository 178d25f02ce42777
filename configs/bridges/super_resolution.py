"""Super-resolution x4: 32x32 patches of photographs from 8x8 means (I2SB).

    python -m diffusion_jax train --config=configs/bridges/super_resolution.py --workdir=runs/super_resolution

Hardware: 2 CPU cores. Time: 4 minutes on one. Full scale: configs/i2sb/super_resolution.py. As in
I2SB's restoration the network is not told the source. With `:cifar10` behind the file name, or
another TFDS image set that is prepared, the pairs are made from it. Expected: the figures in
experiments/bridges/results.md.
"""

from configs import restoration


def get_config(data="photos"):
    """The config; override with `--config.section.field=value`."""
    pairs = restoration.pairs(data, "low_resolution", {"factor": 4})
    return restoration.i2sb(pairs, beta_max=0.3, source_input=False)
