"""Bayesian flow network on text8 characters (Graves et al., arXiv 2308.07037), at the paper's scale.

    python -m diffusion_jax train --config=configs/bfn/text8.py --workdir=runs/bfn_text8 \\
        --config.data.path=/path/to/text8

Hardware: 8 accelerators. The paper reports 1.41 bits per character. Small twin:
configs/text/bfn_characters.py, and configs/digits/bfn_discrete.py for pixels.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "text", "path": "text8", "length": 256, "clean": "text8"},
        process={"name": "bfn_discrete", "beta1": 0.75**2, "eta": 1e-3},
        network={
            "name": "token_transformer",
            "width": 768,
            "depth": 24,
            "heads": 12,
            "max_length": 256,
            "dropout": 0.0,
            "remat": "full",
        },
        method={
            "name": "bayesian_flow",
            "label_dropout": 0.0,
            "sampler": "bfn_sde2m",
            "nfe": 20,
        },
        train=common.train(
            steps=1_200_000,
            batch_size=416,
            optimizer="adamw",
            learning_rate=1e-4,
            b2=0.98,
            weight_decay=0.01,
            clip_norm=5.0,
            ema=(0.9999,),
            every=20_000,
        ),
        evaluate={
            "samplers": (
                {"name": "bfn", "nfe": 11},
                {"name": "bfn_ode1", "nfe": 10},
                {"name": "bfn_ode2m", "nfe": 10},
                {"name": "bfn_sde2m", "nfe": 10},
            ),
            "draws": 64,
        },
    )
