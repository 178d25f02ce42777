"""Masked diffusion on Sudoku at the scale of "Train for the worst, plan for the best" (arXiv 2502.06768).

    python -m diffusion_jax train --config=configs/sudoku/full.py --workdir=runs/sudoku_full \\
        --config.data.path=sudoku.csv

The paper's model has 6 million parameters (this one: 8 layers of width 256) and is trained on 1.8 million
puzzles; it reports 6.9 % of the boards solved in random order and 89.5 % by the top-k margin. Without a file the
boards are made here. Hardware: 1 accelerator, some hours. Small twin: configs/sudoku/small.py.
"""

from ml_collections import config_dict

from configs import common


def get_config():
    """The config; override with `--config.section.field=value`."""
    return common.config(
        data={
            "name": "sudoku",
            "path": config_dict.placeholder(str),
            "givens": 30,
            "unique": False,
            "train_count": 1_800_000,
            "test_count": 10_000,
            "bases": 4096,
        },
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 256,
            "depth": 8,
            "heads": 8,
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
        train=common.train(
            steps=300_000,
            batch_size=256,
            optimizer="adamw",
            learning_rate=1e-3,
            schedule={"name": "cosine", "warmup_steps": 2000},
            every=10_000,
        ),
        evaluate={"draws": 16, "num": 2000},
    )
