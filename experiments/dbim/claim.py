"""DBIM (arXiv 2405.15885): a trained bridge sampled with far fewer calls than DDBM's Heun sampler."""

from experiments.reproduce import pick

TITLE = "DBIM (arXiv 2405.15885)"
CLAIM = "DBIM at 20 calls is no worse than DDBM's hybrid Heun sampler at 100 to 500"
CONFIGS = {"cpu": "configs.digits.bridge", "full": "configs.ddbm.edges2handbags"}
SAMPLERS = (
    *({"name": "dbim", "nfe": n} for n in (5, 10, 20)),
    {"name": "dbim", "nfe": 20, "eta": 1.0},
    *({"name": "ddbm_heun", "nfe": n} for n in (20, 50, 101)),
)


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    few, many = pick(rows, "dbim", 20), pick(rows, "ddbm_heun", 101)
    five, fifty = pick(rows, "dbim", 5), pick(rows, "ddbm_heun", 50)
    return (
        (
            "Frechet distance, DBIM at 20 over Heun at 101, at most 1.05",
            few / many,
            few <= 1.05 * many,
        ),
        ("DBIM at 5 over Heun at 50, at most 1.05", five / fifty, five <= 1.05 * fifty),
    )
