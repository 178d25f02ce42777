"""Masked diffusion on protein chains, 20 amino acids and the padding, small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/text/proteins.py --workdir=runs/proteins \\
        --config.data.path=chains.fasta

Chains longer than 256 residues are left out, and so are those with letters that are no amino acid.
Hardware: 2 CPU cores, about 15 minutes for 1,500 steps.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.small_sequences(
        path="chains.fasta", length=256, alphabet="protein", long="drop", unknown="drop"
    )
