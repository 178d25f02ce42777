"""CDBM for centre inpainting of ImageNet at 256x256 (He et al., arXiv 2410.22637), at the paper's scale.

    python -m diffusion_jax train --config=configs/dbim/imagenet_inpainting.py --workdir=runs/imagenet \\
        --config.data.root=/path/to/imagenet
    python -m diffusion_jax train --config=configs/cdbm/imagenet_inpainting.py \\
        --workdir=runs/cdbm_imagenet --config.data.root=/path/to/imagenet \\
        --config.train.init_from=runs/imagenet

I2SB's schedule and network output. See configs/cdbm/edges2handbags.py for what is the paper's and what is
not. Hardware: 8 accelerators (built and shape-checked here, not run). The paper reports FID 5.34 at 2 network
calls and 4.77 at 4 (distillation 5.65 at 2), where its teacher has 4.81 at 10. Small twin:
configs/digits/cdbm.py.
"""

from configs import cdbm
from configs.dbim import imagenet_inpainting


def get_config():
    """The config; override with `--config.section.field=value`."""
    return cdbm.at_scale(imagenet_inpainting.get_config(), init_from="runs/imagenet", nfe=4)
