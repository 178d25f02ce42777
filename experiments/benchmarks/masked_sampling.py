"""Tokens a second of masked sampling against the authors' PyTorch way, and the sampler's own cost.

    python -m experiments.benchmarks.masked_sampling [--quick] [--torch /path/to/python]

A transformer of one size in both frameworks, random weights, on one core with one thread; the sides of a
ratio run in turns and the medians of their CPU seconds are compared. `--torch` names a Python that has
PyTorch, default this one; without any the authors' way is run in JAX (`categorical="gumbel"`) alone.

  tokens    tokens a second, ours over the authors' way, the same number of steps
            (one categorical over V + 1 classes at every position)               goal 1.4 and 6
  overhead  a sampler over the bare network chained as often in a scan; below 1
            where only the logits are made that are read (`LogitRows`)            goal 1.05
  hitting   1,000 steps with a call each over first-hitting with L calls, L = 40,
            whose law is the limit of many steps; it can be 1,000 / L at most     goal 20
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

if __name__ == "__main__":  # before jax starts its threads
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import jax.numpy as jnp

import diffusion_jax as dj
from diffusion_jax.evaluation import markdown_table
from diffusion_jax.methods.base import Network

SMALL = {"vocab": 256, "length": 256, "batch": 4, "steps": 32, "width": 128, "depth": 3, "heads": 4}
LARGE = {
    "vocab": 50257,
    "length": 256,
    "batch": 1,
    "steps": 16,
    "width": 128,
    "depth": 3,
    "heads": 4,
}
SHORT = {"vocab": 256, "length": 40, "batch": 4, "steps": 40, "width": 64, "depth": 2, "heads": 2}


def cpu_seconds(function):
    """CPU seconds until the result of `function()` is there."""
    begin = time.process_time()
    jax.block_until_ready(function())
    return time.process_time() - begin


class Torch:
    """The worker process: `run(dtype)` gives the CPU seconds of one sampling run."""

    def __init__(self, python, sizes):
        worker = pathlib.Path(__file__).with_name("torch_worker.py")
        self.process = subprocess.Popen(
            [python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.version = self.ask(json.dumps(sizes))

    def ask(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def run(self, dtype):
        return float(self.ask(dtype))

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def model(sizes):
    """`(process, denoise, parameters)` of a transformer that is not uniform."""
    module = dj.networks.TokenTransformer(
        vocab_size=sizes["vocab"],
        width=sizes["width"],
        depth=sizes["depth"],
        heads=sizes["heads"],
        max_length=sizes["length"],
        time_conditioned=False,
    )
    tokens = jnp.zeros((1, sizes["length"]), jnp.int32)
    params = jax.jit(module.init)(jax.random.key(0), tokens, None)["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [v + 0.05 * jax.random.normal(k, v.shape) for k, v in zip(keys, leaves)]
    params = tree.unflatten(moved)

    count = sum(v.size for v in leaves)
    return dj.processes.Absorbing(sizes["vocab"]), Network(module).bind(params, {}), count


def chained(denoise, tokens, calls):
    """The bare network, `calls` times: its logits `[B, L, V]` are written out, and one column is read."""

    @jax.jit
    def run(denoise, tokens):
        def body(x, _):
            # an operand of `cond` has to be there: without it XLA leaves out the bias of what is not read
            read = lambda logits: jnp.where(logits[..., 0] > 1e6, 0, x)
            return jax.lax.cond(x[0, 0] >= 0, read, lambda _: x, denoise(x, None)), None

        return jax.lax.scan(body, tokens, length=calls)[0]

    return lambda: run(denoise, tokens)


def in_turns(sides, repeats):
    """Median CPU seconds of each side, and each side's median ratio to the first: dictionaries."""
    spent = {name: [] for name in sides}
    for run in sides.values():
        run()  # compiles
    for _ in range(repeats):
        for name, run in sides.items():
            spent[name].append(run())
    first = next(iter(spent.values()))
    seconds = {name: statistics.median(v) for name, v in spent.items()}
    ratios = {n: statistics.median(a / b for a, b in zip(v, first)) for n, v in spent.items()}
    return seconds, ratios


