"""Class-conditional Bayesian flow network of scikit-learn's digits as continuous images (8x8).

    python -m diffusion_jax train --config=configs/digits/bfn_continuous.py --workdir=runs/bfn_continuous

Hardware: 2 CPU cores. Time: about a minute. Expected: class accuracy of samples at least 0.95, and with
SDE-2 of BFN-Solver at 20 network calls a smaller texture distance than with the BFN's own sampler at 50
(experiments/bfn_solver). Full scale: configs/bfn/cifar10.py.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "digits"},
        # 17 grey levels: the papers' last variance for 16
        process={"name": "bfn_continuous", "min_variance": 1e-3},
        network=common.small_dit(),
        method={"name": "bayesian_flow", "sampler": "bfn_solver_ode2", "nfe": 20},
        train=common.small_train(steps=2400, every=800),
        evaluate={
            "samplers": (
                {"name": "bfn_continuous", "nfe": 21},
                {"name": "bfn_continuous", "nfe": 51},
                {"name": "bfn_solver_ode1", "nfe": 20},
                {"name": "bfn_solver_ode2", "nfe": 20},
                {"name": "bfn_solver_sde2", "nfe": 20},
            )
        },
    )
