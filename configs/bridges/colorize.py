"""Colourisation: 32x32 patches of photographs from their luma (DDBM).

    python -m diffusion_jax train --config=configs/bridges/colorize.py --workdir=runs/colorize

Hardware: 2 CPU cores. Time: 4 minutes on one. At full scale: configs/ddbm/edges2handbags.py with
other pairs. With `:cifar10` behind the file name, or another TFDS image set that is prepared, the
pairs are made from it. Expected: the figures in experiments/bridges/results.md.
"""

from configs import restoration


def get_config(data="photos"):
    """The config; override with `--config.section.field=value`."""
    pairs = restoration.pairs(data, "grey")
    return restoration.ddbm(pairs, sigma_source=0.54, covariance=0.29)
