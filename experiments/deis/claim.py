"""DEIS (arXiv 2204.13902): third-order extrapolation of eps in t on the quadratic grid."""

from experiments.reproduce import run_name, trained
from experiments.solvers.comparison import Solver, on_a_model, select

TITLE = "DEIS (arXiv 2204.13902)"
CLAIM = "DEIS tAB3 at 10 network calls is as good as DDIM at 50"
CONFIGS = {"cpu": "configs.digits.score", "full": "configs.score_sde.cifar10_vp"}
_SOLVERS = (
    Solver("DDIM", "ddim"),
    *(Solver(f"DEIS tAB{r}", f"deis_tab{r}", {"grid": "quadratic"}) for r in (1, 2, 3)),
    Solver("DEIS rhoAB3", "deis_rhoab3", {"grid": "quadratic"}),
    Solver("iPNDM", "ipndm", {"grid": "uniform"}),
)


def measure(options):
    """Rows of DEIS's variants and of DDIM."""
    return on_a_model(
        trained(options.config, options.workdir, run_name(CONFIGS[options.scale])),
        "model",
        _SOLVERS,
        (5, 10, 20, 50),
        seeds=range(options.seeds),
        num=options.num or 1000,
        classifier=options.classifier,
    )


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    out = []
    for figure in ("rms", "frechet", "texture"):
        curves = select(rows, "model", figure)
        ratio = curves["DEIS tAB3"][10] / curves["DDIM"][50]
        out.append((f"{figure}, tAB3 at 10 over DDIM at 50, at most 1.05", ratio, ratio <= 1.05))
        ratio = curves["DEIS tAB3"][5] / curves["DDIM"][10]
        out.append((f"{figure}, tAB3 at 5 over DDIM at 10, at most 1.05", ratio, ratio <= 1.05))
    return tuple(out)