def throughput(sizes, goal, python, repeats):
    """Rows "tokens" and "overhead" of one size."""
    process, denoise, count = model(sizes)
    key, batch, steps = jax.random.key(2), sizes["batch"], sizes["steps"]
    shape = (batch, sizes["length"])
    build = dj.samplers.masked_ancestral
    plain = build(process, steps, length=sizes["length"])
    hitting = dj.samplers.first_hitting(process, sizes["length"], steps)
    # in each step some positions hold tokens: those of a run
    tokens = dj.sample(plain, denoise, key, batch)
    tokens = jnp.where(jnp.arange(shape[1])[None] % 2 == 0, tokens, process.mask_id)
    bare = chained(denoise, tokens, steps)
    run = lambda sampler, denoise=denoise: cpu_seconds(
        lambda: dj.sample(sampler, denoise, key, batch)
    )
    sides = {
        "masked_ancestral": lambda: run(plain),
        "first_hitting": lambda: run(hitting),
        "masked_ancestral, all logits": lambda: run(plain, denoise.plain),
        "bare network": lambda: cpu_seconds(bare),
    }
    worker = Torch(python, sizes)
    if worker.version.startswith("error"):
        print(f"no PyTorch in {python}: {worker.version}; --torch names a Python that has it")
        gumbel = build(process, steps, length=sizes["length"], categorical="gumbel")
        sides["gumbel, JAX float32"] = lambda: run(gumbel)
    else:
        print(f"{worker.version} parameters; ours {count}")
        for dtype in ("float32", "float64"):
            sides[f"gumbel, torch {dtype}"] = lambda dtype=dtype: worker.run(dtype)
    seconds, ratios = in_turns(sides, repeats)
    worker.close()
    case = (
        f"V = {sizes['vocab']}, L = {sizes['length']}, {steps} steps, {count / 1e6:.1f}M parameters"
    )
    size = shape[0] * shape[1]
    rows = []
    for name in sides:
        rows.append(
            {
                "what": "tokens" if name.startswith("gumbel") else "seconds",
                "case": case,
                "side": name,
                "seconds": seconds[name],
                "tokens/s": size / seconds[name],
                "measured": ratios[name],
                "goal": goal if name.startswith("gumbel") else None,
            }
        )
    for name in list(sides)[:3]:
        own = ratios[name] / ratios["bare network"]
        rows.append({"what": "overhead", "case": case, "side": name, "measured": own, "goal": 1.05})
    return rows


def hitting(sizes, repeats, steps=1000):
    """First-hitting with one call a token against many ancestral steps with a call each."""
    process, denoise, _ = model(sizes)
    key, batch, length = jax.random.key(3), sizes["batch"], sizes["length"]
    build = dj.samplers.masked_ancestral
    every = build(process, steps, length=length)
    some = build(process, steps, length=length, cached=True)
    exact = dj.samplers.first_hitting(process, length)
    run = lambda sampler: cpu_seconds(lambda: dj.sample(sampler, denoise, key, batch))
    sides = {
        f"first_hitting, {length} calls": lambda: run(exact),
        f"masked_ancestral, {steps} calls": lambda: run(every),
        f"the same, cached (at most {length} calls)": lambda: run(some),
    }
    seconds, ratios = in_turns(sides, repeats)
    case = f"V = {sizes['vocab']}, L = {length}"
    return [
        {
            "what": "hitting",
            "case": case,
            "side": name,
            "seconds": seconds[name],
            "tokens/s": batch * length / seconds[name],
            "measured": ratios[name],
            "goal": 20.0 if name.startswith("masked") else None,
        }
        for name in sides
    ]


def verdict(row):
    """ "reached" or "missed" where there is a goal."""
    if row.get("goal") is None:
        return ""
    met = (
        row["measured"] <= row["goal"]
        if row["what"] == "overhead"
        else row["measured"] >= row["goal"]
    )
    return "reached" if met else "missed"


def measure(python, quick=False):
    """All rows, dictionaries."""
    repeats = 3 if quick else 5
    rows = throughput(SMALL, 1.4, python, repeats) + throughput(LARGE, 6.0, python, repeats)
    rows += hitting(SHORT, 1 if quick else 3)
    return [{**row, "verdict": verdict(row)} for row in rows]


def main(argv=None) -> int:
    """Prints the table; writes it as JSON with `--out`."""
    parser = argparse.ArgumentParser(
        "python -m experiments.benchmarks.masked_sampling", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few repeats: does it run at all?")
    parser.add_argument("--torch", default=sys.executable, help="a Python that has PyTorch")
    parser.add_argument("--out", help="JSON file for the rows")
    arguments = parser.parse_args(argv)
    rows = measure(arguments.torch, arguments.quick)
    columns = ("what", "case", "side", "seconds", "tokens/s", "measured", "goal", "verdict")
    print(markdown_table([{c: row.get(c, "") for c in columns} for row in rows], columns))
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, CPU seconds")
    if arguments.out:
        with open(arguments.out, "w") as file:
            json.dump(rows, file, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
