"""Masked diffusion on Sudoku, small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/sudoku/small.py --workdir=runs/sudoku

On boards made by the library, of which any number of cells is masked; `--config.data.path=` names a file of
puzzles (see `data.sudoku`), `--config.data.givens=` is how many cells of a puzzle are known when it is sampled.
The network sees no time, and has one layer: it rules out the digits of the 20 cells that see a cell, and
anything further is left to the order of decoding. For the first 1,000 to 3,000 steps nothing seems to happen
(log 9 = 2.197 nats a cell), until attention has found the rows, columns and boxes. Hardware: 1 CPU core,
about 7 minutes. Full scale: configs/sudoku/full.py.
"""

from ml_collections import config_dict

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "sudoku",
            "path": config_dict.placeholder(str),
            "givens": 40,
            "unique": False,
            "train_count": 50_000,
            "test_count": 500,
        },
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 96,
            "depth": 1,
            "heads": 4,
            "positions": "learned",
            "max_length": 81,
            "time_conditioned": False,
        },
        method={
            "name": "masked",
            "objective": "count",
            "label_dropout": 0.0,
            "sampler": "top_k_margin",
        },
        train=common.small_train(
            steps=16_000,
            every=2500,
            batch_size=16,
            optimizer="adamw",
            learning_rate=3e-3,
            b2=0.99,
            ema=(0.998,),
        ),
        evaluate={"draws": 4, "num": 200},
    )
