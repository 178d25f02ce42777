"""Seconds of decoding with a key-value cache and without, from left to right and block by block.

    python -m experiments.benchmarks.block_cache [--length 256]

A small transformer of random weights; the two sides run in turns and medians are compared. The samples
are the same ones.
"""

import argparse
import os
import statistics
import time

if __name__ == "__main__":  # before jax starts its threads
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    )

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import evaluation, methods, samplers
from diffusion_jax.data.text import text_spec
from diffusion_jax.networks import TokenTransformer
from diffusion_jax.processes import Absorbing

VOCAB = 64
KINDS = (
    ("autoregressive", "causal", None),
    ("block_diffusion", "block", 4),
    ("block_diffusion", "block", 16),
    ("block_diffusion", "block", 64),
    ("dida", "causal", 64),
)


def compare(name, attention, size, length, batch_size, repeats):
    """One row: median seconds of a batch both ways, and how many tokens differ."""
    network = TokenTransformer(
        vocab_size=VOCAB,
        width=128,
        depth=3,
        heads=4,
        max_length=length + 1,
        time_conditioned=False,
        attention=attention,
        block_size=size,
    )
    spec = text_spec(length, tuple(chr(48 + i) for i in range(VOCAB)))
    method = getattr(methods, name)(Absorbing(VOCAB), network, spec)
    batch = {
        "index": jnp.arange(batch_size),
        "tokens": jnp.zeros((batch_size, length), jnp.int32),
    }
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    params = jax.tree.map(
        lambda v: jnp.asarray(0.05 * rng.standard_normal(v.shape), v.dtype), shapes
    )
    cached = jax.jit(lambda key: method.sample(params, key, batch))
    denoise = method.denoiser(params, batch)
    plain = jax.jit(
        lambda key: samplers.sample(
            method.default_sampler,
            lambda x, t: denoise(x, t),
            jax.random.split(key)[1],
            batch_size,
        )
    )
    sides, seconds = {"cached": cached, "uncached": plain}, {"cached": [], "uncached": []}
    drawn = {}
    for repeat in range(repeats + 1):
        for side, run in sides.items():
            begin = time.perf_counter()
            drawn[side] = np.asarray(run(jax.random.key(repeat)))
            if repeat:  # the first one compiles
                seconds[side].append(time.perf_counter() - begin)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    return {
        "model": name,
        "block": size or 1,
        "calls": method.default_sampler.nfe,
        **medians,
        "times faster": medians["uncached"] / medians["cached"],
        "tokens that differ": int((drawn["cached"] != drawn["uncached"]).sum()),
    }


def main():
    parser = argparse.ArgumentParser("python -m experiments.benchmarks.block_cache")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for kind in KINDS:
        rows.append(compare(*kind, arguments.length, arguments.batch, arguments.repeats))
        print(rows[-1], flush=True)
    print(evaluation.markdown_table(rows, list(rows[0])))


if __name__ == "__main__":
    main()
