"""Super-resolution x4 of ImageNet at 256x256, at I2SB's scale (Liu et al., arXiv 2302.05872).

    python -m diffusion_jax train --config=configs/i2sb/super_resolution.py --workdir=runs/i2sb_super_resolution \
        --config.data.root=/path/to/imagenet

`root` holds folders `train` and `test` with a folder for each class. Hardware: 8 to 16 accelerators, days (an estimate; built and shape-checked here, not run). Small
twin: configs/bridges/super_resolution.py.
"""

from configs import restoration


def get_config():
    """The config; override with `--config.section.field=value`."""
    options = {"factor": 4, "down": "bicubic", "up": "nearest"}
    return restoration.imagenet_i2sb("low_resolution", options, beta_max=0.3)
