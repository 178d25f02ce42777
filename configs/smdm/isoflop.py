"""SMDM's scaling laws (arXiv 2410.18514, section 3) at the paper's scale: one size at one budget.

    python -m diffusion_jax.data.prepare_text --input=slimpajama.jsonl.gz --out=data/slimpajama \\
        --tokenizer=llama2/tokenizer.json
    python -m diffusion_jax train --config=configs/smdm/isoflop.py:masked,768,6e18 --workdir=runs/iso \\
        --config.data.path=data/slimpajama

The argument is the kind ("masked" or "autoregressive"), the width of one of `SIZES` and the budget in
floating-point operations, one of `BUDGETS`: the steps are C / (6 N) tokens. 768 and 1792 are the paper's 170M
and 1.03B; the sizes between and below are chosen here.

Hardware: 8 accelerators with 80 GB; 6e18 takes about an hour, 1e20 most of a day. Deviation: no batches of
shortened sequences. Small twin: configs/smdm/ladder.py.
"""

from configs import common
from configs.smdm.ladder import family

# width -> depth, heads
SIZES = {
    384: (8, 6),
    512: (10, 8),
    640: (14, 10),
    768: (18, 12),
    1024: (18, 16),
    1280: (20, 10),
    1792: (20, 14),
}
BUDGETS = ("6e18", "1e19", "3e19", "6e19", "1e20")
RUNS = tuple(f"{width},{budget}" for width in SIZES for budget in BUDGETS)
READ_AT = (1.0,)  # the rate falls to its end: a run is good for one budget
BATCH, LENGTH = 256, 2048


def size_of(width: int) -> int:
    """N of 6 N D: parameters of the blocks, as the paper counts them."""
    return 16 * width**2 * SIZES[width][0]


def sized(kind: str, width: int, steps: int):
    """The config of a kind, a width of `SIZES` and a number of steps."""
    attention, method = family(kind)
    if kind == "masked":
        method |= {"objective": "lambda", "sampler": "masked_ancestral", "nfe": 256}
    depth, heads = SIZES[width]
    return common.config(
        data={"name": "documents", "path": "data/slimpajama", "length": LENGTH},
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "smdm",
            "width": width,
            "depth": depth,
            "heads": heads,
            "max_length": LENGTH,
            "dtype": "bfloat16",
            "remat": "full",
            **attention,
        },
        method=method,
        train=common.train(
            steps=steps,
            batch_size=BATCH,
            optimizer="adamw",
            learning_rate=2e-4,
            b2=0.95,
            weight_decay=0.1,
            schedule={
                "name": "cosine",
                "warmup_steps": max(100, steps // 100),
                "end_factor": 0.1,
            },
            every=min(steps, 5000),
        ),
        evaluate={"draws": 16, "num": 256},
    )


def get_config(argument: str = "masked,768,6e18"):
    """The config of a kind, a width and a budget; override with `--config.section.field=value`."""
    kind, width, budget = ([*argument.split(","), "", ""])[:3]
    for name, value, valid in (("width", width, map(str, SIZES)), ("budget", budget, BUDGETS)):
        valid = tuple(valid)
        if value not in valid:
            raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(valid)}")
    steps = round(float(budget) / (6 * size_of(int(width)) * BATCH * LENGTH))
    return sized(kind, int(width), steps)
