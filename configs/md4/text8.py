"""MD4 on text8 characters (arXiv 2406.04329), at the paper's scale.

    python -m diffusion_jax train --config=configs/md4/text8.py --workdir=runs/md4 \\
        --config.data.path=/path/to/text8

Hardware: 8 accelerators, 1M steps of batch 512 at length 256. The paper reports at most 1.37 bits per
character; read yours with `python -m diffusion_jax likelihood --workdir=runs/md4`. Small twin:
configs/text/md4.py. Deviations: LayerNorm and a GELU MLP where the authors have GLU.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={"name": "text", "path": "text8", "length": 256, "clean": "text8"},
        process={
            "name": "absorbing",
            "schedule": {"name": "linear", "eps_start": 1e-4, "eps_end": 1e-4},
            "t_min": 0.0,
        },
        network={
            "name": "token_transformer",
            "width": 768,
            "depth": 12,
            "heads": 12,
            "max_length": 256,
            "dropout": 0.05,
            "time_conditioned": True,
            "dtype": "bfloat16",
        },
        method={
            "name": "masked",
            "objective": "continuous",
            "label_dropout": 0.0,
            "sampler": "masked_ancestral",
            "nfe": 256,
            "sampler_options": {"grid": "cosine"},
        },
        train=common.train(
            steps=1_000_000,
            batch_size=512,
            optimizer="adamw",
            learning_rate=5e-4,
            b2=0.999,
            weight_decay=0.03,
            schedule={"name": "cosine", "warmup_steps": 2000},
            every=10_000,
        ),
        evaluate={"draws": 64},
    )
