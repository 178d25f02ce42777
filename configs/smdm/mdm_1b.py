"""SMDM's model of 1.03 billion parameters (arXiv 2410.18514): 20 layers of width 1792 with 14 heads.

    python -m diffusion_jax train --config=configs/smdm/mdm_1b.py --workdir=runs/mdm_1b \\
        --config.data.path=data/slimpajama

With `:autoregressive` behind the file name the baseline of the same network. The token files are made as
configs/smdm/isoflop.py says, which lists the deviations. Parameters and optimiser are spread over the mesh
axis "fsdp".

Hardware: 64 accelerators with 80 GB. 2048 tokens of Llama 2's 32,000, batch 256, 500,000 steps: 1.6e21
floating-point operations. Small twin: configs/smdm/ladder.py.
"""

from configs.smdm.isoflop import sized


def get_config(kind: str = "masked"):
    """The config of a kind; override with `--config.section.field=value`."""
    config = sized(kind, 1792, 500_000)
    config.train.parallel.fsdp = 8
    return config
