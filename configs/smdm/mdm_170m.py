"""SMDM's model of 170 million parameters (arXiv 2410.18514): 18 layers of width 768 with 12 heads.

    python -m diffusion_jax train --config=configs/smdm/mdm_170m.py --workdir=runs/mdm_170m \\
        --config.data.path=data/slimpajama

With `:autoregressive` behind the file name the baseline of the same network. The token files are made as
configs/smdm/isoflop.py says, which lists the deviations.

Hardware: 8 accelerators with 80 GB, a day or two. 2048 tokens of Llama 2's 32,000, batch 256, 60,000 steps:
3.2e19 floating-point operations. Small twin: configs/smdm/ladder.py.
"""

from configs.smdm.isoflop import sized


def get_config(kind: str = "masked"):
    """The config of a kind; override with `--config.section.field=value`."""
    return sized(kind, 768, 60_000)
