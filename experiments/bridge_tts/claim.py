"""Bridge-TTS (arXiv 2312.03491) against Grad-TTS (arXiv 2105.06337) on spoken digits.

One encoder, learnt first, serves all models; decoders have the same network, data, updates and seed. Each
utterance of the test takes is spoken with the durations of its recording (as the encoder aligns it), so
that spectrograms can be compared frame by frame: "mel_l1" in nats; "mcd", mel-cepstral distortion along a
warping path in dB; "frechet" and "accuracy" in a classifier of digits that was trained on the recordings.
The row "encoder" is z itself, the mean of what may be said: the best a guess without a decoder can do in
mel_l1, and what every decoder begins with.

Grad-TTS is sampled as published (Euler's rule at the middle of each step, temperature 1.5), and by
DPM-Solver++(2M) beside it. Bridges are sampled by the SDE with temperature 2. Pictures of spectrograms and
wav files are written into the folder of the runs.

Found, on 289 recordings after 1,000 updates of batch 16: the bridge is as good at 2 calls as at 50, better than
z in every figure, and its words are recognised as often as the recordings. Grad-TTS as published is far
from converged after so few updates: its score has to be right where it is largest, and every call adds an
error, so that it gets worse from 2 calls to 50 (and a solver that leans on x0_hat near the noise fails). Most
of that margin is due to what is predicted: with the bridge's data prediction and loss the diffusion is
behind by a quarter in mel L1 at 2 and 4 calls and by a twentieth at 50, a gap that closes as in the paper;
by the classifier's Frechet distance it is then ahead at 4 and 50.

The data are the free spoken digits: `--config.data.root=FOLDER`, or $DIFFUSION_JAX_DATA. Without them
`--config.data.name=formants` is a rehearsal on synthetic speech.
"""

import itertools
import statistics

import jax
import numpy as np

from diffusion_jax import builder, evaluation
from diffusion_jax import run as runs
from diffusion_jax.evaluation import speech
from diffusion_jax.evaluation.quality import ImageQuality
from diffusion_jax.methods.tts import SILENCE, prior, recorded_durations
from experiments.reproduce import trained

TITLE = "Bridge-TTS (arXiv 2312.03491)"
CLAIM = "a bridge from the encoder's output beats diffusion around it at 2, 4 and 50 calls"
CONFIGS = {"cpu": "configs.speech.bridge_tts_digits", "full": "configs.bridge_tts.ljspeech"}
DIFFUSION = {"cpu": "configs.speech.grad_tts_digits", "full": "configs.grad_tts.ljspeech"}
CALLS = (2, 4, 50)
FIGURES = ("mel_l1", "mcd", "frechet", "accuracy", "utterance_frechet", "frames_error")
JUDGED = {"mel_l1": "mel L1", "mcd": "mel-cepstral distortion", "frechet": "Frechet distance"}
BRIDGE, GRAD = "Bridge-TTS", "Grad-TTS"
FAIR = "Grad-TTS data prediction"

# What an ablation changes of the bridge's config, or of Grad-TTS's: there, the bridge's prediction and loss.
VARIANTS = {
    FAIR: {"method": {"parameterization": "x0", "weighting": "x0"}},
    "Bridge-TTS VP": {
        "process": {
            "name": "vp_bridge",
            **{"beta_d": 19.99, "beta_min": 0.01, "t_min": 1e-5, "t_max": 1.0 - 1e-5},
        }
    },
}
_SDE = {"name": "bridge_tts", "temperature": 2.0}
_EULER = {"name": "euler", "grid": "uniform", "offset": 0.5}
DRAWN = {
    BRIDGE: (
        *({**_SDE, "nfe": n} for n in CALLS),
        {**_SDE, "temperature": 1.0, "nfe": 4},
        {"name": "bridge_tts_ode", "nfe": 4},
    ),
    GRAD: (
        *({**_EULER, "nfe": n} for n in CALLS),
        {"name": "dpmpp_2m", "nfe": 4},
    ),
    "Bridge-TTS VP": ({**_SDE, "nfe": 4},),
    FAIR: tuple({**_EULER, "nfe": n} for n in CALLS),
}


def called(sampler) -> str:
    """How a row names a sampler."""
    if sampler["name"] == "bridge_tts":
        return f"SDE tau={sampler['temperature']:g}"
    return {"bridge_tts_ode": "ODE", "euler": "Euler", "dpmpp_2m": "DPM-Solver++(2M)"}[
        sampler["name"]
    ]


def measure(options):
    """One row a model, sampler and number of calls: mean and deviation over the sampling seeds."""
    models = _train(options)
    bridge = models[BRIDGE]
    train, test = (bridge.source(split) for split in ("train", "test"))
    num = min(options.num or len(test), len(test))
    batch = runs.first_conditions(test, num)
    truth, frames, audio = batch["points"], np.asarray(batch["frames"]), bridge.spec.audio
    module = builder.build_method(bridge.config, bridge.spec).module
    durations = jax.jit(lambda p, b: recorded_durations(module, p, b))
    batch["durations"] = np.asarray(durations(bridge.params, batch))
    judge = _judge(options, train, truth, frames, batch, audio)

    said = prior(module, bridge.params, batch, truth.shape[1], lengths="durations")
    inside = np.arange(truth.shape[1]) < frames[:, None]
    z = np.where(inside[..., None], said.source, SILENCE)
    shown = {"truth": truth, "encoder": z}
    rows = [{"model": "recordings", **judge(truth)}, {"model": "encoder", **judge(z)}]
    for model, run in models.items():
        for sampler in DRAWN[model]:
            built = run.method.build_sampler(**sampler)
            row, drawn = _row(options, run, batch, built, judge, "durations")
            rows.append({"model": model, "sampler": called(sampler), **row})
            print(rows[-1], flush=True)
            if sampler in DRAWN[model][: len(CALLS)] and model in (BRIDGE, GRAD):
                shown[f"{model} {built.nfe}"] = drawn
    free = bridge.method.build_sampler(**DRAWN[BRIDGE][1])
    row, spoken = _row(options, bridge, batch, free, judge, "predicted")
    rows.append({"model": f"{BRIDGE}, durations predicted", "sampler": "SDE tau=2", **row})
    _show(options.workdir, bridge.spec, shown | {"durations predicted": spoken}, batch)
    return rows


