"""DPM-OT (arXiv 2307.11308): transported noise and fewer than 10 calls mix modes less than a solver alone.

Two measurements, each with DDIM and 2M from pure noise and with the same solvers from the transport map
("ot" rows, t is the late time of its targets), at equal numbers of calls:

- plane: eight narrow Gaussians on a circle under their exact denoiser; "mixed" is the share of samples
  beyond three standard deviations of every mode (1.1% of the data themselves).
- images: "mixed" is the share of images for which a classifier's largest probability is below 0.8. The
  model runs without a class (the null label: a weak branch, seen by a tenth of the training), and once
  more with "class told", where a transported state is told the class of its target.

"nearest_train" is the mean distance to the nearest training point (images: root mean square a pixel),
"nearest_target" the same to those that became targets. Read both before anything else: a map into
noised training images returns training images, and figures that compare with training data reward it.

Found on the digits: from t = 0.1 the modes are clean at 3 calls already, and the outputs are copies: their
nearest training image is a target, and nearer than held-out images are to the training set (the verdicts
that do not hold). From t = 0.3 they are no copies, and the mixing of the weak branch is reduced a little
only. Told the class, plain DDIM at 3 calls mixes nothing (its digits are averages, Frechet distance 4.1),
and 2M from pure noise has the smallest distance from 5 calls on: there the map helps with nothing that
its targets do not already show.
"""

import importlib
import statistics

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax import oracles, processes, samplers
from diffusion_jax.evaluation.neighbours import nearest_distance
from diffusion_jax.evaluation.quality import ImageQuality
from experiments.reproduce import run_name, trained

TITLE = "DPM-OT (arXiv 2307.11308)"
CLAIM = "with fewer than 10 calls, less mode mixture than solvers that start from pure noise"
CONFIGS = {"cpu": "configs.digits.score", "full": "configs.dpm_ot.cifar10"}
CALLS = (3, 5, 9)
SOLVERS = ("ddim", "dpmpp_2m")
LATE = {"cpu": (0.1, 0.3), "full": (0.05, 0.1)}
TARGETS = {"cpu": 512, "full": 50_000}
UPDATES = {"cpu": 300, "full": 10_000}
_CONFIDENT = 0.8
_MODES, _RADIUS, _SPREAD = 8, 4.0, 0.15


def _row(where, name, nfe, found):
    row = {"data": where, "start": name, "nfe": nfe}
    for figure in found[0]:
        values = [f[figure] for f in found]
        row[figure] = statistics.mean(values)
        row[f"{figure}_std"] = statistics.stdev(values) if len(values) > 1 else None
    print(row, flush=True)
    return row


def _balance(transport, shape, seed=99, blocks=20, size=8192):
    """Share of cells whose mass is within 20% of 1 / n, measured with fresh draws."""
    count = np.zeros(len(transport.potential))
    assign = jax.jit(lambda transport, x: transport.cells(x))
    for i in range(blocks):
        z = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), (size, *shape))
        count += np.bincount(np.asarray(assign(transport, z)), minlength=len(count))
    return float((np.abs(count / count.mean() - 1.0) < 0.2).mean())


def _plane(options, rows, num=4000):
    process = processes.VP()
    angles = 2.0 * np.pi * np.arange(_MODES) / _MODES
    means = _RADIUS * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    covariances = np.tile(_SPREAD**2 * np.eye(2), (_MODES, 1, 1))
    exact = oracles.GaussianMixture(process, np.full(_MODES, 1 / _MODES), means, covariances)
    train = np.asarray(exact.sample(jax.random.key(11), 512), np.float32)

    def figures(x):
        far = np.linalg.norm(x[:, None] - means, axis=-1).min(axis=1) > 3.0 * _SPREAD
        near = float(nearest_distance(x, train).mean())
        return {"mixed": float(far.mean()), "nearest_train": near}

    def add(name, sampler, nfe):
        found = []
        for seed in range(options.seeds):
            noise = process.prior(jax.random.key(seed), (num, 2))
            found.append(figures(np.asarray(samplers.sample(sampler, exact, None, noise))))
        rows.append(_row("plane", name, nfe, found))

    transport, _ = samplers.transport_sampler(
        jax.random.key(12), process, train, t=0.1, max_steps=400, learning_rate=0.02
    )
    for nfe in CALLS:
        for solver in SOLVERS:
            add(solver, samplers.build_sampler(process, solver, nfe), nfe)
            late = samplers.dpm_ot(process, nfe, transport=transport, sampler=solver)
            add(f"ot {solver} t=0.1", late, nfe)
    fresh = [
        figures(np.asarray(exact.sample(jax.random.key(20 + s), num), np.float32))
        for s in range(options.seeds)
    ]
    rows.append(_row("plane", "the data", None, fresh))


