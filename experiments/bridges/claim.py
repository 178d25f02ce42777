"""Six applications of bridges on photographs: each between its source and its truth.

Every model is trained on 32x32 patches of two photographs and judged on patches of other parts of these.
PSNR and SSIM are of single outputs to their truths. They reward the mean of all answers: the network's one
call at the source ("regression"), which is blurred where the source leaves a choice. The Frechet distance
is between the outputs and the truths of the same sources, in the features of `evaluation.FilterBank`
(colours, contrast, energy by scale and direction): it sees the blur, and holds what the bridge is for.

The regression is asked for a gain in PSNR over the source, the bridge for one in the Frechet distance over
both. A sample of the true posterior has twice the squared error of its mean, 3 dB less PSNR: where the
source is close to the truth already (blur, low resolution, luma) samples may fall below it in PSNR, and do.
Inpainting, whose source holds noise in the hole, is asked for a gain in PSNR at 20 calls too.
"""

import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import run as runs
from diffusion_jax.evaluation import (
    FilterBank,
    comparison_grid,
    frechet_distance,
    moments,
    restoration,
    save_png,
)
from diffusion_jax.samplers import build_sampler
from experiments.reproduce import run_name, trained

TITLE = "Bridges on photographs: six applications"
CLAIM = "in 20 calls or fewer each bridge looks more like the truth than its source and than one-call regression"
CONFIGS = {"cpu": "configs.bridges.super_resolution", "full": "configs.i2sb.super_resolution"}
INPAINTING = ("inpaint_center", "inpaint_freeform")
RESTORATIONS = ("super_resolution", "deblur", *INPAINTING)
APPLICATIONS = {
    "cpu": {name: f"configs.bridges.{name}" for name in (*RESTORATIONS, "edges", "colorize")},
    "full": {
        **{name: f"configs.i2sb.{name}" for name in (*RESTORATIONS, "jpeg")},
        "edges": "configs.ddbm.edges2handbags",
    },
}
_CALLS = (2, 5, 10, 20)
_DBIM = tuple(("DBIM", n, {"name": "dbim"}) for n in _CALLS)
_OTHERS = (
    ("DBIM order 2", 5, {"name": "dbim", "order": 2}),
    ("I2SB ancestral", 5, {"name": "i2sb"}),
    ("I2SB ancestral", 20, {"name": "i2sb"}),
    ("DDBM Heun", 20, {"name": "ddbm_heun"}),
)
# A bridge without noise has no booting noise either.
_WITHOUT_NOISE = tuple(("I2SB ancestral", n, {"name": "i2sb"}) for n in _CALLS)


def _cases(run):
    return _WITHOUT_NOISE if getattr(run.method.process, "ot_ode", False) else _DBIM + _OTHERS


def _regression(run, batch, size=256):
    """The network's answer at the source, in one call."""
    t = jnp.float32(run.method.process.t_max)
    one = jax.jit(lambda params, b: run.method.denoiser(params, b)(b["source"], t))
    parts = [
        {k: jnp.asarray(v[at : at + size]) for k, v in batch.items()}
        for at in range(0, len(batch["index"]), size)
    ]
    return np.concatenate([np.asarray(one(run.params, part)) for part in parts])


def _on(run, application, num, seeds, picture):
    """Rows of one application; writes its picture."""
    train = run.source("train")
    some = np.linspace(0, len(train) - 1, min(len(train), 4000)).astype(np.int64)
    bank = FilterBank(train.take(some)["image"])
    batch = runs.conditions(run, num)
    truth = batch["image"]
    real = moments(bank.features(truth))

    def figures(images):
        images = np.clip(images, -1.0, 1.0)
        near = restoration(images, truth, data_range=2.0)
        distance = frechet_distance(real, moments(bank.features(images)))
        return {"psnr": near["psnr"], "ssim": near["ssim"], "frechet": distance}

    sets = {"source": batch["source"], "regression": _regression(run, batch)}
    rows = [
        {"application": application, "output": name, "nfe": calls, **figures(images)}
        for calls, (name, images) in enumerate(sets.items())
    ]
    for label, nfe, options in _cases(run):
        sampler = build_sampler(run.method.process, nfe=nfe, **options)
        found = []
        for seed in seeds:
            drawn = runs.draw(run, batch, jax.random.key(seed), sampler=sampler)
            found.append(figures(drawn))
            sets.setdefault(f"{label} {nfe}", drawn)
        row = {"application": application, "output": label, "nfe": sampler.nfe}
        for name in found[0]:
            values = [f[name] for f in found]
            row[name] = float(np.mean(values))
            row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    shown = [
        "source",
        "regression",
        *(f"{label} {n}" for label, n, _ in _cases(run) if n in _CALLS),
    ]
    shown = {name: np.asarray(sets[name][:10]) for name in dict.fromkeys(shown)}
    save_png(picture, comparison_grid({**shown, "truth": truth[:10]}, title=application, scale=2))
    return rows


def measure(options):
    """Rows of every application; trains those that are not."""
    rows = []
    for application, module in APPLICATIONS[options.scale].items():
        config = importlib.import_module(module).get_config()
        own = dataclasses.replace(options, config=config)
        run = trained(own.config, own.workdir, run_name(module))
        picture = options.home / f"{application}.png"
        rows += _on(run, application, options.num or 256, range(options.seeds), picture)
    return rows


def verdicts(rows):
    """`(statement, measured, holds)` for each part of the claim."""
    out = []
    for application in dict.fromkeys(row["application"] for row in rows):
        own = [row for row in rows if row["application"] == application]
        source, regression = own[:2]
        # the first of its kind: DBIM, or what a bridge without noise is sampled by
        sampled = next(row for row in own[2:] if row["nfe"] == 20)
        gain = regression["psnr"] - source["psnr"]
        out.append((f"{application}: gain of the regression in PSNR, dB, above 0", gain, gain > 0))
        if application in INPAINTING:
            gain = sampled["psnr"] - source["psnr"]
            out.append((f"{application}: gain at 20 calls in PSNR, dB, above 0", gain, gain > 0))
        for rival in (source, regression):
            ratio = sampled["frechet"] / rival["frechet"]
            name = "source" if rival is source else "regression"
            what = f"{application}: Frechet distance at 20 calls over that of the {name}, below 1"
            out.append((what, ratio, ratio < 1))
    return tuple(out)
