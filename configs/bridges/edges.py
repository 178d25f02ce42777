"""Edges to picture: 32x32 patches of photographs from their Sobel edges (DDBM).

    python -m diffusion_jax train --config=configs/bridges/edges.py --workdir=runs/edges

Hardware: 2 CPU cores. Time: 4 minutes on one. Full scale: configs/ddbm/edges2handbags.py. With
`:cifar10` behind the file name, or another TFDS image set that is prepared, the pairs are made
from it. Expected: the figures in experiments/bridges/results.md.
"""

from configs import restoration


def get_config(data="photos"):
    """The config; override with `--config.section.field=value`."""
    pairs = restoration.pairs(data, "edges", {"quantile": 0.8})
    return restoration.ddbm(pairs, sigma_source=1.0, covariance=0.14)