def _images(options, rows):
    module = CONFIGS[options.scale]
    run = trained(importlib.import_module(module).get_config(), options.workdir, run_name(module))
    train, test = (run.source(split) for split in ("train", "test"))
    every, held = (source.take(np.arange(len(source))) for source in (train, test))
    quality = ImageQuality(
        every["image"], every["label"], jax.random.key(0), cache=options.classifier
    )
    num = min(options.num or len(test), len(test))
    chosen = every["image"][: TARGETS[options.scale]]
    process, classes, index = run.method.process, run.spec.num_classes, jnp.arange(num)
    nothing, around = jnp.full(num, classes, jnp.int32), jnp.arange(num, dtype=jnp.int32) % classes

    def figures(images):
        images = np.clip(images, -1.0, 1.0)
        sure = jax.nn.softmax(quality.classifier.logits(images), axis=-1).max(axis=-1)
        judged = quality.evaluate(images)
        return {
            "mixed": float(np.mean(np.asarray(sure) < _CONFIDENT)),
            "frechet": judged["frechet"],
            "texture": judged["texture"],
            "nearest_train": judged["nearest_train"],
            "nearest_target": float(nearest_distance(images, chosen).mean()),
        }

    def add(name, sampler, nfe, labels):
        found = []
        for seed in range(options.seeds):
            noise = process.prior(jax.random.key(seed), (num, *run.spec.shape))
            batch = {"index": index, "label": labels(noise)}
            denoise = run.method.denoiser(run.params, batch)
            found.append(figures(np.asarray(samplers.sample(sampler, denoise, None, noise))))
        rows.append(_row("images", name, nfe, found))

    told = jnp.asarray(every["label"][: len(chosen)], jnp.int32)
    maps = {}
    for t in LATE[options.scale]:
        maps[t], _ = samplers.transport_sampler(
            jax.random.key(13),
            process,
            jnp.asarray(chosen),
            t=t,
            max_steps=UPDATES[options.scale],
        )
        balance = _balance(maps[t], run.spec.shape)
        row = {"data": "images", "start": f"map t={t}", "nfe": 0, "balanced_cells": balance}
        rows.append(row | {"updates": maps[t].steps})
        print(rows[-1], flush=True)
    for nfe in CALLS:
        for solver in SOLVERS:
            plain = run.method.build_sampler(solver, nfe)
            add(solver, plain, nfe, lambda noise: nothing)
            add(f"{solver}, class told", plain, nfe, lambda noise: around)
            for t, transport in maps.items():
                late = samplers.dpm_ot(process, nfe, transport=transport, sampler=solver)
                of_target = lambda noise, transport=transport: told[transport.cells(noise)]
                add(f"ot {solver} t={t}", late, nfe, lambda noise: nothing)
                add(f"ot {solver} t={t}, class told", late, nfe, of_target)
    rows.append(_row("images", "held-out data", None, [figures(held["image"][:num])]))


def measure(options):
    """Rows of both measurements: mean and standard deviation over sampling seeds."""
    rows = []
    _plane(options, rows)
    _images(options, rows)
    return rows


def verdicts(rows):
    """`(statement, measured, holds)`; the last ones are what the map costs."""
    at = {(row["data"], row["start"], row["nfe"]): row for row in rows}
    late = sorted({r["start"].split()[2].strip(",") for r in rows if r["start"].startswith("ot ")})
    found = []
    for data, told in (("plane", ""), ("images", ""), ("images", ", class told")):
        for t in late:
            for nfe in CALLS:
                ours = [at.get((data, f"ot {s} {t}{told}", nfe)) for s in SOLVERS]
                if None in ours:
                    continue
                ours = max(row["mixed"] for row in ours)
                best = min(at[data, f"{s}{told}", nfe]["mixed"] for s in SOLVERS)
                statement = (
                    f"{data}{told}: mixed, worst ot {t} over best plain, {nfe} calls, below 1"
                )
                found.append((statement, ours / best if best else None, ours < best))
    held = at["images", "held-out data", None]["nearest_train"]
    for t in late:
        for told in ("", ", class told"):
            row = at.get(("images", f"ot dpmpp_2m {t}{told}", CALLS[1]))
            if row:
                ratio = row["nearest_train"] / held
                statement = (
                    f"images: nearest training image, ot {t}{told} over held-out, at least 1"
                )
                found.append((statement, ratio, ratio >= 1.0))
    return tuple(found)
