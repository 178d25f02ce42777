"""How close synthetic speech comes to recordings: distances of log-mel spectrograms, and wav files.

Spectrograms come normalised, [N, T, M], as data sources and models of speech have them, with -1 beyond
the utterance; distances are in nats (natural logarithm of the magnitude, 8.69 dB each), so they compare
between normalisations but not between sets of filters.

Cepstra of a log-mel spectrum x of M bands, k = 0 .. K - 1:
  (1) c_k = sum_m x_m cos(pi k (m + 1/2) / M) / M                  so that x = c_0 + 2 sum_k c_k cos(...)
Mel-cepstral distortion (Kubichek 1993) of two frames, without the loudness c_0, K = 14:
  (2) (10 / ln 10) sqrt(2 sum_{k >= 1} (c_k - c'_k)^2)             in dB
Its mean is taken along the path of dynamic time warping (librosa), which costs it least, so different
durations are no error in themselves: `frames_error` has them.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data import audio as sound
from diffusion_jax.data.source import DataSpec
from diffusion_jax.evaluation import frechet
from diffusion_jax.evaluation.grids import comparison_grid

CEPSTRA = 14
_SILENCE = -1.0 + 1e-3


def _check(points: Any, audio: sound.LogMel | None = None) -> np.ndarray:
    points = np.asarray(points, np.float32)
    bands = None if audio is None else audio.mels
    if points.ndim != 3 or 0 in points.shape or bands not in (None, points.shape[-1]):
        expected = "M" if bands is None else bands
        raise ValueError(f"points must be a non-empty [N, T, {expected}], got {points.shape}")
    bad = np.count_nonzero(~np.isfinite(points).all(axis=(1, 2)))
    if bad:
        raise ValueError(f"{bad} of {len(points)} spectrograms hold NaN or infinity")
    return points


def valid_frames(points: Any) -> np.ndarray:
    """Frames up to the last that is not silence (-1 in all bands), at least 1: int32 [N].

    Raises:
      ValueError: not [N, T, M], or values that are not finite.
    """
    loud = (_check(points) > _SILENCE).any(axis=-1)
    last = loud.shape[1] - loud[:, ::-1].argmax(axis=1)
    return np.where(loud.any(axis=1), last, 1).astype(np.int32)


def _check_frames(frames: Any, points: np.ndarray) -> np.ndarray:
    frames = valid_frames(points) if frames is None else np.asarray(frames)
    fits = frames.shape == (len(points),) and np.issubdtype(frames.dtype, np.integer)
    if not fits or frames.min() < 1 or frames.max() > points.shape[1]:
        raise ValueError(f"frames must be {len(points)} integers in 1..{points.shape[1]}")
    return frames


def cepstra(log_mel: Any, count: int = CEPSTRA) -> np.ndarray:
    """(1) of the module: [..., M] -> float64 [..., count]. Raises ValueError: more than M of them."""
    log_mel = np.asarray(log_mel, np.float64)
    bands = log_mel.shape[-1]
    if not 1 <= count <= bands:
        raise ValueError(f"count={count} must be in 1..{bands}")
    angles = np.pi * np.arange(count) * (np.arange(bands)[:, None] + 0.5) / bands
    return log_mel @ (np.cos(angles) / bands)


def cepstral_distortion(log_mel: Any, reference: Any) -> float:
    """(2) of the module, along the warping path of two spectrograms [T, M] and [T', M], in dB.

    Raises:
      ValueError: shapes that do not fit. ImportError: librosa is missing.
    """
    librosa, _ = sound.libraries()
    a, b = (np.asarray(x) for x in (log_mel, reference))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise ValueError(f"need [T, M] and [T', M], got {a.shape} and {b.shape}")
    count = min(CEPSTRA, a.shape[1])
    a, b = (cepstra(x, count)[:, 1:] for x in (a, b))
    pairs = np.sqrt(np.square(a[:, None] - b[None]).sum(-1))
    total, path = librosa.sequence.dtw(C=pairs)
    return float(10.0 * np.sqrt(2.0) / np.log(10.0) * total[-1, -1] / len(path))


def mel_distances(
    points: Any,
    truth: Any,
    audio: sound.LogMel | Mapping[str, Any],
    *,
    frames: Any = None,
    truth_frames: Any = None,
) -> dict[str, np.ndarray]:
    """Distances of spectrograms to the recordings of the same text by the same speaker.

    Args:
      points, truth: [N, T, M], normalised.
      audio: the `LogMel`, or its fields (`spec.audio`).
      frames, truth_frames: integers [N]; None reads them off (`valid_frames`).

    Returns:
      One value an utterance, float64 [N]:
      - "mel_l1", "mel_l2": mean absolute and root mean square difference in nats over the truth's
        frames, frame by frame (frames a sample lacks are silence);
      - "mcd": mel-cepstral distortion in dB, warped in time;
      - "frames_error": |frames - truth_frames| / truth_frames.

    Raises:
      ValueError: shapes or numbers of frames that do not fit; values that are not finite.
    """
    audio = audio if isinstance(audio, sound.LogMel) else sound.LogMel.from_json(audio)
    points, truth = _check(points, audio), _check(truth, audio)
    if points.shape != truth.shape:
        raise ValueError(f"points and truth differ in shape: {points.shape} and {truth.shape}")
    frames = _check_frames(frames, points)
    truth_frames = _check_frames(truth_frames, truth)
    found: dict[str, list[float]] = {"mel_l1": [], "mel_l2": [], "mcd": []}
    for a, b, n, m in zip(points, truth, frames, truth_frames):
        a = audio.denormalise(np.where(np.arange(len(a))[:, None] < n, a, -1.0))
        b = audio.denormalise(b)
        error = (a[:m] - b[:m]).astype(np.float64)
        found["mel_l1"].append(np.abs(error).mean())
        found["mel_l2"].append(np.sqrt(np.square(error).mean()))
        found["mcd"].append(cepstral_distortion(a[:n], b[:m]))
    result = {name: np.array(values) for name, values in found.items()}
    return result | {"frames_error": np.abs(frames - truth_frames) / truth_frames}


def utterance_features(points: Any, audio: sound.LogMel | Mapping[str, Any], frames: Any = None):
    """What an utterance sounds like on the whole, float64 [N, 39].

    Of the first 13 cepstra: mean and standard deviation over the frames, and mean absolute difference
    of neighbouring frames. Too smooth spectrograms show in the last two.

    Raises:
      ValueError: as `mel_distances`.
    """
    audio = audio if isinstance(audio, sound.LogMel) else sound.LogMel.from_json(audio)
    points = _check(points, audio)
    frames = _check_frames(frames, points)
    rows = []
    for mel, n in zip(points, frames):
        c = cepstra(audio.denormalise(mel[:n]), min(13, audio.mels))
        steps = np.abs(np.diff(c, axis=0)).mean(axis=0) if n > 1 else np.zeros(c.shape[1])
        rows.append(np.concatenate([c.mean(axis=0), c.std(axis=0), steps]))
    return np.array(rows)


def utterance_frechet(features: Any, reference: Any) -> float:
    """Frechet distance of `utterance_features`, each in units of its spread over the reference.

    Biased by the number of utterances, as every such distance (see `frechet`): compare equal numbers.

    Raises:
      ValueError: features that do not fit or are too few.
    """
    features, reference = (frechet.check_features(x) for x in (features, reference))
    scale = np.maximum(reference.std(axis=0), 1e-6)
    return frechet.frechet_distance(
        frechet.moments(reference / scale), frechet.moments(features / scale)
    )


def mel_images(points: Any) -> np.ndarray:
    """Spectrograms [..., T, M] in colour, float32 [..., M, T, 3] in [-1, 1]: low frequencies at the
    bottom, time to the right. Values that are not finite stay so (grids mark them)."""
    import matplotlib

    points = np.asarray(points, np.float32)
    if points.ndim < 2:
        raise ValueError(f"points must be [..., T, M], got shape {points.shape}")
    colours = matplotlib.colormaps["magma"](np.linspace(0, 1, 256))[:, :3].astype(np.float32)
    turned = points.swapaxes(-1, -2)[..., ::-1, :]
    finite = np.isfinite(turned)
    levels = np.clip(np.where(finite, turned, 0.0) * 127.5 + 127.5, 0, 255)
    shown = 2.0 * colours[np.round(levels).astype(np.uint8)] - 1.0
    return np.where(finite[..., None], shown, np.float32(np.nan))


def captions(spec: DataSpec, batch: Mapping[str, Any]) -> list[str]:
    """What each row of conditions says, and who says it: "seven, speaker 2"."""
    count = len(batch["text"])
    symbols = np.array(spec.symbols)
    joint = "" if all(len(s) <= 1 for s in spec.symbols) else " "
    texts = [joint.join(s for s in symbols[np.asarray(row)] if s) for row in batch["text"]]
    if spec.class_names and "label" in batch:
        texts = [spec.class_names[int(label)] for label in batch["label"]]
    if spec.sizes.get("speaker", 1) > 1:
        texts = [f"{text}, speaker {int(s)}" for text, s in zip(texts, batch["speaker"])]
    return texts[:count]


def spectrogram_grid(
    sets: Mapping[str, Any], titles: Sequence[str], *, columns: int = 5, scale: int | None = None
) -> np.ndarray:
    """Spectrograms of several sets below one another, example by example.

    Args:
      sets: name -> [N, T, M], such as {"truth": ..., "4 calls": ...}.
      titles: N captions.
      columns: examples side by side.
      scale: whole factor of enlargement; None makes a cell about 120 pixels wide.

    Returns:
      uint8 [height, width, 3].

    Raises:
      ValueError: no sets, shapes that differ, or another number of titles.
    """
    shapes = {name: np.shape(points) for name, points in sets.items()}
    if len(set(shapes.values())) != 1 or len(titles) != next(iter(shapes.values()))[0]:
        raise ValueError(f"need sets of one shape and as many titles, got {shapes}, {len(titles)}")
    frames = next(iter(shapes.values()))[1]
    scale = max(1, round(120 / frames)) if scale is None else scale
    blocks = []
    for start in range(0, len(titles), columns):
        part = slice(start, start + columns)
        images = {name: mel_images(points[part]) for name, points in sets.items()}
        blocks.append(comparison_grid(images, column_labels=titles[part], scale=scale))
    width = max(block.shape[1] for block in blocks)
    padded = [
        np.pad(b, ((0, 0), (0, width - b.shape[1]), (0, 0)), constant_values=255) for b in blocks
    ]
    return np.concatenate(padded)


def write_waves(
    folder: str | os.PathLike,
    points: Any,
    audio: sound.LogMel | Mapping[str, Any],
    titles: Sequence[str],
    *,
    frames: Any = None,
    iterations: int = 60,
    peak: float | None = 0.95,
) -> list[Path]:
    """Spectrograms as wav files "000_seven_speaker_2.wav", by Griffin-Lim.

    Args:
      folder: made where it is missing; files of the same names are replaced.
      points: [N, T, M], normalised.
      audio: the `LogMel`, or its fields.
      titles: N captions, for the names of the files.
      frames: integers [N]; None reads them off.
      iterations: of Griffin-Lim.
      peak: largest amplitude; None leaves the loudness that the model gave.

    Raises:
      ValueError: as `mel_distances`, or another number of titles.
    """
    audio = audio if isinstance(audio, sound.LogMel) else sound.LogMel.from_json(audio)
    points = _check(points, audio)
    frames = _check_frames(frames, points)
    if len(titles) != len(points):
        raise ValueError(f"expected {len(points)} titles, got {len(titles)}")
    written = []
    for i, (mel, n, title) in enumerate(zip(points, frames, titles)):
        wave = audio.to_wave(audio.denormalise(mel[:n]), iterations=iterations)
        word = re.sub(r"[^A-Za-z0-9]+", "_", title).strip("_")[:40]
        path = Path(folder) / f"{i:03d}_{word}.wav"
        written.append(sound.write_wav(path, sound.scale_peak(wave, peak), audio.sample_rate))
    return written
