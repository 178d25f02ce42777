"""Stochastic interpolants (arXiv 2303.08797): the diffusion is chosen after training, and matters.

One network (velocity and denoiser, two heads) is sampled with epsilon 0, 0.25 and 1, at the last checkpoint
and at the first that is kept, a worse network. The paper bounds the KL divergence of the SDE by both losses,
that of the ODE by neither alone: a network that is not exact should gain from noise, given the steps that
noise needs. SDEs end with a step of the ODE.

Found on the digits: at 100 calls noise helps both networks and both solvers, epsilon 1 most; Heun at 20
calls is as good as Euler at 100 on the ODE. With epsilon 1 at 20 calls Heun is worse than Euler-Maruyama,
and worse on "both_ends" than on equal steps (the two verdicts that do not hold): its 10 steps are too
large for that much noise in the middle of the way, where this grid has the longest.
"""

from diffusion_jax import run as runs
from diffusion_jax.training import Checkpoints
from experiments import reproduce
from experiments.reproduce import run_name, trained

TITLE = "Stochastic interpolants (arXiv 2303.08797)"
CLAIM = "with an inexact network an SDE beats the ODE of the same training, given enough steps"
CONFIGS = {"cpu": "configs.digits.interpolant", "full": "configs.interpolants.flowers"}
EPSILONS = (0.0, 0.25, 1.0)
CALLS = (10, 20, 50, 100)
SOLVERS = ("interpolant_euler", "interpolant_heun")

# (solver, calls, epsilon, grid)
ASKED = (
    *((s, n, e, "both_ends") for s in SOLVERS for n in CALLS for e in EPSILONS),
    *((s, CALLS[1], e, "uniform") for s in SOLVERS for e in EPSILONS),
)


def _sampler(solver, calls, epsilon, grid):
    noise = {"epsilon": epsilon, "ode_end": True} if epsilon else {}
    return {"name": solver, "nfe": calls, "grid": grid, **noise}


def measure(options):
    """Rows of both checkpoints: one a solver, epsilon, grid and number of calls."""
    run = trained(options.config, options.workdir, run_name(CONFIGS[options.scale]))
    with Checkpoints(run.workdir, read_only=True) as checkpoints:
        kept = checkpoints.steps()
    rows = []
    for step in dict.fromkeys((kept[0], kept[-1])):
        found = reproduce.measure(
            runs.open_run(run.workdir, step=step),
            [_sampler(*one) for one in ASKED],
            range(options.seeds),
            options.classifier,
        )
        for i, row in enumerate(found):
            named = zip(
                ("sampler", "budget", "epsilon", "grid"), ASKED[i] if i < len(ASKED) else ()
            )
            rows.append({"updates": step, **row, **dict(named)})
    return rows


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim: ratios of Frechet distances."""
    updates = sorted({row["updates"] for row in rows})
    fields = ("updates", "sampler", "budget", "epsilon", "grid")
    frechet = {tuple(row.get(f) for f in fields): row["frechet"] for row in rows}
    euler, heun = SOLVERS
    few, some, many = CALLS[0], CALLS[1], CALLS[-1]
    out = []

    def add(what, over, under, above=False):
        ratio = frechet[over] / frechet[under]
        holds = ratio > 1.0 if above else ratio < 1.0
        out.append((f"{what}, {'above' if above else 'below'} 1", ratio, holds))

    for step in updates:
        for solver in SOLVERS:
            for epsilon in EPSILONS[1:]:
                add(
                    f"{step} updates, {many} calls of {solver}: epsilon {epsilon} over the ODE",
                    (step, solver, many, epsilon, "both_ends"),
                    (step, solver, many, 0.0, "both_ends"),
                )
    last = updates[-1]
    add(
        f"{last} updates, {few} calls of {euler}: epsilon {EPSILONS[-1]} over the ODE",
        (last, euler, few, EPSILONS[-1], "both_ends"),
        (last, euler, few, 0.0, "both_ends"),
        above=True,
    )
    for epsilon in EPSILONS:
        add(
            f"{last} updates, {some} calls, epsilon {epsilon}: {heun} over {euler}",
            (last, heun, some, epsilon, "both_ends"),
            (last, euler, some, epsilon, "both_ends"),
        )
        add(
            f"{last} updates, {some} calls of {heun}, epsilon {epsilon}: both_ends over uniform",
            (last, heun, some, epsilon, "both_ends"),
            (last, heun, some, epsilon, "uniform"),
        )
    return tuple(out)
