"""Judges a run: one row a sampler, between the rows of held-out data (floor) and noise (ceiling).

Images (and tokens that are pixels) are judged in the features of a classifier trained on the real
training images, or of a fixed bank of filters where these have no classes; bridges also by their distance to the truth, speech by that of its spectrograms to the
recordings; token models by their bound on held-out data beside histogram baselines, and other models
too where they have a likelihood bound. Times are of the second call, without compilation.
"""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion_jax import run as runs
from diffusion_jax.evaluation import speech
from diffusion_jax.evaluation.filter_bank import feature_count
from diffusion_jax.evaluation.image_metrics import restoration
from diffusion_jax.evaluation.perplexity import estimate_bound
from diffusion_jax.evaluation.quality import ImageQuality, noise_images
from diffusion_jax.evaluation.report import markdown_table
from diffusion_jax.evaluation.text_metrics import (
    histogram_baseline,
    ngram_divergence,
    position_baseline,
)
from diffusion_jax.registry import closest

MOST_TOKENS = 2**23

OPTIONS = {
    "num": None,
    "batch_size": 500,
    "samplers": (),
    "draws": 16,
    "seed": 0,
    "judge_seed": 0,
}


def evaluation_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section `evaluate` of a config, with defaults.

    num: samples for each sampler (default: as many as held-out examples); batch_size: at a time;
    samplers: list of {"name": ..., "nfe": ..., further options}; draws: times drawn for each held-out
    example in a likelihood bound; seed: of the samples; judge_seed: of the classifier.

    Raises:
      ValueError: an unknown field.
    """
    given = dict(config.get("evaluate", {}))
    for name in given:
        if name not in OPTIONS:
            raise ValueError(f"unknown evaluate field {name!r}{closest(name, OPTIONS)}")
    return {**OPTIONS, **given}


def build_samplers(run: runs.Run, samplers: Sequence[Mapping[str, Any]]) -> list:
    """The samplers asked for, or the method's own."""
    built = [
        runs.build_sampler(run, s["name"], **{k: v for k, v in s.items() if k != "name"})
        for s in samplers
    ]
    return built or [run.method.default_sampler]


