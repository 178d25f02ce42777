"""Masked diffusion on DNA, promoters of 300 bases (or any sequences of A, C, G, T), for two CPU cores.

    python -m diffusion_jax train --config=configs/text/dna.py --workdir=runs/dna \\
        --config.data.path=promoters.fa

The file may be FASTA, a table, arrays or a sequence a line, see `data.sequences`. Hardware: 2 CPU cores,
about 15 minutes for 1,500 steps.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.small_sequences(path="promoters.fa", length=300, alphabet="dna")
