"""ReDiff (arXiv 2510.19871) on characters: a masked model that revises what it has written, for two CPU cores.

    python -m diffusion_jax train --config=configs/rediff/characters.py --workdir=runs/rediff1
    python -m diffusion_jax train --config=configs/rediff/characters.py:2 --workdir=runs/rediff2 \\
        --config.train.init_from=runs/rediff1

The argument is the stage: 1 trains on random substitutions, 2 on the model's own drafts of texts of which
half is masked. On the source of Python's standard library, which every installation has; another text by
`--config.data.name=text --config.data.path=some.txt`. Hardware: 1 CPU core, about 7 minutes for 1,500 steps of
stage 1, as long for 500 of stage 2. Full scale: configs/rediff/openwebtext.py.
"""

from configs import common


def get_config(stage: str = "1"):
    """The config of a stage, "1" or "2"; override with `--config.section.field=value`."""
    first = stage == "1"
    return common.config(
        data={"name": "standard_library", "length": 64, "stride": 16},
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": 128,
            "depth": 4,
            "heads": 4,
            "max_length": 64,
            "time_conditioned": False,
        },
        method={
            "name": "refine",
            "stage": int(stage),
            "replace": 0.05,
            "draft_steps": 4,
            "draft_rate": 0.5,
            "label_dropout": 0.0,
            "nfe": 16,
        },
        train=common.small_train(
            steps=1500 if first else 500,
            every=250,
            batch_size=16,
            optimizer="adamw",
            learning_rate=2e-3 if first else 2e-4,
            ema=(0.995,),
            init_from="" if first else "runs/rediff1",
        ),
        evaluate={
            "draws": 16,
            "num": 512,
            "samplers": (
                {"name": "llada", "nfe": 16, "temperature": 1.0},
                {"name": "confidence", "nfe": 16, "order": "sampled", "revise": 1.0},
            ),
        },
    )