def timed(run: runs.Run, batch, key, sampler, batch_size) -> tuple[np.ndarray, float]:
    """Samples, and seconds per 1,000 of them once the program is compiled.

    The first chunk (half of the samples at most) compiles; the others are timed.
    """
    count = len(batch["index"])
    size = min(batch_size, -(-count // 2))
    first = {k: v[:size] for k, v in batch.items()}
    rest = {k: v[size:] for k, v in batch.items()} if count > size else first
    head = runs.draw(run, first, key, sampler=sampler, batch_size=size)
    begin = time.perf_counter()
    tail = runs.draw(run, rest, key, sampler=sampler, batch_size=size, whole_chunks=True)
    seconds = time.perf_counter() - begin
    samples = np.concatenate([head, tail]) if count > size else head
    computed = -(-len(rest["index"]) // size) * size
    return samples, 1000.0 * seconds / computed


def bound(run: runs.Run, data: Mapping[str, np.ndarray], draws: int, seed: int, size: int = 250):
    """Upper bound on nats per dimension of held-out data by the method's own `bound`.

    Returns:
      Mean and standard error over `draws` repetitions.
    """
    nats = estimate_bound(
        run.method.bound, run.params, jax.random.key(seed), data, draws=draws, batch_size=size
    )
    means = nats.mean(axis=1) / math.prod(run.spec.shape)
    return float(means.mean()), float(means.std() / np.sqrt(max(draws - 1, 1)))


def _few(source) -> int:
    """How many examples of a set are looked at: all, but of a corpus no more than fit into memory."""
    if source.spec.kind != "tokens":
        return len(source)
    return min(len(source), max(1, MOST_TOKENS // math.prod(source.spec.shape)))


def judge(run: runs.Run, *, cache=None, **overrides: Any) -> dict[str, Any]:
    """Evaluates a run.

    Args:
      run: an open run.
      cache: .npz file that keeps the classifier, so that several runs are judged by one.
      overrides: fields of `evaluation_options`.
    Returns:
      {"rows": one dict a sampler and reference, "samples": name -> array, "batch": conditions,
      "likelihood": of models that bound it, or None}; rows are ready for JSON.
    Raises:
      ValueError: unknown options, samplers that do not fit, data that cannot be read.
    """
    options = evaluation_options({"evaluate": {**run.config.get("evaluate", {}), **overrides}})
    samplers = build_samplers(run, options["samplers"])
    train, test = run.source("train"), run.source("test")
    held_out = runs.first_conditions(test, _few(test))
    num = options["num"] or len(test)
    batch = runs.conditions(run, num)
    key = jax.random.key(options["seed"])
    rows, drawn = [], {}
    for i, sampler in enumerate(samplers):
        asked = options["samplers"][i] if options["samplers"] else {}
        name = " ".join(
            [sampler.name, *(f"{k}={v}" for k, v in asked.items() if k not in ("name", "nfe"))]
        )
        label = f"{name} {sampler.nfe}"
        if label in drawn:
            raise ValueError(f"sampler {label!r} is named twice")
        drawn[label], seconds = timed(run, batch, key, sampler, options["batch_size"])
        rows.append({"sampler": name, "nfe": sampler.nfe, "seconds_per_1000": seconds})
    if _has_features(run.spec, min(len(train), len(test), num)):
        rows += _judge_images(run, train, held_out, batch, drawn, rows, options, cache)
    elif run.spec.kind == "tokens":
        reference = held_out["tokens"]
        for row, samples in zip(rows, drawn.values()):
            row["bigram_divergence"] = ngram_divergence(samples, reference)
    if run.spec.show == "mel":
        rows += _judge_speech(run, train, held_out, batch, drawn, rows)
    if "source" in batch and run.spec.kind == "image":
        truth = batch[run.spec.kind]
        degraded = restoration(batch["source"], truth, data_range=2.0)
        for row, samples in zip(rows, drawn.values()):
            found = restoration(np.clip(samples, -1.0, 1.0), truth, data_range=2.0)
            row.update(psnr=found["psnr"], ssim=found["ssim"])
            row["psnr_gain"] = row["psnr"] - degraded["psnr"]
        for row in rows[len(drawn) :]:
            if row["sampler"] == "source":
                row.update(psnr=degraded["psnr"], ssim=degraded["ssim"])
    likelihood = None
    if run.spec.kind == "tokens" and run.method.bound is not None:
        nats, error = bound(run, held_out, options["draws"], options["seed"])
        some = np.linspace(0, len(train) - 1, _few(train)).astype(int)
        tokens = train.take(some)["tokens"], held_out["tokens"]
        vocabulary = run.spec.vocab_size
        likelihood = {
            "nats_per_token": nats,
            "standard_error": error,
            "histogram": histogram_baseline(*tokens, vocabulary)["nats_per_token"],
            "histogram_per_position": position_baseline(*tokens, vocabulary)["nats_per_token"],
        }
        for row in rows[: len(drawn)]:
            row["nats_per_token"] = nats
    elif run.method.bound is not None:
        nats, error = bound(run, held_out, options["draws"], options["seed"])
        bits = {"bits_per_dim": nats / np.log(2.0), "standard_error": error / np.log(2.0)}
        likelihood = {name: float(value) for name, value in bits.items()}
        for row in rows[: len(drawn)]:
            row["bits_per_dim"] = likelihood["bits_per_dim"]
    return {"rows": rows, "samples": drawn, "batch": batch, "likelihood": likelihood}


def _has_features(spec, count: int) -> bool:
    """Whether there is a feature space for the samples, and are enough of them for it."""
    if spec.show not in ("image", "pixels", "mel"):
        return False
    if spec.num_classes:
        return True
    return spec.show == "image" and min(spec.shape[:2]) >= 4 and count > feature_count(spec.shape)


def _judge_images(run, train, held_out, batch, drawn, rows, options, cache):
    """Fills the rows with image figures; returns the floor and ceiling rows."""
    every = train.take(np.arange(len(train)))
    classes = run.spec.num_classes
    quality = ImageQuality(
        runs.as_images(run.spec, every[run.spec.kind]),
        every["label"] if classes else None,
        jax.random.key(options["judge_seed"]),
        cache=cache,
    )
    real = runs.as_images(run.spec, held_out[run.spec.kind])
    noise = noise_images(jax.random.key(options["judge_seed"] + 1), len(real), real.shape[1:])
    asked, known = (part["label"] if classes else None for part in (batch, held_out))
    sets = {name: (runs.as_images(run.spec, samples), asked) for name, samples in drawn.items()}
    if "source" in batch:
        sets["source"] = (batch["source"], asked)
    sets["held-out data"] = (real, known)
    sets["noise"] = (noise, known)
    judged = {row.pop("name"): row for row in quality.compare(sets)}
    for row, name in zip(rows, drawn):
        row.update(judged[name])
    references = [name for name in judged if name not in drawn]
    return [{"sampler": name, "nfe": None, **judged[name]} for name in references]


def _judge_speech(run, train, held_out, batch, drawn, rows):
    """Fills the rows of samples, and the held-out data's, with distances of spectrograms."""
    audio, kind = run.spec.audio, run.spec.kind
    reference = train.take(np.arange(len(train)))
    reference = speech.utterance_features(reference[kind], audio, reference["frames"])
    for row, samples in zip(rows, drawn.values()):
        found = speech.mel_distances(
            samples, batch[kind], audio, truth_frames=np.asarray(batch["frames"])
        )
        row.update({name: float(values.mean()) for name, values in found.items()})
        features = speech.utterance_features(samples, audio)
        row["utterance_frechet"] = _utterance_frechet(features, reference)
    real = speech.utterance_features(held_out[kind], audio, held_out["frames"])
    distance = _utterance_frechet(real, reference)
    for row in rows[len(drawn) :]:
        if row["sampler"] == "held-out data":
            row["utterance_frechet"] = distance
            return []
    return [{"sampler": "held-out data", "nfe": None, "utterance_frechet": distance}]


def _utterance_frechet(features, reference):
    """None where utterances are too few for a covariance."""
    enough = min(len(features), len(reference)) > features.shape[1]
    return speech.utterance_frechet(features, reference) if enough else None


COLUMNS = {
    "family": "family",
    "sampler": "sampler",
    "nfe": "NFE",
    "frechet": "Frechet distance",
    "texture": "texture distance",
    "accuracy": "class accuracy",
    "psnr": "PSNR (dB)",
    "psnr_gain": "gain over source (dB)",
    "ssim": "SSIM",
    "mel_l1": "mel L1 (nats)",
    "mcd": "MCD (dB)",
    "frames_error": "duration error",
    "utterance_frechet": "utterance distance",
    "nats_per_token": "nats per token",
    "bits_per_dim": "bits per dimension",
    "bigram_divergence": "bigram divergence",
    "seconds_per_1000": "s per 1,000 samples",
}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table with the columns that occur."""
    used = {k: title for k, title in COLUMNS.items() if any(row.get(k) is not None for row in rows)}
    return markdown_table([{k: row.get(k) for k in used} for row in rows], used)
