"""Pictures completed from their upper half: does the digit come out that the half belongs to?"""

import importlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import evaluation, guidance, samplers
from diffusion_jax import run as runs
from experiments.reproduce import run_name, trained

NUM, STEPS = 150, 32
# (w, temperature); the cooler ones without guidance are what sharpening alone does
SETTINGS = ((0.0, 1.0), (0.4, 1.0), (0.8, 1.0), (1.6, 1.0), (0.0, 0.8), (0.0, 0.6))


def measure(options, module):
    """Rows of the held-out pictures and of completions: accuracy of a classifier, Frechet distance."""
    config = importlib.import_module(module).get_config()
    run = trained(config, options.workdir, run_name(module))
    train, test = run.source("train"), run.source("test")
    every = train.take(np.arange(len(train)))
    quality = evaluation.ImageQuality(
        runs.as_images(run.spec, every["tokens"]),
        every["label"],
        jax.random.key(0),
        cache=options.workdir / "classifier_digits_tokens.npz",
    )
    held = test.take(np.arange(min(NUM, len(test))))
    process, truth, label = run.method.process, held["tokens"], held["label"]
    lower = np.arange(truth.shape[1]) >= truth.shape[1] // 2
    prompt = jnp.asarray(np.where(lower, process.mask_id, truth))
    batch = {"index": jnp.arange(len(truth), dtype=jnp.int32)}
    plain = run.method.denoiser(run.params, batch)
    rows = [_row([quality.evaluate(runs.as_images(run.spec, truth), label)], None, None, 0)]
    for w, temperature in SETTINGS:
        sampler = samplers.masked_ancestral(
            process, STEPS, length=truth.shape[1], temperature=temperature
        )
        guided = guidance.guide_prompt(plain, prompt != process.mask_id, process.mask_id, w)
        figures = []
        for seed in range(options.seeds):
            key = jax.random.key(seed)
            drawn = np.asarray(samplers.sample(sampler, guided if w else plain, key, prompt))
            figures.append(quality.evaluate(runs.as_images(run.spec, drawn), label))
        rows.append(_row(figures, w, temperature, sampler.nfe * (guided.calls if w else 1)))
    return rows


def _row(figures, w, temperature, nfe):
    row = {"part": "digits", "w": w, "temperature": temperature, "nfe": nfe, "seeds": len(figures)}
    for name in ("accuracy", "frechet"):
        values = [f[name] for f in figures]
        row[name] = statistics.mean(values)
        row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return row
