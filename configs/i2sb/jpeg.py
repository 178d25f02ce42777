"""JPEG restoration of ImageNet at 256x256, at I2SB's scale (Liu et al., arXiv 2302.05872).

    python -m diffusion_jax train --config=configs/i2sb/jpeg.py --workdir=runs/i2sb_jpeg \
        --config.data.root=/path/to/imagenet

`root` holds folders `train` and `test` with a folder for each class. Hardware: 8 to 16 accelerators, days (an estimate; built and shape-checked here, not run).
`quality=5` is the other setting of the paper. FID 3.6 (quality 10) and 4.6 (5) are quoted for
10,000 validation images.
"""

from configs import restoration


def get_config():
    """The config; override with `--config.section.field=value`."""
    return restoration.imagenet_i2sb("jpeg", {"quality": 10}, beta_max=0.3)
