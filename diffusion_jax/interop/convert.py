"""`python -m diffusion_jax.interop.convert SOURCE.pth TARGET.npz`: Inception weights for machines without
torch.

The target is `.npz`, or `.safetensors` with the names of the source. It is compared with the source after
it was written.
"""

import argparse
import sys
from collections.abc import Sequence

import jax
import numpy as np

from diffusion_jax.interop.inception import read_inception, write_inception


def convert(source: str, target: str) -> int:
    """Reads weights of the FID Inception and writes them again; the number of parameters.

    Raises:
      ValueError: weights of another network, a file that cannot be read, an ending that is not known.
      ImportError: a `.pth` source, and torch is missing.
    """
    params = read_inception(source, progress=True)
    back = read_inception(write_inception(target, params))
    if not all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(back))):
        raise ValueError(f"{target} does not hold what was written to it")
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser("python -m diffusion_jax.interop.convert", description=__doc__)
    parser.add_argument("source", help="pytorch-fid's .pth, or .safetensors, or .npz")
    parser.add_argument("target", help=".npz or .safetensors")
    arguments = parser.parse_args(argv)
    try:
        count = convert(arguments.source, arguments.target)
    except (ValueError, ImportError, OSError) as error:
        print(f"diffusion_jax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{count:,} numbers: {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
