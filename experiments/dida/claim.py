"""DiDA (arXiv 2510.26583): an autoregressive model adapted to fill in whole segments at once.

The digits' 64 pixels token by token, and after adaptation in segments of 16 with 1, 4 or 16 calls each.
Samples are judged by the autoregressive model that the adaptation began with: `ar_nats` are its nats a
token for them. Few calls make low nats easy to reach by saying always the same, so the entropy of a pixel
over samples (mean over pixels) stands beside them. `milliseconds` are those of one sequence by itself,
where calls are what costs. `likelihood` is each model's own of held-out digits, read causally.

Found on the digits (1,437 to learn from, a minute or two of training): a tenth of a nat, "nearly the
same", is missed at n/16 calls (0.33 more) and at n/4 (0.23). At one call a token it is 0.20 to 0.25: the gap
is the adapted model's own, hardly that of drawing in parallel. One sequence takes less time; in batches
of 128 a CPU core, which computes as long for 16 tokens at once as one after the other, gained nothing.
The causal likelihood is kept.
"""

import importlib
import statistics
import time

import jax
import numpy as np

from diffusion_jax import builder, methods
from diffusion_jax import run as runs
from experiments.reproduce import run_name, trained

TITLE = "DiDA (arXiv 2510.26583)"
CLAIM = (
    "adapted to fill in segments, an autoregressive model samples several times faster at nearly the same "
    "likelihood under itself"
)
CONFIGS = {"cpu": "configs.dida.digits", "full": "configs.dida.image_tokens"}
BASES = {
    "cpu": ("configs.dida.autoregressive", ()),
    "full": ("configs.dida.image_tokens", ("autoregressive",)),
}
PARTS = (16, 4, 1)  # calls: one for so many tokens
ORDERS = ("random", "confidence")


def measure(options):
    """One row a sampler: means over sampling seeds."""
    module, stage = BASES[options.scale]
    base_config = importlib.import_module(module).get_config(*stage)
    base = trained(base_config, options.workdir, "_".join((run_name(module), *stage)))
    config = options.config.copy_and_resolve_references()
    config.train.init_from = str(base.workdir)
    adapted = trained(config, options.workdir, run_name(CONFIGS[options.scale]))
    process = base.method.process
    network = builder.build_network(config, adapted.spec)
    causal = methods.autoregressive(process, network, adapted.spec)
    test = base.source("test")
    num = min(options.num or len(test), len(test))
    held = {**runs.first_conditions(test, num)}
    length = base.spec.shape[0]
    likelihood = jax.jit(lambda params, batch: causal.bound(params, None, batch) / length)

    def nats(run, tokens, batch):
        index = np.arange(num, dtype=np.int32)
        return float(likelihood(run.params, {**batch, "tokens": tokens, "index": index}).mean())

    batch = runs.conditions(base, num)
    rows = []

    def add(model, run, sampler, **about):
        found = []
        for seed in range(options.seeds):
            drawn = runs.draw(run, batch, jax.random.key(seed), sampler=sampler)
            found.append((nats(base, drawn, batch), _entropy(drawn, base.spec.vocab_size)))
        means = [statistics.mean(values) for values in zip(*found)]
        row = {"model": model, **about, "nfe": sampler.nfe}
        row |= dict(zip(("ar_nats", "pixel_entropy"), means))
        row["milliseconds"] = _milliseconds(run, sampler, batch)
        row["ar_nats_std"] = statistics.stdev([v[0] for v in found]) if len(found) > 1 else None
        rows.append(row)
        print(row, flush=True)

    add("autoregressive", base, base.method.default_sampler)
    for part in PARTS:
        for order in ORDERS:
            nfe = max(length // part, -(-length // config.network.block_size))
            sampler = adapted.method.build_sampler("block_decoding", nfe, order=order)
            add("adapted", adapted, sampler, order=order)
    for model, run in (("autoregressive", base), ("adapted", adapted)):
        rows.append(
            {"model": f"held-out data, {model}", "likelihood": nats(run, held["tokens"], held)}
        )
    rows[-1]["pixel_entropy"] = _entropy(held["tokens"], base.spec.vocab_size)
    return rows


def _milliseconds(run, sampler, batch, repeats=7):
    """Median time of one sequence by itself, compiled."""
    one = {name: value[:1] for name, value in batch.items()}
    draw = jax.jit(lambda params, key: run.method.sample(params, key, one, sampler))
    spent = []
    for seed in range(repeats + 1):
        begin = time.perf_counter()
        jax.block_until_ready(draw(run.params, jax.random.key(seed)))
        spent.append(1000.0 * (time.perf_counter() - begin))
    return statistics.median(spent[1:])


def _entropy(tokens, vocab_size):
    """Entropy of a position over the samples, nats, mean over positions."""
    share = np.stack([np.bincount(column, minlength=vocab_size) for column in np.asarray(tokens).T])
    share = share / share.sum(axis=1, keepdims=True)
    return float(-(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1).mean())


def verdicts(rows):
    """`(statement, measured, holds)`."""
    plain = next(row for row in rows if row["model"] == "autoregressive")
    length = plain["nfe"]
    at = {(row["nfe"], row["order"]): row for row in rows if row["model"] == "adapted"}
    own = {row["model"]: row["likelihood"] for row in rows if "likelihood" in row}
    found = []
    for part in (16, 4):
        row = min((at[length // part, order] for order in ORDERS), key=lambda r: r["ar_nats"])
        gap = row["ar_nats"] - plain["ar_nats"]
        found.append(
            (
                f"n/{part} calls, order {row['order']!r}: nats under the autoregressive model more than "
                "its own samples', below 0.1",
                gap,
                gap < 0.1,
            )
        )
        speed = plain["milliseconds"] / row["milliseconds"]
        found.append(
            (f"n/{part} calls: times faster than token by token, above 1", speed, speed > 1)
        )
    kept = own["held-out data, adapted"] - own["held-out data, autoregressive"]
    found.append(
        ("nats of held-out data, read causally, after less before, below 0.05", kept, kept < 0.05)
    )
    return tuple(found)
