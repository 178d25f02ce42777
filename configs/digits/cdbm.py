"""CDBM (arXiv 2410.22637) on scikit-learn's digits: the inpainting bridge fine-tuned for two calls.

    python -m diffusion_jax train --config=configs/digits/inpaint.py --workdir=runs/inpaint
    python -m diffusion_jax train --config=configs/digits/cdbm.py --workdir=runs/cdbm \
        --config.train.init_from=runs/inpaint

Hardware: 2 CPU cores. Time: about a minute after the bridge's. Consistency training; for distillation
`--config.method.objective=distillation`. Expected: experiments/cdbm.
"""

from configs import cdbm, common
from configs.digits import inpaint


def get_config():
    """The config; override with `--config.section.field=value`."""
    return cdbm.fine_tuned(
        inpaint.get_config(),
        method={
            "objective": "training",
            "gap": "constant",
            "gap_options": {"dt": 0.3},
            "weight": "constant",
            "distance": "pseudo_huber",
            "t_start": 0.95,
            "start_share": 0.25,
            "solver_order": 2,
            "nfe": 2,
        },
        train=common.small_train(
            steps=1500, every=500, learning_rate=1e-3, ema=(0.995,), init_from="runs/inpaint"
        ),
    )
