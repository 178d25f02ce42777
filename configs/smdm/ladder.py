"""SMDM's scaling laws (arXiv 2410.18514, section 3) in miniature: one size of a ladder on real text.

    python -m diffusion_jax train --config=configs/smdm/ladder.py:masked,32 --workdir=runs/masked_32
    python -m diffusion_jax train --config=configs/smdm/ladder.py:autoregressive,32 --workdir=runs/ar_32

Characters of Python's standard library, windows of 64. The second part of the argument is the width, one of
`SIZES`. Sizes spend about the same time each; masked and autoregressive networks differ in their
attention alone. The rate is constant and the averaged weights are read at checkpoints: one run gives the
losses of many budgets. `--config.data.name=text --config.data.path=FILE` reads another text.

Hardware: one CPU core. Time: a minute or two a size. Expected: experiments/smdm.
"""

from configs import common

# width -> depth, heads, training steps of 16 windows, learning rate
SIZES = {
    24: (2, 1, 12_600, 5e-3),
    32: (3, 1, 6000, 4e-3),
    48: (3, 2, 2880, 3e-3),
    64: (4, 2, 1200, 3e-3),
    96: (5, 3, 480, 2e-3),
}
RUNS = tuple(map(str, SIZES))  # arguments behind the kind
CHECKPOINTS = 24
READ_AT = tuple(n / CHECKPOINTS for n in (1, 2, 3, 5, 8, 12, 18, 24))  # shares of a run


def family(kind: str):
    """`(network fields, method section)` of a kind. Raises ValueError for an unknown one."""
    if kind == "masked":
        return {}, {"name": "masked", "label_dropout": 0.0}
    if kind == "autoregressive":
        return {"attention": "causal"}, {"name": "autoregressive"}
    raise ValueError(f"unknown kind {kind!r}; valid: masked, autoregressive")


def get_config(argument: str = "masked,32"):
    """The config of a kind and a width; override with `--config.section.field=value`."""
    kind, _, width = argument.partition(",")
    attention, method = family(kind)
    if width not in map(str, SIZES):
        raise ValueError(f"unknown width {width!r}; valid: {', '.join(map(str, SIZES))}")
    width = int(width)
    depth, heads, steps, rate = SIZES[width]
    return common.config(
        data={"name": "standard_library", "length": 64, "stride": 16},
        process={"name": "absorbing", "schedule": "linear"},
        network={
            "name": "token_transformer",
            "width": width,
            "depth": depth,
            "heads": heads,
            "max_length": 64,
            "time_conditioned": False,
            **attention,
        },
        method=method,
        train=common.small_train(
            steps=steps,
            every=steps // CHECKPOINTS,
            batch_size=16,
            optimizer="adamw",
            learning_rate=rate,
            schedule={"name": "warmup", "warmup_steps": 50},
            ema=(0.99,),
        )
        | {"ema_warmup": True, "keep": 2 * CHECKPOINTS, "sample_every": 0},
        evaluate={"draws": 16},
    )
