"""Inpainting of the middle 128x128 pixels of ImageNet at 256x256, at I2SB's scale (Liu et al., arXiv 2302.05872).

    python -m diffusion_jax train --config=configs/i2sb/inpaint_center.py --workdir=runs/i2sb_inpaint_center \
        --config.data.root=/path/to/imagenet

`root` holds folders `train` and `test` with a folder for each class. Hardware: 8 to 16 accelerators, days (an estimate; built and shape-checked here, not run). The
noise-free variant, its optimal-transport ODE. FID 4.9 is quoted for 10,000 validation images.
Small twin: configs/bridges/inpaint_center.py.
"""

from configs import restoration


def get_config():
    """The config; override with `--config.section.field=value`."""
    options = {"hole": "center", "size": 128, "fill": "noise"}
    return restoration.imagenet_i2sb("inpaint", options, beta_max=1.0, ot_ode=True, masked=True)
