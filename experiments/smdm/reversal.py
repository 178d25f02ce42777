"""Questions turned round: people told of in one direction, asked about in the other."""

import importlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import guidance, samplers
from diffusion_jax.data.descriptions import FORMS, people_of
from experiments.reproduce import run_name, trained

KINDS = ("masked", "autoregressive")
WEIGHTS = (0.0, 0.4, 0.8, 1.6)

# question -> (form of the sentence, what is asked)
QUESTIONS = {
    "forwards": ("name_first", "description"),
    "reversed": ("description_first", "name"),
    "reversed, in its place": ("name_first", "name"),
}


def answers(run, kind, prompt, weight, temperature, seed):
    """The sentences that a run makes of a prompt `[N, L]`, one token a call."""
    prompt = jnp.asarray(prompt)
    batch = {"index": jnp.arange(len(prompt), dtype=jnp.int32), "prompt": prompt}
    key = jax.random.key(seed)
    if kind == "autoregressive":
        sampler = run.method.build_sampler("left_to_right", temperature=temperature)
        return np.asarray(run.method.sample(run.params, key, batch, sampler))
    process = run.method.process
    sampler = samplers.llada(process, length=prompt.shape[1], temperature=temperature)
    plain = run.method.denoiser(run.params, {"index": batch["index"]})
    denoise = guidance.guide_prompt(plain, prompt != process.mask_id, process.mask_id, weight)
    return np.asarray(samplers.sample(sampler, denoise, key, prompt))


def score(run, kind, people, question, weight=0.0, temperature=0.0, seeds=(0,)):
    """Shares of answers and of tokens in them that are right, means over the seeds."""
    prompt, truth = people.queries(*QUESTIONS[question])
    asked = prompt == run.method.process.mask_id
    exact, tokens = [], []
    for seed in seeds:
        right = answers(run, kind, prompt, weight, temperature, seed) == truth
        exact.append(float(right.all(axis=1).mean()))
        tokens.append(float(right[asked].mean()))
    return {
        "exact": statistics.mean(exact),
        "exact_std": statistics.stdev(exact) if len(exact) > 1 else None,
        "tokens": statistics.mean(tokens),
    }


def runs_of(options, module):
    """The runs of both kinds."""
    found = {}
    for kind in KINDS:
        config = importlib.import_module(module).get_config(kind)
        found[kind] = trained(config, options.workdir, f"{run_name(module)}_{kind}")
    return found


def measure(options, module):
    """Rows of the most probable answers, and of drawn ones under guidance."""
    found = runs_of(options, module)
    data = found["masked"].config["data"]
    once, twice = people_of(data["people"], data["both"], data.get("seed", 0))
    assert data.get("form", FORMS[0]) == FORMS[0]
    groups = {"one way": once, "both ways": twice}
    rows = []

    def add(kind, told, question, **drawn):
        row = {"part": "reversal", "model": kind, "told": told, "question": question}
        row |= {"w": drawn.get("weight", 0.0), "temperature": drawn.get("temperature", 0.0)}
        rows.append(row | score(found[kind], kind, groups[told], question, **drawn))

    for kind in KINDS:
        for told in groups:
            for question in QUESTIONS:
                add(kind, told, question)
    for question in ("forwards", "reversed, in its place"):
        for weight in WEIGHTS[1:]:
            add("masked", "one way", question, weight=weight)
        for weight in WEIGHTS if question != "forwards" else ():
            drawn = {"weight": weight, "temperature": 1.0, "seeds": range(options.seeds)}
            add("masked", "one way", question, **drawn)
    return rows
