"""First-hitting sampling (arXiv 2409.02908): exact in as many calls as there are tokens."""

from experiments.reproduce import pick

TITLE = "First-hitting sampler (arXiv 2409.02908)"
CLAIM = "L calls of the first-hitting sampler equal ancestral sampling with many more"
CONFIGS = {"cpu": "configs.digits.masked", "full": "configs.mdlm.text8"}
SAMPLERS = (
    *({"name": "masked_ancestral", "nfe": n} for n in (8, 16, 64, 256)),
    {"name": "first_hitting"},
)


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    hitting = next(row for row in rows if row["sampler"] == "first_hitting")
    coarse, fine = pick(rows, "masked_ancestral", 8), pick(rows, "masked_ancestral", 256)
    calls = 256 / hitting["nfe"]
    return (
        (
            f"Frechet distance, first-hitting over ancestral with {calls:g} times the calls, at most 1.1",
            hitting["frechet"] / fine,
            hitting["frechet"] <= 1.1 * fine,
        ),
        (
            "first-hitting over ancestral at 8 calls, below 1",
            hitting["frechet"] / coarse,
            hitting["frechet"] < coarse,
        ),
    )
