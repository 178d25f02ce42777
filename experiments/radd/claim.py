"""RADD (arXiv 2406.03736): no network call where nothing changed, and four losses that are one.

The model is a small one of characters whose network never sees the time. Sequences of which only L tokens are
open (the others are a prompt of held-out text) show other lengths than its own. One sequence a run unless
a row says otherwise; a batch of B with one cache for all, as in the authors' code, would need the closed form of
B L tokens. Times are of compiled programs, the two samplers in turn in one process.

Found (1,500 steps of 16 windows, 2.6 nats a character): the gain in time is the gain in calls, 4.2 at 256 steps
and 14 at 1,024, and a batch of 8 sequences has it too (60 calls, where a cache shared by the batch would
make 222), since each walks its own list of steps. At 64 steps on 64 tokens, 41 calls expected, one
sequence gains little. The four losses have one mean and not one variance: any-order has the least.
"""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import evaluation, objectives, processes, samplers
from experiments.reproduce import run_name, trained

TITLE = "RADD's caching and losses (arXiv 2406.03736)"
CLAIM = (
    "the network calls of N steps on L tokens follow N (1 - (1 - 1/N)^L), the samples are those without a"
    " cache, and the four losses of one time-free network agree"
)
CONFIGS = {"cpu": "configs.text.radd", "full": "configs.radd.openwebtext"}

CASES = ((64, 64), (256, 64), (1024, 64), (256, 32), (256, 16))  # steps, open tokens
TIMED = ((1, 64), (1, 256), (1, 1024), (8, 256))  # sequences, steps
DRAWS, HELD_OUT = 12, 128
_TABLES = {
    "calls": ("steps", "tokens", "closed_form", "calls", "standard_error", "runs"),
    "time": ("sequences", "steps", "calls", "equal", "seconds_uncached", "seconds_cached", "gain"),
    "loss": ("loss", "nats_per_token", "standard_error"),
    "network": ("quantity", "value"),
}


def closed_form(steps: int, tokens: int) -> float:
    """Expected calls of a uniform grid: the number of steps in which some token is revealed."""
    return steps * (1.0 - (1.0 - 1.0 / steps) ** tokens)


def _start(held_out, tokens: int, mask_id: int):
    """Held-out rows whose last `tokens` are masked."""
    length = held_out.shape[1]
    return jnp.where(jnp.arange(length) < length - tokens, held_out, mask_id)


def count_calls(run, held_out, num: int, cases):
    """Calls really made, sequence by sequence."""
    process, length = run.method.process, held_out.shape[1]
    denoise = samplers.CountedCalls(run.method.denoiser(run.params, {}))
    rows = []
    for steps, tokens in cases:
        sampler = samplers.radd(process, steps, length=length)
        start, calls, before = _start(held_out, tokens, process.mask_id), [], denoise.calls
        for i in range(num):
            at = jnp.array([i], jnp.int32)
            row = start[i % len(start)][None]
            drawn = samplers.sample(sampler, denoise, jax.random.key(1), row, index=at)
            jax.block_until_ready(drawn)
            calls.append(denoise.calls - before)
            before += calls[-1]
        rows.append(
            {
                "table": "calls",
                "steps": steps,
                "tokens": tokens,
                "closed_form": closed_form(steps, tokens),
                "calls": float(np.mean(calls)),
                "standard_error": float(np.std(calls, ddof=1) / np.sqrt(num)),
                "runs": num,
            }
        )
    return rows


def _seconds(draw, repeats: int):
    """The samples, and the least seconds of some repeats of what is compiled already."""
    samples, least = np.asarray(draw()), np.inf
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(draw())
        least = min(least, time.perf_counter() - begin)
    return samples, least


def compare_times(run, length: int, cases):
    """Samples and seconds with and without the cache."""
    process, rows = run.method.process, []
    denoise = run.method.denoiser(run.params, {})
    for batch, steps in cases:
        found = {}
        for cached in (False, True):
            sampler = samplers.masked_ancestral(process, steps, length=length, cached=cached)
            draw = functools.partial(samplers.sample, sampler, denoise, jax.random.key(0), batch)
            found[cached] = _seconds(draw, 3 if batch * steps <= 256 else 1)
        counted = samplers.CountedCalls(denoise)
        sampler = samplers.masked_ancestral(process, steps, length=length, cached=True)
        jax.block_until_ready(samplers.sample(sampler, counted, jax.random.key(0), batch))
        rows.append(
            {
                "table": "time",
                "sequences": batch,
                "steps": steps,
                "calls": counted.calls,
                "equal": float((found[False][0] == found[True][0]).all(axis=1).mean()),
                "seconds_uncached": found[False][1],
                "seconds_cached": found[True][1],
                "gain": found[False][1] / found[True][1],
            }
        )
    return rows


