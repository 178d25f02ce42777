"""EVODiff (arXiv 2509.26096) against DPM-Solver++ at few calls.

On the digits model the Frechet distance of its samples is lower than that of the exact flow of the same
network: the claim holds, but by moving samples off the flow (its error to the flow is larger than that of
DPM-Solver++), not by following it more closely. The verdicts say both.

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
    out = []
    for figure in ("frechet", "rms"):
        curves = select(rows, "model", figure)
        for n in (5, 10):
            for rival in ("DPM-Solver++ 2M", "DPM-Solver++ 3M"):
                ratio = curves["EVODiff"][n] / curves[rival][n]
                out.append((f"{figure} at {n} calls over {rival}, below 1", ratio, ratio < 1))
    return tuple(out)
