"""Bayesian flow network on CIFAR-10, 256 bins (Graves et al., arXiv 2308.07037), at the paper's scale.

    python -m diffusion_jax train --config=configs/bfn/cifar10.py --workdir=runs/bfn_cifar10

Hardware: 8 accelerators, 1M steps of batch 32 (an estimate; not measured here). The paper reports 2.66
bits per dimension; BFN-Solver (arXiv 2404.15766) reads FID 56 at 10 calls off the same weights where
the BFN's own sampler has 253. Small twin: configs/digits/bfn_continuous.py. Deviation: this library's
U-Net, of about the width and depth of VDM's.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "tfds", "dataset": "cifar10"},
        process={"name": "bfn_continuous", "min_variance": 1e-6, "eta": 0.01},
        network={
            "name": "unet",
            "channels": 128,
            "channel_mults": (1,),
            "num_res_blocks": 32,
            "attention_resolutions": (),
            "heads": 1,
            "dropout": 0.1,
            "out_channels": 6,
            "num_classes": 0,
            "remat": "full",
        },
        method={
            "name": "bayesian_flow",
            "bins": 256,
            "sampler": "bfn_solver_ode2",
            "nfe": 20,
        },
        train=common.train(
            steps=1_000_000,
            batch_size=32,
            optimizer="adamw",
            learning_rate=2e-4,
            b2=0.99,
            weight_decay=0.01,
            clip_norm=5.0,
            ema=(0.9999,),
            every=20_000,
            augment=("flip",),
        ),
        evaluate={
            "num": 10_000,
            "samplers": (
                {"name": "bfn_continuous", "nfe": 11},
                {"name": "bfn_solver_ode1", "nfe": 10},
                {"name": "bfn_solver_ode2", "nfe": 10},
                {"name": "bfn_solver_sde2", "nfe": 10},
            ),
        },
    )
