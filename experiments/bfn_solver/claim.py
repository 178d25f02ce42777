"""BFN-Solver (arXiv 2404.15766): Bayesian flows in 5 to 20 times fewer calls than by their own sampler.

Quality is what the own sampler has at 20, 50 and 100 calls, within one standard deviation over the
seeds; both sides count the fewest measured calls that reach it. At the scale of the digits the factor
of 5 is found in the texture distance of the continuous flow, at 50 and 100 calls. It is not found in
its Frechet distance, which comes to that of held-out data at 20 to 50 calls, after which there is
nothing left to gain; nor in tokens: there the own sampler is as good with 10 calls as with 100, and
the figures are those of the network, not of the steps.
"""

import importlib

from experiments import reproduce

TITLE = "BFN-Solver (arXiv 2404.15766)"
CLAIM = (
    "BFN-Solver reaches the quality of the BFN's own sampler in 5 to 20 times fewer network calls"
)
CONFIGS = {"cpu": "configs.digits.bfn_continuous", "full": "configs.bfn.cifar10"}
TOKENS = {"cpu": "configs.digits.bfn_discrete", "full": "configs.bfn.text8"}
OWN = (10, 20, 50, 100)  # calls of the BFN's own sampler
FAST = (5, 10, 20, 50)  # calls of the solvers
CONTINUOUS = ("bfn_continuous", ("bfn_solver_ode1", "bfn_solver_ode2", "bfn_solver_sde2"))
DISCRETE = ("bfn", ("bfn_ode1", "bfn_ode2m", "bfn_sde1", "bfn_sde2m"))


def measure(options):
    """Rows of both kinds of data: their own sampler, and the solvers, over the seeds."""
    rows = []
    for data, modules, (own, solvers) in (
        ("continuous", CONFIGS, CONTINUOUS),
        ("tokens", TOKENS, DISCRETE),
    ):
        module = modules[options.scale]
        config = importlib.import_module(module).get_config()
        if options.num:
            config.evaluate.num = options.num
        run = reproduce.trained(config, options.workdir, reproduce.run_name(module))
        samplers = [{"name": own, "nfe": n} for n in OWN]
        samplers += [{"name": name, "nfe": n} for name in solvers for n in FAST]
        cache = options.workdir / f"classifier_{data}.npz"
        found = reproduce.measure(run, samplers, range(options.seeds), cache)
        rows += [{"data": data, **row} for row in found]
    return rows


def curve(rows, data, sampler, figure):
    """Calls -> mean figure of a sampler on one kind of data, where it was measured."""
    return {
        row["nfe"]: row[figure]
        for row in rows
        if (row["data"], row["sampler"]) == (data, sampler) and row.get(figure) is not None
    }


def fewest(rows, data, sampler, figure, target):
    """The fewest measured calls with which a sampler is as good as `target`, or None."""
    found = curve(rows, data, sampler, figure)
    return min((n for n, value in found.items() if value <= target), default=None)


def verdicts(rows):
    """`(statement, measured, holds)`: calls of the own sampler over those of the best solver."""
    found = []
    for data, (own, solvers) in (("continuous", CONTINUOUS), ("tokens", DISCRETE)):
        for figure in ("frechet", "texture", "bigram_divergence"):
            values = curve(rows, data, own, figure)
            spread = curve(rows, data, own, f"{figure}_std")
            for calls in (n for n in values if n > min(values)):
                target = values[calls] + spread.get(calls, 0.0)
                slow = fewest(rows, data, own, figure, target)
                needed = {s: fewest(rows, data, s, figure, target) for s in solvers}
                needed = {s: n for s, n in needed.items() if n is not None}
                what = f"{data}, {figure} {target:.3g}: calls of {own} ({slow})"
                if not needed:
                    found.append((f"{what}; no solver reaches it", 0.0, False))
                    continue
                best = min(needed, key=needed.get)
                ratio = slow / needed[best]
                statement = f"{what} over those of {best} ({needed[best]}), at least 5"
                found.append((statement, ratio, ratio >= 5))
    return tuple(dict.fromkeys(found))
