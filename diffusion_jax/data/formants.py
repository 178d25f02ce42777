"""The ten digits spoken by a formant synthesiser: speech data that needs no file.

A row is a digit, a speaker and draws of its own (durations, pitch, vocal tract, loudness of noise), so
text and speaker leave much open, as in recordings. The format is that of `speech.spoken_digits`, which
can take its place in any config, and additionally "durations" int32 [L]: the true frames of each symbol
(0 beyond the text; they sum to "frames").

The synthesiser is a source-filter model (Fant 1960; parallel noise branch as in Klatt 1980):
  (1) voice: a band-limited pulse train, sum_k cos(k phi), phi' = 2 pi f0(t)
  (2) noise: white
  (3) each is shaped, window by window, by a magnitude: the voice by three resonances
      prod_i F_i^2 / |F_i^2 - f^2 + j f B_i| and a falling source spectrum, the noise by a band
  (4) formants, levels and bands glide between the symbols' targets (moving average: coarticulation),
      and the utterance fades in and out.
Formant targets are rounded averages of American English (Peterson, Barney 1952); the rest was chosen by
ear and by eye, and claims nothing about real voices.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data import audio as sound
from diffusion_jax.data import randomness, transcripts
from diffusion_jax.data.source import Element, check_split
from diffusion_jax.data.speech import (
    DIGIT_SYMBOLS,
    Speech,
    check_frames,
    digit_texts,
    speech_spec,
)
from diffusion_jax.registry import register

TRAIN_COUNT, TEST_COUNT = 1_000, 200
_WINDOW, _HOP = 256, 64
_BANDWIDTHS = np.array([80.0, 110.0, 160.0])
_SLACK = 0.2  # durations vary by this factor in both directions


class _Phone(NamedTuple):
    """Targets at the beginning and end of a symbol (frequencies in Hz, duration in milliseconds)."""

    milliseconds: float
    start: tuple[float, float, float] = (500.0, 1500.0, 2500.0)
    end: tuple[float, float, float] | None = None
    voice: float = 1.0
    noise: float = 0.0
    centre: float = 3000.0
    width: float = 1200.0
    closure: float = 0.0  # share of the symbol, from its beginning, that is silent


_PHONES: Mapping[str, _Phone] = {
    "AH": _Phone(80, (640, 1190, 2390)),
    "AO": _Phone(110, (570, 840, 2410)),
    "AY": _Phone(150, (730, 1090, 2440), (390, 1990, 2550)),
    "EH": _Phone(90, (530, 1840, 2480)),
    "EY": _Phone(140, (480, 1900, 2500), (330, 2200, 2700)),
    "F": _Phone(90, voice=0.0, noise=0.05, centre=2600, width=2500),
    "IH": _Phone(75, (390, 1990, 2550)),
    "IY": _Phone(130, (270, 2290, 3010)),
    "K": _Phone(80, voice=0.0, noise=0.3, centre=1800, width=500, closure=0.65),
    "N": _Phone(80, (250, 1400, 2300), voice=0.3),
    "OW": _Phone(140, (500, 900, 2400), (350, 800, 2300)),
    "R": _Phone(75, (330, 1150, 1500), voice=0.7),
    "S": _Phone(110, voice=0.0, noise=0.35, centre=3700, width=500),
    "T": _Phone(70, voice=0.0, noise=0.35, centre=3300, width=900, closure=0.55),
    "TH": _Phone(85, voice=0.0, noise=0.04, centre=3200, width=1800),
    "UW": _Phone(130, (300, 870, 2240)),
    "V": _Phone(60, (280, 1100, 2300), voice=0.3, noise=0.03, centre=2600, width=2500),
    "W": _Phone(75, (300, 650, 2200), (350, 750, 2250), voice=0.7),
    "Z": _Phone(85, (280, 1700, 2500), voice=0.2, noise=0.2, centre=3700, width=500),
}


@dataclasses.dataclass(frozen=True)
class _Speaker:
    pitch: float  # Hz
    tract: float  # formants over those of the table
    pace: float  # durations over those of the table


_SPEAKERS = (
    _Speaker(95.0, 0.95, 1.1),
    _Speaker(120.0, 1.0, 1.0),
    _Speaker(150.0, 1.04, 0.9),
    _Speaker(190.0, 1.1, 1.05),
    _Speaker(230.0, 1.16, 0.95),
)


class _Rows(NamedTuple):
    """What is drawn for rows [N]."""

    label: np.ndarray
    speaker: np.ndarray
    words: np.ndarray  # uint64: the streams of the rows' other draws
    durations: np.ndarray  # int32 [N, L] frames


def _draw(rows: np.ndarray, speakers: int, audio: sound.LogMel) -> _Rows:
    """Digits and speakers go round, so that every part of the set is balanced."""
    label = (rows % 10).astype(np.int32)
    speaker = (rows // 10 % speakers).astype(np.int32)
    words = randomness.hash_rows(rows, 0x5EEC)
    texts = digit_texts(label)["text"]
    table = np.array([0.0, *(_PHONES[symbol].milliseconds for symbol in DIGIT_SYMBOLS[1:])])
    pace = np.array([s.pace for s in _SPEAKERS])[speaker]
    swing = randomness.uniforms(words, texts.shape[1] + 1)
    # one factor for the whole word, one for each symbol
    factors = (1 + _SLACK) ** (2 * swing[:, :1] - 1) * (1 + _SLACK) ** (2 * swing[:, 1:] - 1)
    frames = table[texts] * 1e-3 * audio.sample_rate / audio.hop * pace[:, None] * factors
    durations = np.where(texts > 0, np.maximum(np.round(frames), 2), 0)
    return _Rows(label, speaker, words, durations.astype(np.int32))


@register("data", "formants", kinds=("points",))
def formants(
    split: str = "train",
    *,
    train_count: int = TRAIN_COUNT,
    test_count: int = TEST_COUNT,
    speakers: int = len(_SPEAKERS),
    audio: Mapping[str, Any] | None = None,
    max_frames: int = 64,
    cache_bytes: int = 2**30,
) -> Speech:
    """Digits from a formant synthesiser, with phonemes, speakers and true durations; needs no file.

    Args:
      split: "train", "test" or "all": rows of their own each, train first.
      train_count, test_count: utterances, at least 1.
      speakers: 1..5.
      audio: fields of `audio.SPEECH_8K` to change.
      max_frames: T.
      cache_bytes: spectrograms stay in memory when all together need no more than this.

    Raises:
      ValueError: an unknown split or field, a number out of range, or utterances longer than
        `max_frames`.
      ImportError: librosa or soundfile is missing.
    """
    check_split(split)
    check_frames(max_frames)
    for name, value in (("train_count", train_count), ("test_count", test_count)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if speakers not in range(1, len(_SPEAKERS) + 1):
        raise ValueError(f"speakers={speakers!r} must be in 1..{len(_SPEAKERS)}")
    sound.libraries()
    features = sound.SPEECH_8K.replace(audio)
    if features.sample_rate < 8_000:
        raise ValueError(f"sample_rate={features.sample_rate} must be at least 8000 for formants")
    every = np.arange(train_count + test_count)
    rows = {"train": every[:train_count], "test": every[train_count:], "all": every}[split]
    drawn = _draw(rows, speakers, features)
    texts = digit_texts(drawn.label)
    length = texts["text"].shape[1]
    durations = Element((length,), "int32")
    spec = speech_spec(
        features,
        max_frames,
        length,
        DIGIT_SYMBOLS,
        speakers,
        transcripts.DIGITS,
        {"durations": durations},
    )
    longest = int(_draw(every, speakers, features).durations.sum(axis=1).max())
    if longest > max_frames:
        raise ValueError(f"max_frames={max_frames}: utterances have up to {longest} frames")

    def wave(row: int) -> np.ndarray:
        symbols = [DIGIT_SYMBOLS[i] for i in texts["text"][row] if i]
        spans = drawn.durations[row, : len(symbols)] * features.hop
        speaker = _SPEAKERS[drawn.speaker[row]]
        return synthesise(symbols, spans, speaker, drawn.words[row], features.sample_rate)

    arrays = texts | {
        "speaker": drawn.speaker,
        "label": drawn.label,
        "durations": drawn.durations,
    }
    return Speech(wave, arrays, spec, cache_bytes)


def synthesise(
    symbols: list[str], samples: np.ndarray, speaker: _Speaker, word: np.uint64, sample_rate: int
) -> np.ndarray:
    """The wave of symbols of the given lengths in samples: float32 [sum of samples], peak 0.95."""
    librosa, _ = sound.libraries()
    count = int(np.sum(samples))
    # Streams apart from those of the durations.
    style = randomness.uniforms(randomness.hash_rows(np.array([word]), 1), 6)[0]
    noise = randomness.uniforms(randomness.hash_rows(np.array([word]), 2), count)[0] - 0.5

    time = np.arange(count) / sample_rate
    pitch = speaker.pitch * (0.92 + 0.16 * style[0])
    wobble = 0.04 * np.sin(2 * np.pi * ((3 + 3 * style[1]) * time + style[2]))
    f0 = pitch * (1.08 - 0.2 * time / max(time[-1], 0.2) + wobble)
    phase = 2 * np.pi * np.cumsum(f0) / sample_rate
    harmonics = int(0.475 * sample_rate / f0.max())
    voice = _pulses(phase, harmonics) / np.sqrt(harmonics)

    track = _track(tuple(symbols), tuple(int(s) for s in samples), sample_rate)
    frequency = np.fft.rfftfreq(_WINDOW, 1 / sample_rate)[:, None]
    tract = speaker.tract * (0.97 + 0.06 * style[3])
    response = (300.0 / np.maximum(frequency, 300.0)) ** (0.4 + 0.4 * style[4])
    for target, width in zip(track[:3] * tract, _BANDWIDTHS):
        # Resonances with unit gain at 0 Hz, as a tube has them.
        square = target**2
        response = response * square / np.hypot(square - frequency**2, frequency * width)
    band = np.exp(-0.5 * ((frequency - track[5]) / track[6]) ** 2)
    level = 0.7 + 0.6 * style[5]

    def shape(source, magnitude):
        spectrum = librosa.stft(source, n_fft=_WINDOW, hop_length=_HOP, pad_mode="reflect")
        return librosa.istft(spectrum * magnitude, n_fft=_WINDOW, hop_length=_HOP, length=count)

    wave = shape(voice, track[3] * response) + shape(noise * 3.46, level * track[4] * band)
    wave *= np.minimum(1.0, np.minimum(time / 0.015, (time[-1] - time) / 0.05))
    return sound.scale_peak((wave + 1e-4 * noise).astype(np.float32), 0.95)


def _pulses(phase: np.ndarray, harmonics: int) -> np.ndarray:
    """sum_{k=1}^{harmonics} cos(k phase), by the closed form of Dirichlet's kernel."""
    half = np.sin(phase / 2)
    near = np.abs(half) < 1e-6
    safe = np.where(near, 1.0, 2 * half)
    kernel = np.sin((harmonics + 0.5) * phase) / safe - 0.5
    return np.where(near, float(harmonics), kernel)


