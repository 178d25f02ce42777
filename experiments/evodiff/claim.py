"""EVODiff (arXiv 2509.26096) against DPM-Solver++ at few calls.

The paper's 2.78 against 5.10 (Frechet distance on CIFAR-10, EDM's model, 10 calls) compares with
DPM-Solver++ 3M as the authors ran it; DPM-Solver-v3's authors report 2.91 for the same solver there.
"""

from experiments.reproduce import run_name, trained
from experiments.solvers.comparison import Solver, on_a_model, select

TITLE = "EVODiff (arXiv 2509.26096)"
CLAIM = "coefficients from the model's outputs beat DPM-Solver++ at 10 network calls"
CONFIGS = {"cpu": "configs.digits.score", "full": "configs.edm.cifar10"}
_SOLVERS = (
    Solver("DPM-Solver++ 2M", "dpmpp_2m"),
    Solver("DPM-Solver++ 3M", "dpmpp_3m"),
    Solver("EVODiff", "evodiff"),
)


def measure(options):
    """Rows of EVODiff and DPM-Solver++."""
    return on_a_model(
        trained(options.config, options.workdir, run_name(CONFIGS[options.scale])),
        "model",
        _SOLVERS,
        (5, 6, 8, 10, 15, 20),
        seeds=range(options.seeds),
        num=options.num or 1000,
        classifier=options.classifier,
    )


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    curves = select(rows, "model", "frechet")
    out = []
    for n in (5, 10):
        for rival in ("DPM-Solver++ 2M", "DPM-Solver++ 3M"):
            ratio = curves["EVODiff"][n] / curves[rival][n]
            out.append((f"Frechet distance at {n} calls over {rival}, below 1", ratio, ratio < 1))
    return tuple(out)
