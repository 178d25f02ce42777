"""CDBM on DIODE at 256x256, normals to photographs (He et al., arXiv 2410.22637), at the paper's scale.

    python -m diffusion_jax train --config=configs/ddbm/diode.py --workdir=runs/diode \\
        --config.data.root=/path/to/diode
    python -m diffusion_jax train --config=configs/cdbm/diode.py --workdir=runs/cdbm_diode \\
        --config.data.root=/path/to/diode --config.train.init_from=runs/diode

See configs/cdbm/edges2handbags.py for what is the paper's and what is not. Hardware: 8 accelerators (built
and shape-checked here, not run). The paper reports FID 2.93 at 2 network calls (distillation 3.66), where
its teacher has 2.57 at 100. Small twin: configs/digits/cdbm.py.
"""

from configs import cdbm
from configs.ddbm import diode


def get_config():
    """The config; override with `--config.section.field=value`."""
    return cdbm.at_scale(diode.get_config(), init_from="runs/diode")
