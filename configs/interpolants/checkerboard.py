"""Stochastic interpolant from a normal to the checkerboard (arXiv 2303.08797), at the paper's settings.

    python -m diffusion_jax train --config=configs/interpolants/checkerboard.py --workdir=runs/board
    python -m diffusion_jax sample --workdir=runs/board --sampler=interpolant_euler --nfe=100 \\
        --option=epsilon=0.5 --num=10000 --out=points.npz

Hardware: 2 CPU cores, about half an hour (an estimate), minutes on one accelerator. As the authors'
notebook: batch of 2,000, 7,000 updates of Adam at 2e-3, times 0.4 every 1,500, widths of 256 in four hidden
layers, antithetic pairs; SDE of epsilon 0.5 in 100 steps. Deviation: the layers are residual with SiLU and
know the time by features, instead of plain ReLU; one network has both heads instead of two networks.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "checkerboard"},
        process={"name": "interpolant", "path": "linear", "gamma": "brownian"},
        network={"name": "mlp", "width": 256, "depth": 4},
        method={
            "name": "interpolant",
            "coupling": "noise",
            "targets": ("velocity", "denoiser"),
            "sampler": "interpolant_euler",
            "nfe": 100,
            "sampler_options": {"epsilon": 0.5},
        },
        train=common.train(
            steps=7000,
            batch_size=2000,
            learning_rate=2e-3,
            schedule={"name": "step", "every": 1500, "factor": 0.4},
            ema=(0.999,),
            every=1000,
        ),
    )
