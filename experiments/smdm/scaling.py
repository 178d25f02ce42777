"""A ladder of sizes on real text, masked and autoregressive in one frame.

Compute is 6 N D, N being the parameters that multiply (all but the table of token vectors) and D the tokens
of training. Losses are nats a token of held-out windows: the likelihood of the autoregressive models, the
bound of the masked ones, both of the same windows from their first token on.
"""

import importlib

import jax
import numpy as np

from diffusion_jax import evaluation
from diffusion_jax.evaluation.perplexity import estimate_bound
from diffusion_jax.training.checkpoints import restore_params
from experiments.reproduce import run_name, trained
from experiments.smdm.reversal import KINDS

WINDOWS, DRAWS = 300, {"masked": 4, "autoregressive": 1}
BUDGETS = 7


def run_of(options, module, kind, argument):
    """The run of a kind and a size."""
    config = options.load(module, f"{kind},{argument}")
    name = f"{run_name(module)}_{kind}_{argument.replace(',', '_')}"
    return trained(config, options.workdir, name)


def curve(run, kind, read_at, windows=WINDOWS):
    """Rows of one run: held-out nats a token after shares of its steps, where checkpoints stand."""
    test = run.source("test")
    chosen = np.linspace(0, len(test) - 1, min(windows, len(test))).astype(np.int64)
    data = test.take(chosen) | {"index": np.arange(len(chosen), dtype=np.int32)}
    sizes = jax.tree.map(lambda v: v.size, run.params)
    total = sum(jax.tree.leaves(sizes))
    multiplied = total - sum(jax.tree.leaves(sizes["tokens"]))
    train = run.config["train"]
    batch, length = train["batch_size"], run.spec.shape[0]
    rows = []
    for share in read_at:
        step = round(share * train["steps"])
        params = restore_params(run.workdir, run.weights, step, target=run.params)
        nats = estimate_bound(
            run.method.bound, params, jax.random.key(0), data, draws=DRAWS[kind], batch_size=100
        )
        each = nats.mean(axis=0) / length
        rows.append(
            {
                "part": "scaling",
                "model": kind,
                "width": run.config["network"]["width"],
                "params": total,
                "N": multiplied,
                "tokens": step * batch * length,
                "compute": 6.0 * multiplied * step * batch * length,
                "nats": float(each.mean()),
                "nats_error": float(each.std() / np.sqrt(len(each))),
            }
        )
    return rows


def measure(options, module):
    """`(rows, best)` of every run's curve; by kind the run of the lowest loss at its end."""
    ladder, rows, ends = importlib.import_module(module), [], {kind: [] for kind in KINDS}
    for argument in ladder.RUNS:
        for kind in KINDS:
            run = run_of(options, module, kind, argument)
            rows += curve(run, kind, ladder.READ_AT)
            ends[kind].append((rows[-1]["nats"], run))
    return rows, {kind: min(found, key=lambda end: end[0])[1] for kind, found in ends.items()}


def budgets(rows):
    """Budgets `[BUDGETS]`: three sizes or more have been read at the lowest, all at the highest."""
    spans = []
    for kind in KINDS:
        ends = [(c.min(), c.max()) for _, c, _ in _curves(rows, kind)]
        low, high = sorted(a for a, _ in ends), sorted(b for _, b in ends)
        spans.append((low[2], high[0]))
    return np.geomspace(max(a for a, _ in spans), min(b for _, b in spans), BUDGETS)


def _curves(rows, kind, without=None):
    """`(N, compute, nats)` of every size of a kind."""
    mine = [r for r in rows if r["part"] == "scaling" and r["model"] == kind]
    for width in dict.fromkeys(r["width"] for r in mine):
        if width != without:
            own = sorted((r for r in mine if r["width"] == width), key=lambda r: r["compute"])
            yield own[0]["N"], *(np.array([r[k] for r in own]) for k in ("compute", "nats"))


def frontier(rows, kind, at, without=None):
    """The best size and loss at each budget: `Optimum`s."""
    curves = list(_curves(rows, kind, without))
    losses = np.array([evaluation.loss_at(at, c, nats) for _, c, nats in curves])
    return [evaluation.best_size([n for n, _, _ in curves], column) for column in losses.T]


def fits(rows, without=None):
    """Power laws of both kinds, `{kind: PowerLaw}`, and their optima, `{kind: [Optimum]}`."""
    at = budgets(rows)
    optima = {kind: frontier(rows, kind, at, without) for kind in KINDS}
    laws = {k: evaluation.fit_power_law(at, [o.loss for o in v]) for k, v in optima.items()}
    return laws, optima


def ratio_and_error(rows):
    """The masked slope over the autoregressive one, and its jackknife error over the sizes.

    The points of a frontier come from the same few runs, so that the scatter about the line says
    too little: the ladder is fitted again without each of its inner sizes in turn.
    """
    slope = lambda laws: laws["masked"].slope / laws["autoregressive"].slope
    laws, _ = fits(rows)
    widths = list(dict.fromkeys(r["width"] for r in rows if r["part"] == "scaling"))[1:-1]
    again = np.array([slope(fits(rows, without=width)[0]) for width in widths])
    n = len(again)
    error = np.sqrt((n - 1) / n * ((again - again.mean()) ** 2).sum())
    return float(slope(laws)), float(error)


def compute_factor(laws, at):
    """How many times the compute the masked law needs for the autoregressive loss at budget `at`."""
    return float(laws["masked"].compute(laws["autoregressive"].loss(at)) / at)


def picture(rows, title):
    """Curves of every run, and both laws."""
    at = budgets(rows)
    laws, optima = fits(rows)
    curves = {}
    for kind in KINDS:
        law = laws[kind]
        curves[f"{kind}, slope {law.slope:.3f}"] = (at, [o.loss for o in optima[kind]])
    for kind in KINDS:
        for n, compute, nats in _curves(rows, kind):
            curves[f"{kind}, N = {n / 1e3:.0f}k"] = (compute, nats)
    return evaluation.line_plot(
        curves,
        x_label="training compute 6 N D",
        y_label="held-out nats a character",
        title=title,
        log_x=True,
        log_y=True,
        size=(7.0, 5.0),
    )
