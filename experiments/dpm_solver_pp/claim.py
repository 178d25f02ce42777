"""DPM-Solver++ (arXiv 2211.01095): the second-order solver needs far fewer calls than DDIM."""

from experiments.reproduce import pick

TITLE = "DPM-Solver++ (arXiv 2211.01095)"
CLAIM = "DPM-Solver++(2M) at 10 calls matches DDIM at many more; high order helps most at few calls"
CONFIGS = {"cpu": "configs.digits.score", "full": "configs.score_sde.cifar10_vp"}
SAMPLERS = (
    *({"name": "ddim", "nfe": n} for n in (5, 10, 20, 50)),
    *({"name": "dpmpp_2m", "nfe": n} for n in (5, 10, 20)),
)


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim; texture is the finer distance."""
    second, first = pick(rows, "dpmpp_2m", 10, "texture"), pick(rows, "ddim", 10, "texture")
    many = pick(rows, "ddim", 20, "texture")
    return (
        ("texture distance at 10 calls, 2M over DDIM, below 1", second / first, second < first),
        ("2M at 10 calls over DDIM at 20, below 1", second / many, second < many),
    )
