"""DualFast (arXiv 2506.13058): the network's own error corrected at no further call.

The correction also acts as an extrapolation, on an exact model too, and biases the limit of many steps:
the second table of verdicts tells the two apart by the error to the exact flow at 20 calls.
"""

from experiments.reproduce import run_name, trained
from experiments.solvers.comparison import DUALFAST, Solver, on_a_model, select

TITLE = "DualFast (arXiv 2506.13058)"
CLAIM = (
    "the dual-error variants of DDIM, DPM-Solver++ and UniPC beat their base solvers at 5-10 calls"
)
CONFIGS = {"cpu": "configs.digits.score", "full": "configs.score_sde.cifar10_vp"}
_BASES = {
    "DualFast DDIM": Solver("DDIM", "ddim"),
    "DualFast 2M": Solver("DPM-Solver++ 2M", "dpmpp_2m"),
    "DualFast UniPC-2": Solver("UniPC-2", "unipc_2"),
}


def measure(options):
    """Rows of the base solvers and of their corrected forms."""
    return on_a_model(
        trained(options.config, options.workdir, run_name(CONFIGS[options.scale])),
        "model",
        (*_BASES.values(), *DUALFAST),
        (5, 6, 8, 10, 20),
        seeds=range(options.seeds),
        num=options.num or 1000,
        classifier=options.classifier,
    )


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    out = []
    for figure, calls in (("frechet", (5, 10)), ("rms", (5, 10, 20))):
        curves = select(rows, "model", figure)
        for name, base in _BASES.items():
            for n in calls:
                ratio = curves[name][n] / curves[base.label][n]
                out.append(
                    (f"{figure} at {n} calls, {name} over its base, below 1", ratio, ratio < 1)
                )
    return tuple(out)
