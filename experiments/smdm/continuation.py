"""Text written on from a prompt under guidance, judged by an autoregressive model that never sees w."""

import statistics

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import guidance, objectives, samplers

NUM, STEPS = 100, 32
WEIGHTS = (0.0, 0.4, 0.8, 1.6)
COOLER = (0.8, 0.6)  # temperatures without guidance: what sharpening alone would do


def _tasks(length):
    """What is hidden, bool `[L]`: the second half; the middle half."""
    place, quarter = np.arange(length), length // 4
    middle = (place >= quarter) & (place < length - quarter)
    return {"continuation": place >= length // 2, "infilling": middle}


def judged(judge, tokens, hidden):
    """Nats a hidden token under the judge: `(with the prompt, gain)`, means over sequences.

    What stands after a hole is counted too, since it has to follow from what was filled in. The gain is
    what the prompt saves: the nats of the hidden part alone, less those with the prompt; None for a hole.
    """
    batch = {"index": jnp.arange(len(tokens), dtype=jnp.int32)}
    network = judge.method.denoiser(judge.params, batch)
    first, last = np.flatnonzero(hidden)[[0, -1]]
    whole, alone = jnp.asarray(tokens), jnp.asarray(tokens[:, first : last + 1])
    after = jnp.broadcast_to(jnp.arange(len(hidden)) >= first, whole.shape)
    process = judge.method.process
    given, _ = objectives.next_token_cross_entropy(process, network, whole, where=after)
    told = float(given.mean()) / int(hidden.sum())
    if not hidden[-1]:
        return told, None
    free, _ = objectives.next_token_cross_entropy(process, network, alone)
    return told, float(free.mean()) / int(hidden.sum()) - told


def character_entropy(tokens):
    """Nats of the distribution of single tokens: falls where samples repeat themselves."""
    counts = np.unique(tokens, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log(share)).sum())


def measure(writer, judge, seeds):
    """Rows for both tasks: the true text, guidance at several w, cooler draws without guidance.

    Args:
      writer: run of a masked model.
      judge: run of an autoregressive model on the same data.
      seeds: sampling seeds.
    """
    process, test = writer.method.process, writer.source("test")
    truth = test.take(np.linspace(0, len(test) - 1, NUM).astype(np.int64))["tokens"]
    plain = writer.method.denoiser(writer.params, {"index": jnp.arange(2 * NUM)})
    single = writer.method.denoiser(writer.params, {"index": jnp.arange(NUM)})
    rows = []

    def add(task, hidden, label, drawn, **settings):
        found = [judged(judge, tokens, hidden) for tokens in drawn]
        told, gains = ([f[i] for f in found if f[i] is not None] for i in (0, 1))
        spread = lambda v: statistics.stdev(v) if len(v) > 1 else None
        rows.append(
            {"part": "guidance", "task": task, "text": label, **settings, "seeds": len(drawn)}
            | {"nats": statistics.mean(told), "nats_std": spread(told)}
            | {"gain": statistics.mean(gains) if gains else None, "gain_std": spread(gains)}
            | {"entropy": statistics.mean(character_entropy(t[:, hidden]) for t in drawn)}
        )

    for task, hidden in _tasks(truth.shape[1]).items():
        add(task, hidden, "held-out text", [truth], w=None, temperature=None, nfe=0)
        prompt = jnp.asarray(np.where(hidden, process.mask_id, truth))
        settings = [(w, 1.0) for w in WEIGHTS] + [(0.0, t) for t in COOLER]
        for w, temperature in settings:
            sampler = samplers.masked_ancestral(
                process, STEPS, length=truth.shape[1], temperature=temperature
            )
            guided = guidance.guide_prompt(plain, prompt != process.mask_id, process.mask_id, w)
            denoise = guided if w else single
            drawn = [
                np.asarray(samplers.sample(sampler, denoise, jax.random.key(seed), prompt))
                for seed in seeds
            ]
            calls = sampler.nfe * (guided.calls if w else 1)
            add(task, hidden, "sampled", drawn, w=w, temperature=temperature, nfe=calls)
    return rows