@functools.lru_cache(maxsize=64)
def _track(symbols: tuple[str, ...], samples: tuple[int, ...], sample_rate: int) -> np.ndarray:
    """Targets at the times of the windows: [7, windows], rows F1 F2 F3 voice noise centre width."""
    pieces = []
    for symbol, span in zip(symbols, samples):
        phone = _PHONES[symbol]
        place = (np.arange(span) + 0.5) / span
        start, end = np.array(phone.start), np.array(phone.end or phone.start)
        formant = start[:, None] + (end - start)[:, None] * place
        # A burst decays over the rest of its symbol.
        open_ = place >= phone.closure
        burst = np.exp(-4 * (place - phone.closure)) if phone.closure else 1.0
        flat = np.ones(span)
        pieces.append(
            np.stack(
                [
                    *formant,
                    phone.voice * flat,
                    phone.noise * np.where(open_, burst, 0.0),
                    phone.centre * flat,
                    phone.width * flat,
                ]
            )
        )
    steps = np.concatenate(pieces, axis=1)
    smooth = int(0.03 * sample_rate) | 1
    padded = np.pad(steps, ((0, 0), (smooth // 2 + 1, smooth // 2)), mode="edge")
    sums = np.cumsum(padded, axis=1)
    means = (sums[:, smooth:] - sums[:, :-smooth]) / smooth
    # windows are centred at multiples of the hop, the end of the wave included
    places = np.minimum(np.arange(means.shape[1] // _HOP + 1) * _HOP, means.shape[1] - 1)
    return means[:, places]