def _losses(process, network):
    """name -> `(key, tokens) -> nats a sequence [B]`."""
    # scores need some noise left at t = 1; the network does not know the schedule
    finite = processes.Absorbing(
        process.vocab_size, schedule=processes.LinearSchedule(eps_end=1e-3)
    )

    def log_score(tokens, t):
        return finite.log_score(jax.nn.log_softmax(network(tokens, t)), tokens, t)

    def t_dce(key, tokens):
        losses, aux = objectives.masked_cross_entropy(process, network, key, tokens)
        count = jnp.round(aux["masked"] * tokens.shape[1])
        return losses + objectives.score_offset(process, aux["t"], count)

    cross = objectives.masked_cross_entropy
    return {
        "t-DSE": lambda k, x: objectives.denoising_score_entropy(finite, log_score, k, x)[0],
        "t-DCE": t_dce,
        "lambda-DCE": lambda k, x: cross(process, network, k, x, masking="lambda")[0],
        "any-order": lambda k, x: cross(process, network, k, x, masking="count")[0],
    }


def compare_losses(run, held_out):
    """Each loss of the model, mean and standard error over draws of times and masks."""
    network = run.method.denoiser(run.params, {})
    rows = []
    for number, (name, loss) in enumerate(_losses(run.method.process, network).items()):
        one = jax.jit(lambda key, x, loss=loss: loss(key, x).mean() / x.shape[1])
        keys = jax.random.split(jax.random.key(number), DRAWS)
        drawn = [float(one(key, held_out)) for key in keys]
        rows.append(
            {
                "table": "loss",
                "loss": name,
                "nats_per_token": float(np.mean(drawn)),
                "standard_error": float(np.std(drawn, ddof=1) / np.sqrt(DRAWS)),
            }
        )
    return rows


def _time_free(run, held_out):
    network = jax.jit(run.method.denoiser(run.params, {}))
    x = run.method.process.corrupt(
        jax.random.split(jax.random.key(2), len(held_out)), held_out, 0.5
    )
    apart = [network(x, jnp.full((len(x),), t)) for t in (0.05, 0.95)]
    value = float(jnp.abs(apart[0] - apart[1]).max())
    return {
        "table": "network",
        "quantity": "largest change of a logit from t = 0.05 to 0.95",
        "value": value,
    }


def measure(options):
    """Rows of calls, times, losses and the network; draws the calls beside the closed form."""
    run = trained(options.config, options.workdir, run_name(CONFIGS[options.scale]))
    test = run.source("test")
    wanted = np.linspace(0, len(test) - 1, HELD_OUT).astype(int)
    held_out = jnp.asarray(test.take(wanted)["tokens"])
    length = held_out.shape[1]
    rows = count_calls(run, held_out, options.num or 48, CASES)
    print("calls are counted", flush=True)
    rows += compare_times(run, length, TIMED)
    print("times are taken", flush=True)
    rows += compare_losses(run, held_out)
    rows.append(_time_free(run, held_out[:4]))
    _draw(rows, options.home / "calls.png")
    return rows


def _draw(rows, path):
    calls = [row for row in rows if row["table"] == "calls" and row["tokens"] == 64]
    grid = np.geomspace(16, 2048, 60)
    curves = {
        "closed form, L = 64": (grid, [closed_form(n, 64) for n in grid]),
        "measured": ([r["steps"] for r in calls], [r["calls"] for r in calls]),
        "without a cache": (grid, grid),
    }
    labels = {"x_label": "steps", "y_label": "network calls a sequence", "title": TITLE}
    evaluation.save_png(path, evaluation.line_plot(curves, log_x=True, log_y=True, **labels))


def _of(rows, table):
    return [row for row in rows if row["table"] == table]


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    off = max(
        abs(row["calls"] - closed_form(row["steps"], row["tokens"])) / row["standard_error"]
        for row in _of(rows, "calls")
    )
    times = _of(rows, "time")
    same = min(row["equal"] for row in times)
    long = next(row for row in times if (row["sequences"], row["steps"]) == (1, 256))
    batch = next(row for row in times if row["sequences"] > 1)
    losses = _of(rows, "loss")
    apart = max(
        abs(a["nats_per_token"] - b["nats_per_token"])
        / np.hypot(a["standard_error"], b["standard_error"])
        for a in losses
        for b in losses
        if a is not b
    )
    change = _of(rows, "network")[0]["value"]
    return (
        ("mean calls from the closed form, in standard errors, at most 4", off, off <= 4.0),
        ("share of sequences equal with and without the cache, 1", same, same == 1.0),
        (
            "seconds without the cache over with it, 256 steps on 64 tokens, one sequence, at least 3",
            long["gain"],
            long["gain"] >= 3.0,
        ),
        (
            f"the same for a batch of {batch['sequences']}, at least 2",
            batch["gain"],
            batch["gain"] >= 2.0,
        ),
        ("any two of the four losses apart, in standard errors, at most 4", apart, apart <= 4.0),
        ("change of the network's output with t, 0", change, change == 0.0),
    )


def report(rows):
    """One table each of calls, times, losses and the network."""
    return "\n".join(
        evaluation.markdown_table(
            [{k: row[k] for k in columns} for row in _of(rows, name)], list(columns)
        )
        for name, columns in _TABLES.items()
    )
