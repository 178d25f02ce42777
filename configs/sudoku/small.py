"""Masked diffusion on Sudoku, small enough for two CPU cores.

    python -m diffusion_jax train --config=configs/sudoku/small.py --workdir=runs/sudoku

On boards made by the library, of which any number of cells is masked; `--config.data.path=` names a file of
puzzles (see `data.sudoku`), `--config.data.givens=` is how many cells of a puzzle are known when it is sampled.
The network sees no time, and has one layer: it rules out the digits of the 20 cells that see a cell, and
anything further is left to the order of decoding. Positions are those of a row and a column: with one vector
a cell, attention takes thousands of steps to find rows, columns and boxes, or never does (log 9 = 2.197 nats
a cell). Hardware: 1 CPU core, about 5 minutes. Full scale: configs/sudoku/full.py.
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
            "positions": "axial",
            "columns": 9,
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
            steps=8000,
            every=2500,
            batch_size=16,
            optimizer="adamw",
            learning_rate=3e-3,
            b2=0.99,
            weight_decay=0.01,
            ema=(0.998,),
        ),
        evaluate={"draws": 4, "num": 200},
    )
