"""Masked diffusion on molecules as SMILES strings, such as ZINC's, small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/text/smiles.py --workdir=runs/smiles \\
        --config.data.path=molecules.smi

One molecule a line; shorter ones are filled up with spaces, which the model learns too. Atoms and bonds
instead of characters: `--config.data.unit=atoms --config.data.alphabet=file`. Hardware: 2 CPU cores, about
10 minutes for 1,500 steps.
"""

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.small_sequences(path="molecules.smi", length=80, alphabet="smiles", long="drop")