def _row(options, run, batch, sampler, judge, lengths):
    """Figures over the seeds, and the last seed's samples."""
    found = []
    for seed in range(options.seeds):
        key = jax.random.key(seed)
        drawn = runs.draw(run, batch, key, sampler=sampler, lengths=lengths)
        found.append(judge(drawn, lengths == "durations"))
    row = {"nfe": sampler.nfe}
    for name in found[0]:
        values = [f[name] for f in found]
        row[name] = statistics.mean(values)
        row[f"{name}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return row, drawn


def _train(options):
    """The runs by name; the encoder's is the beginning of all that train a decoder alone."""

    def config(module, argument=""):
        found = options.load(module, argument)
        if found.data.name == "formants" and "root" in found.data:
            del found.data["root"]  # it has no files
        return found

    main = CONFIGS[options.scale]
    first = config(main, "encoder")
    try:
        builder.build_data(first, "train")
    except builder.ConfigError as error:
        raise builder.ConfigError(
            f"{error}; name the folder by --config.data.root=FOLDER, or rehearse on synthetic speech "
            "with --config.data.name=formants"
        ) from error
    folder = f"tts_{options.scale}_{first.data.name}"
    encoder = trained(first, options.workdir, f"{folder}_encoder")
    changes = {BRIDGE: {}, GRAD: {}, **VARIANTS}
    models = {}
    for name, changed in changes.items():
        found = config(DIFFUSION[options.scale] if name.startswith(GRAD) else main)
        with found.unlocked():
            for section, fields in changed.items():
                found[section] = fields if "name" in fields else {**found[section], **fields}
            if found.method.trains == "decoder":
                found.train.init_from = str(encoder.workdir)
        slug = name.lower().replace(" ", "_").replace("-", "_")
        print(f"== {name}", flush=True)
        models[name] = trained(found, options.workdir, f"{folder}_{slug}")
    return models


def _judge(options, train, truth, frames, batch, audio):
    """`(points, of the recordings' durations) -> figures` on the test utterances."""
    every = train.take(np.arange(len(train)))
    reference = speech.utterance_features(every["points"], audio, every["frames"])
    labels, quality = batch.get("label"), None
    if labels is not None:
        quality = ImageQuality(
            every["points"][..., None],
            every["label"],
            jax.random.key(0),
            cache=options.classifier,
        )

    def judge(points, timed=True):
        points = np.asarray(points)
        own = frames if timed else None
        found = speech.mel_distances(points, truth, audio, frames=own, truth_frames=frames)
        names = ("mcd", "mel_l1" if timed else "frames_error")
        figures = {name: float(found[name].mean()) for name in names}
        features = speech.utterance_features(points, audio, own)
        figures["utterance_frechet"] = speech.utterance_frechet(features, reference)
        if quality is not None:
            judged = quality.evaluate(points[..., None], labels)
            figures |= {name: judged[name] for name in ("frechet", "accuracy")}
        return {name: figures[name] for name in FIGURES if figures.get(name) is not None}

    return judge


def _show(workdir, spec, shown, batch, count=5):
    """A picture and wav files of the first utterances."""
    titles = speech.captions(spec, batch)[:count]
    few = {name: np.asarray(points)[:count] for name, points in shown.items()}
    evaluation.save_png(
        workdir / "bridge_tts.png", speech.spectrogram_grid(few, titles, columns=count)
    )
    for name, points in few.items():
        folder = workdir / "bridge_tts_wav" / name.lower().replace(" ", "_").replace("-", "_")
        speech.write_waves(folder, points, spec.audio, titles)


def _pick(rows, model, sampler, nfe):
    for row in rows:
        if (row["model"], row.get("sampler"), row.get("nfe")) == (model, sampler, nfe):
            return row
    raise KeyError(f"no row {model} {sampler} {nfe}")


def verdicts(rows):
    """`(statement, measured, holds)`: the bridge over the diffusion, then the paper's ablations."""
    found = []
    for rival, nfe in itertools.product((GRAD, FAIR), CALLS):
        new, old = _pick(rows, BRIDGE, "SDE tau=2", nfe), _pick(rows, rival, "Euler", nfe)
        for figure, what in JUDGED.items():
            if figure in new:
                ratio = new[figure] / old[figure]
                statement = f"{what} at {nfe} calls, Bridge-TTS over {rival}, below 1"
                found.append((statement, ratio, ratio < 1.0))
    hot, cold = (_pick(rows, BRIDGE, f"SDE tau={tau}", 4)["mel_l1"] for tau in (1, 2))
    found.append(("mel L1 at 4 calls, temperature 2 over 1, below 1", cold / hot, cold < hot))
    return tuple(found)


def report(rows):
    """The table, without deviations."""
    columns = ["model", "sampler", "nfe", *(n for n in FIGURES if any(n in row for row in rows))]
    shown = [
        {name: row.get(name) for name in columns}
        | {n: _told(row, n) for n in FIGURES if row.get(n) is not None}
        for row in rows
    ]
    return evaluation.markdown_table(shown, columns)


def _told(row, name):
    spread = row.get(f"{name}_std")
    return f"{row[name]:.3f}" + ("" if spread is None else f" ± {spread:.3f}")
