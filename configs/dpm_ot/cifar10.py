"""DPM-OT on CIFAR-10 (Li et al., arXiv 2307.11308), at the paper's scale.

    python -m diffusion_jax train --config=configs/dpm_ot/cifar10.py --workdir=runs/dpm_ot
    python -m experiments.reproduce dpm_ot --scale=full

Nothing about training is new: the transport map is fitted to noised training images afterwards, by
`samplers.transport_sampler`, and `dpm_ot` starts from it. Official values: 50,000 targets noised with
sigma 0.014 of images in [0, 1], 500,000 source draws an update (4,000 at a time against 1,000 targets),
rate 0.1, at most 10,000 updates; NCSNv2 with 232 levels from 50 to 0.01 finishes with two Langevin
levels of 5 calls and 1 more. Hardware: 1 accelerator for the map, 8 for the model. Small twin:
configs/digits/score.py. Deviations: this library's U-Net on the VE process; images in [-1, 1], hence
twice the noise levels.
"""

from configs import common
from configs.score_sde import cifar10_vp


def get_config():
    """The config; override with `--config.section.field=value`."""
    base = cifar10_vp.get_config()
    return common.config(
        data=base.data,
        process={"name": "ve", "sigma_min": 0.02, "sigma_max": 100.0},
        network=base.network,
        method={
            "name": "score",
            "parameterization": "edm",
            "weighting": "edm",
            "sampler": "dpmpp_2m",
            "nfe": 20,
        },
        train=base.train,
        evaluate={"num": 50_000},
    )
