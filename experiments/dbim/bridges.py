"""A trained bridge under several samplers: figures of what they restore, codes and back, pictures.

Frechet and texture distances are to the training images, in the features of a classifier trained on them
(`evaluation.quality`); PSNR is of single restorations to the truth and so rewards the mean of all answers.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from diffusion_jax import run as runs
from diffusion_jax.evaluation import ImageQuality, comparison_grid, image_grid, psnr, save_png
from diffusion_jax.samplers import (
    Pinned,
    build_sampler,
    dbim,
    dbim_encode,
    interpolate_latents,
    sample,
)


class Case(NamedTuple):
    """A sampler at a number of network calls; `options` are those of `build_sampler`."""

    label: str
    nfe: int
    options: Mapping[str, Any]


def _mean(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    out = {}
    for name in figures[0]:
        values = [f[name] for f in figures]
        out[name] = float(np.mean(values))
        out[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return out


def judge_of(run: runs.Run, classifier: pathlib.Path | None = None) -> ImageQuality:
    """The judge of a run's images: a classifier trained on its training images."""
    train = run.source("train")
    every = train.take(np.arange(len(train)))
    return ImageQuality(every["image"], every["label"], jax.random.key(0), cache=classifier)


def on_pairs(
    run: runs.Run,
    model: str,
    cases: Sequence[Case],
    quality: ImageQuality,
    *,
    seeds: Iterable[int],
    num: int,
    batch_size: int = 300,
) -> list[dict[str, Any]]:
    """Rows of the samplers on the first `num` held-out sources (over and over if there are fewer).

    Returns:
      `{"model", "sampler", "nfe", "frechet", "texture", "psnr"}` with standard deviations over the seeds,
      a row a sampler; and rows of the source and of held-out images, which make no calls.
    """
    batch = runs.conditions(run, num)
    truth = batch["image"]
    closeness = lambda x: float(psnr(np.clip(x, -1.0, 1.0), truth, data_range=2.0).mean())
    references = {"source": batch["source"], "held-out data": truth}
    rows = [
        {"model": model, "sampler": name, "nfe": 0, **quality.distances(images)}
        for name, images in references.items()
    ]
    rows[0]["psnr"] = closeness(batch["source"])
    for label, nfe, options in tqdm.tqdm(cases, desc=model, disable=None):
        sampler = build_sampler(run.method.process, nfe=nfe, **options)
        figures = []
        for seed in seeds:
            drawn = runs.draw(
                run, batch, jax.random.key(seed), sampler=sampler, batch_size=batch_size
            )
            figures.append(quality.distances(drawn) | {"psnr": closeness(drawn)})
        rows.append({"model": model, "sampler": label, "nfe": sampler.nfe, **_mean(figures)})
    return rows


def pinned(source, x) -> Pinned:
    """`Pinned` of two float32 arrays on the device."""
    return Pinned(jnp.asarray(source, jnp.float32), jnp.asarray(x, jnp.float32))


def reconstructions(
    run: runs.Run, model: str, cases: Iterable[tuple[str, int, Mapping[str, Any], int]], num: int
) -> list[dict[str, Any]]:
    """Held-out images encoded to their booting noise and decoded again.

    Args:
      cases: (label, calls of the decoder, options of `dbim_encode`, order of the decoder).
      num: images.
    Returns:
      `{"model", "sampler", "nfe", "encoder_nfe", "rms", "rms_worst", "noise_std"}`: root mean square
      difference per pixel over all images, and of the worst image; and the size of the codes (1 for what
      the decoder is used to).
    """
    batch = {k: jnp.asarray(v) for k, v in runs.conditions(run, num).items()}
    denoise, process, rows = run.method.denoiser(run.params, batch), run.method.process, []
    for label, nfe, options, order in cases:
        encoder = dbim_encode(process, nfe, **options)
        decoder = dbim(process, nfe, order=order, booting="given")
        z = sample(encoder, denoise, None, pinned(batch["source"], batch["image"]))
        again = sample(decoder, denoise, None, pinned(batch["source"], z))
        each = np.sqrt(np.mean((np.asarray(again) - batch["image"]) ** 2, axis=(1, 2, 3)))
        rows.append(
            {
                "model": model,
                "sampler": label,
                "nfe": nfe,
                "encoder_nfe": encoder.nfe,
                "rms": float(np.sqrt(np.mean(each**2))),
                "rms_worst": float(each.max()),
                "noise_std": float(np.std(z)),
            }
        )
    return rows


def draw_comparison(run, cases, path, *, title: str, num: int = 10, seed: int = 0):
    """Writes a picture: a row for the source, for each sampler, and for the truth."""
    batch = runs.conditions(run, num)
    sets = {"source": batch["source"]}
    for label, nfe, options in cases:
        sampler = build_sampler(run.method.process, nfe=nfe, **options)
        sets[f"{label}, {nfe} calls"] = runs.draw(run, batch, jax.random.key(seed), sampler=sampler)
    save_png(path, comparison_grid(sets | {"truth": batch["image"]}, title=title))


def draw_interpolation(
    run, path, encoder_options, *, nfe: int, title: str, num: int = 4, columns: int = 9
):
    """Writes a picture: from the truth, encoded and decoded, to another answer of the same source."""
    batch = {k: jnp.asarray(v) for k, v in runs.conditions(run, num).items()}
    denoise, process = run.method.denoiser(run.params, batch), run.method.process
    encoder = dbim_encode(process, nfe, **encoder_options)
    decoder = dbim(process, nfe, booting="given")
    code = sample(encoder, denoise, None, pinned(batch["source"], batch["image"]))
    other = jax.random.normal(jax.random.key(1), code.shape)
    weights = np.linspace(0.0, 1.0, columns)
    steps = [
        sample(decoder, denoise, None, pinned(batch["source"], z))
        for z in interpolate_latents(code, other, weights)
    ]
    cells = np.stack([batch["source"], batch["image"], *steps], axis=1)
    captions = ["source", "truth", *(f"{w:.2f}" for w in weights)]
    flat = cells.reshape(-1, *cells.shape[2:])
    save_png(path, image_grid(flat, len(captions), column_labels=captions, title=title))
