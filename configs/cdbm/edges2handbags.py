"""CDBM on edges2handbags at 64x64 (He et al., arXiv 2410.22637), at the paper's scale.

    python -m diffusion_jax train --config=configs/ddbm/edges2handbags.py --workdir=runs/e2h \\
        --config.data.root=/path/to/edges2handbags
    python -m diffusion_jax train --config=configs/cdbm/edges2handbags.py --workdir=runs/cdbm_e2h \\
        --config.data.root=/path/to/edges2handbags --config.train.init_from=runs/e2h

Consistency training of a trained bridge; `--config.method.objective=distillation` is the paper's other way.
Hardware: 8 accelerators (built and shape-checked here, not run). The paper reports FID 0.80 at 2 network calls
(distillation 1.30), where its teacher has 0.89 at 100. Batch 128, RAdam and 1e-5 are the paper's; the gap's
numbers, the distance and the number of steps are not published in code and chosen here. Small twin:
configs/digits/cdbm.py.
"""

from configs import cdbm
from configs.ddbm import edges2handbags


def get_config():
    """The config; override with `--config.section.field=value`."""
    return cdbm.at_scale(edges2handbags.get_config(), init_from="runs/e2h")
