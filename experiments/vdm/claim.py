"""VDM (arXiv 2107.00630): the bound does not see the schedule between its ends, its variance does.

Held-out bits per dimension, `seeds` estimates each. Rows of one run share times and noise, so that
their differences are far more exact than the rows. "spread" is the standard deviation of the
diffusion term of one example at one independent time. The learned schedule is trained for low
variance (the paper's appendix I.2); its network is judged under its own schedule and, as it is told
the log-SNR, under the linear one.
"""

import itertools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.methods.vdm import bind_log_snr, build_log_snr
from diffusion_jax.objectives import bits_per_dim, variational_bound, variational_terms
from diffusion_jax.objectives.variational import variational_draws
from experiments.reproduce import trained

TITLE = "VDM (arXiv 2107.00630)"
CLAIM = (
    "the T-step bound falls to the continuous-time one; a schedule learned between fixed ends leaves "
    "the bound as it is and lowers its variance"
)
CONFIGS = {"cpu": "configs.digits.vdm", "full": "configs.vdm.cifar10"}
STEPS = (1, 2, 4, 8, 16, 64, 256, 1000)
SCHEDULE = {"hidden_scale": 8.0}
DRAWS, INDEPENDENT = 4, 16  # estimates of the bound, and of its spread, in one seed


def figures(run, gamma, steps, seeds, spread=False):
    """Bits per dimension of each seed, and the spread, of a run under a schedule."""
    test = run.source("test")
    shape, levels = run.spec.shape, run.config["method"]["levels"]
    size = min(len(test), 300)

    @jax.jit
    def estimate(params, batch, key):
        denoise = run.method.denoiser(params, batch)
        x0, index = batch[run.spec.kind], batch["index"]
        terms = variational_bound(
            gamma(params),
            denoise,
            key,
            x0,
            levels=levels,
            steps=steps,
            index=index,
            total=len(test),
        )
        return bits_per_dim(terms.total, shape)

    @jax.jit
    def alone(params, batch, key):
        denoise = run.method.denoiser(params, batch)
        t_key, key = jax.random.split(key)
        x0, index = batch[run.spec.kind], batch["index"]
        _, *noise = variational_draws(key, x0, index, len(test))
        t = jax.random.uniform(t_key, index.shape)
        terms = variational_terms(gamma(params), denoise, x0, t, *noise, levels=levels)
        return bits_per_dim(terms.diffusion, shape)

    def over_test(one, key):
        found = []
        for first in range(0, len(test), size):
            rows = np.arange(first, min(first + size, len(test)))
            batch = test.take(rows) | {"index": rows.astype(np.int32)}
            found.append(one(run.params, jax.tree.map(jnp.asarray, batch), key))
        return np.concatenate(found)

    bits, spreads = [], []
    for seed in range(seeds):
        keys = jax.random.split(jax.random.key(seed), DRAWS)
        bits.append(float(np.mean([over_test(estimate, k) for k in keys])))
        if spread:
            keys = jax.random.split(jax.random.key(1000 + seed), INDEPENDENT)
            spreads.append(float(np.std([over_test(alone, k) for k in keys])))
    return bits, spreads


def row(name, schedule, steps, bits, spreads, reference=None):
    """One row of the table; `gap` is what it has more than the reference, seed by seed."""
    gaps = [a - b for a, b in zip(bits, bits if reference is None else reference)]
    many = len(bits) > 1
    return {
        "run": name,
        "schedule": schedule,
        "steps": steps or "continuous",
        "bits_per_dim": statistics.mean(bits),
        "bits_per_dim_std": statistics.stdev(bits) if many else None,
        "gap": statistics.mean(gaps),
        "gap_error": statistics.stdev(gaps) / math.sqrt(len(gaps)) if many else None,
        "spread": statistics.mean(spreads) if spreads else None,
        "spread_std": statistics.stdev(spreads) if spreads and many else None,
    }


def measure(options):
    """Trains with the fixed and with a learned schedule; rows of bounds and spreads."""
    fixed = trained(options.config, options.workdir, "vdm_fixed")
    rows = []
    linear = lambda params: fixed.method.process.gamma
    bits, spreads = figures(fixed, linear, 0, options.seeds, True)
    for steps in STEPS:
        found, _ = figures(fixed, linear, steps, options.seeds)
        rows.append(row("fixed", "linear", steps, found, [], bits))
    rows.append(row("fixed", "linear", 0, bits, spreads))
    config = options.config.copy_and_resolve_references()
    config.method.schedule, config.method.schedule_loss = "monotone", "variance"
    config.method.schedule_options = SCHEDULE
    learned = trained(config, options.workdir, "vdm_learned")
    process = learned.method.process
    module = build_log_snr(process, "monotone", **SCHEDULE)
    own = lambda params: bind_log_snr(process, module, params)
    bits, spreads = figures(learned, linear, 0, options.seeds, True)
    rows.append(row("learned", "linear", 0, bits, spreads))
    rows.append(row("learned", "its own", 0, *figures(learned, own, 0, options.seeds, True), bits))
    gamma = own(learned.params)(jnp.linspace(0.0, 1.0, 5))
    rows[-1]["gamma_at_quarters"] = " ".join(f"{v:.2f}" for v in gamma)
    return rows


def _row(rows, **wanted):
    return next(r for r in rows if all(r[k] == v for k, v in wanted.items()))


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    by_steps = [_row(rows, run="fixed", steps=n) for n in STEPS]
    fixed = _row(rows, run="fixed", steps="continuous")
    linear = _row(rows, run="learned", schedule="linear")
    own = _row(rows, run="learned", schedule="its own")
    falls = max(
        b["bits_per_dim"] - a["bits_per_dim"] for a, b in itertools.pairwise((*by_steps, fixed))
    )
    many, before = by_steps[-1]["gap"], by_steps[-2]["gap"]
    noise, error = fixed["bits_per_dim_std"] or math.inf, own["gap_error"] or math.inf
    ratio = own["spread"] / linear["spread"]
    between = own["bits_per_dim"] - fixed["bits_per_dim"]
    return (
        ("bits per dimension from T to the next and to continuous time, below 0", falls, falls < 0),
        (
            f"T = 1000 over continuous time, within the noise of one seed, {noise:.2g}",
            many,
            abs(many) <= noise,
        ),
        (
            "gap at T = 256 over that at 1000: 1/T means 3.9, within 10 %",
            before / many,
            abs(before / many / 3.90625 - 1) < 0.1,
        ),
        (
            f"one network, its own less linear schedule, within 3 errors of {error:.2g}",
            own["gap"],
            abs(own["gap"]) <= 3 * error,
        ),
        ("spread of one example, its own over linear schedule, below 1", ratio, ratio < 1),
        (
            "trained with a learned less with the fixed schedule, within 0.05",
            between,
            abs(between) <= 0.05,
        ),
    )
