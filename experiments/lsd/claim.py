"""LSD and LSD+ (arXiv 2509.19962): steps learned from a teacher of 256, on both graphs.

Data are countdown sequences (`countdown`), on which wrong neighbours can be counted. For every number of calls
  Tweedie, Euler    the plain samplers at uniform times
  LSD               Euler with learned coefficients of the rate, uniform times
  LSD+              learned times and coefficients of the rate, prediction held
  LSD log-score     the coefficient of the released code, a temperature for every step, uniform times
Entropy is that of the tokens of one sequence. Errors can be bought with it: a temperature below 1 repeats itself.

What does not hold, and why:
- coefficients on the absorbing graph. A masked position is revealed at a rate that the schedule alone decides:
  Euler's step is exact there, and no factor on it gains anything. The temperatures that match the teacher's
  predictions lie around or above 1 (coefficients .8 to 1.1) and lower no errors: a low generative perplexity
  asks for temperatures below 1, a match with the teacher does not;
- new times on the uniform graph with 8 calls: what they save on paths that they were not chosen by is less
  than a tenth of the distance, so that uniform ones are kept.
New times help most on the absorbing graph, where the exact table of the tests had nothing to gain: at first
hardly anything is known of a countdown, and the fitted grids take their time there.
"""

import jax
import numpy as np

from diffusion_jax import run as runs
from diffusion_jax.samplers import build_sampler, fit_lsd, save_lsd, sequence_entropy
from experiments.lsd import countdown
from experiments.reproduce import run_name, trained

TITLE = "LSD and LSD+ (arXiv 2509.19962)"
CLAIM = (
    "8 to 16 learned steps come closer to a teacher of 256 steps than Euler's or Tweedie's at equal "
    "steps, without a loss of entropy"
)
CONFIGS = {"cpu": "configs.text.countdown_uniform", "full": "configs.radd.openwebtext"}
_GRAPHS = {
    "uniform": "configs.text.countdown_uniform",
    "absorbing": "configs.text.countdown_masked",
}
_CALLS, _TEACHER, _STARTS = (8, 16), 256, 32
_PLAIN = {
    "uniform": {"Tweedie": ("discrete_ancestral", {}), "Euler": ("discrete_euler", {})},
    "absorbing": {
        "Tweedie": ("masked_ancestral", {}),
        "Euler": ("masked_ancestral", {"rate": "euler"}),
    },
}
_LEARNED = {
    "LSD": {"rule": "euler", "fit_times": False},
    "LSD+": {},
    "LSD log-score": {"coefficient": "log_score", "fit_times": False},
}


def _plain(run, graph, name, nfe):
    sampler, more = _PLAIN[graph][name]
    return build_sampler(run.method.process, sampler, nfe, length=run.spec.shape[0], **more)


def _fitted(run, kind, nfe, seed):
    batch = runs.conditions(run, _STARTS)
    return fit_lsd(
        run.method.process,
        run.method.denoiser(run.params, batch),
        jax.random.key(10_000 + seed),
        _STARTS,
        nfe=nfe,
        length=run.spec.shape[0],
        teacher_steps=_TEACHER,
        candidates=48,
        iterations=60,
        **_LEARNED[kind],
    )


def _row(run, graph, name, sampler, options, report=None):
    batch, found = runs.conditions(run, options.num or 128), []
    for seed in range(options.seeds):
        tokens = runs.draw(run, batch, jax.random.key(seed), sampler=sampler)
        figures = {"entropy": sequence_entropy(tokens, run.spec.vocab_size)}
        if options.scale == "cpu":
            figures["error"] = countdown.error_rate(tokens)
        found.append(figures)
    row = {"graph": graph, "sampler": name, "nfe": sampler.nfe}
    for figure in found[0]:
        values = [f[figure] for f in found]
        row[figure] = float(np.mean(values))
        row[f"{figure}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    if report is not None:
        row["distance"] = report.fitted / report.start
        row["times"] = " ".join(f"{t:.3g}" for t in report.steps.times)
        row["coefficients"] = " ".join(f"{c:.3g}" for c in report.steps.coefficients)
        row["seconds"] = report.seconds
    print(row, flush=True)
    return row


def measure(options):
    """Rows of the plain and of the learned samplers, and of the teacher; writes the learned steps."""
    rows = []
    if options.scale == "cpu":
        file = options.workdir / "countdown.npz"
        file.parent.mkdir(parents=True, exist_ok=True)
        countdown.write(file)
        graphs = _GRAPHS
    else:
        graphs = {"absorbing": CONFIGS["full"]}
    for graph, module in graphs.items():
        config = options.load(module)
        if options.scale == "cpu":
            config.data.path = str(file)
        run = trained(config, options.workdir, run_name(module))
        rows.append(_row(run, graph, "teacher", _plain(run, graph, "Tweedie", _TEACHER), options))
        for nfe in _CALLS:
            for name in _PLAIN[graph]:
                rows.append(_row(run, graph, name, _plain(run, graph, name, nfe), options))
            for kind in _LEARNED:
                sampler, report = _fitted(run, kind, nfe, 0)
                name = f"lsd_{graph}_{kind}_{nfe}.npz".replace(" ", "_")
                save_lsd(options.workdir / name, run.method.process, report.steps)
                rows.append(_row(run, graph, kind, sampler, options, report))
    if options.scale == "cpu":
        data = countdown.sequences(1000, 1)
        entropy = sequence_entropy(data, countdown.VOCAB)
        rows.append({"graph": "data", "sampler": "", "nfe": 0, "entropy": entropy, "error": 0.0})
    return rows


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    figure = "error" if any("error" in row for row in rows) else "entropy"
    at = {(r["graph"], r["sampler"], r["nfe"]): r for r in rows}
    graphs = [g for g in dict.fromkeys(r["graph"] for r in rows) if g != "data"]
    out = []
    for graph in graphs:
        teacher = at[graph, "teacher", _TEACHER]
        for nfe in _CALLS:
            learned, tweedie = at[graph, "LSD+", nfe], at[graph, "Tweedie", nfe]
            pairs = (
                ("LSD+ over Tweedie", learned, tweedie),
                ("LSD+ over Euler", learned, at[graph, "Euler", nfe]),
                ("LSD over Euler", at[graph, "LSD", nfe], at[graph, "Euler", nfe]),
                ("LSD log-score over Tweedie", at[graph, "LSD log-score", nfe], tweedie),
            )
            for what, ours, other in pairs:
                ratio = ours[figure] / other[figure]
                out.append(
                    (f"{graph}, {nfe} calls, {figure} rate, {what}, below 1", ratio, ratio < 1)
                )
            lost = teacher["entropy"] - learned["entropy"]
            what = f"{graph}, {nfe} calls, entropy that LSD+ lacks of the teacher's, at most 0.05"
            out.append((what, lost, lost <= 0.05))
            # how much of the way from Tweedie's error to the teacher's
            gap = tweedie[figure] - teacher[figure]
            share = (tweedie[figure] - learned[figure]) / gap if gap else 0.0
            what = f"{graph}, {nfe} calls, share of the gap to the teacher that LSD+ closes, at least 0.2"
            out.append((what, share, share >= 0.2))
    return tuple(out)
