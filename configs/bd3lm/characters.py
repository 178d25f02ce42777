"""Block diffusion (BD3LM, arXiv 2503.09573) in miniature: one block size, characters of Python's library.

    python -m diffusion_jax train --config=configs/bd3lm/characters.py:4 --workdir=runs/blocks_4
    python -m diffusion_jax train --config=configs/bd3lm/characters.py:1 --workdir=runs/blocks_1

Windows of 64 characters. The argument is the block size: 64 is a masked model, 1 an autoregressive one (in
the paper's form: the token to be predicted is a mask that sees those before it). All else is equal.

Hardware: one CPU core. Time: three minutes a size. Expected: the smaller the blocks the likelier. Full scale:
configs/bd3lm/openwebtext.py.
"""

from configs import common

LENGTH = 64


def get_config(block_size: str = "4"):
    """The config of a block size; override with `--config.section.field=value`.

    Raises:
      ValueError: a size that is no int from 1 to 64.
    """
    if not block_size.isdecimal() or not 1 <= int(block_size) <= LENGTH:
        raise ValueError(f"the block size must be an int from 1 to {LENGTH}, got {block_size!r}")
    return common.config(
        data={"name": "standard_library", "length": LENGTH, "stride": 16},
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 64,
            "depth": 3,
            "heads": 2,
            "max_length": LENGTH,
            "time_conditioned": False,
            "attention": "block",
            "block_size": int(block_size),
        },
        method={
            "name": "block_diffusion",
            "objective": "count",
            "label_dropout": 0.0,
            "sampler": "block_decoding",
        },
        train=common.small_train(
            steps=1500,
            every=750,
            batch_size=16,
            optimizer="adamw",
            learning_rate=4e-3,
            ema=(0.99,),
        ),
        evaluate={"draws": 16, "num": 64},
    )
