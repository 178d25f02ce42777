"""Deblurring of ImageNet at 256x256, at I2SB's scale (Liu et al., arXiv 2302.05872).

    python -m diffusion_jax train --config=configs/i2sb/deblur.py --workdir=runs/i2sb_deblur \
        --config.data.root=/path/to/imagenet

`root` holds folders `train` and `test` with a folder for each class. Hardware: 8 to 16 accelerators, days (an estimate; built and shape-checked here, not run).
`kernel="uniform"`, `width=9` is the other blur of the paper. The noise-free variant, its optimal-
transport ODE. FID 3.0 (Gaussian) and 3.9 (uniform) are quoted for 10,000 validation images. Small
twin: configs/bridges/deblur.py.
"""

from configs import restoration


def get_config():
    """The config; override with `--config.section.field=value`."""
    options = {"kernel": "gaussian", "sigma": 10.0}
    return restoration.imagenet_i2sb("blur", options, beta_max=1.0, ot_ode=True)
