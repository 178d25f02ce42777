"""The synthesiser: format, determinism, and that voices have the pitch and formants they are told."""

import numpy as np
import pytest

pytest.importorskip("librosa")

from diffusion_jax import data
from diffusion_jax.data.formants import _PHONES, _SPEAKERS, synthesise
from diffusion_jax.data.speech import DIGIT_SYMBOLS

SMALL = {"train_count": 40, "test_count": 10}


def test_format_is_that_of_the_spoken_digits():
    source = data.formants(**SMALL)
    got = source.take(np.arange(40))
    assert source.spec.symbols == DIGIT_SYMBOLS and source.spec.sizes == {"text": 20, "speaker": 5}
    assert source.spec.class_names[3] == "three" and got["points"].shape == (40, 64, 40)
    np.testing.assert_array_equal(got["label"], np.arange(40) % 10)
    np.testing.assert_array_equal(got["speaker"], np.arange(40) // 10)
    np.testing.assert_array_equal(got["durations"].sum(axis=1), got["frames"])
    np.testing.assert_array_equal(got["durations"] > 0, got["text"] > 0)
    for points, frames in zip(got["points"], got["frames"]):
        assert (points[frames:] == -1).all()
        # the beginning and the end fade, the rest is heard
        assert (points[2 : frames - 3].max(axis=1) > -1).mean() > 0.8
    assert 0.9 < got["points"].max() < 1.2


def test_all_utterances_fit_48_frames():
    source = data.formants(split="all", max_frames=48)
    assert len(source) == 1_200
    with pytest.raises(ValueError, match=r"max_frames=40: utterances have up to 4\d frames"):
        data.formants(max_frames=40)


def test_a_row_is_the_same_wherever_it_is_asked_for():
    everything = data.formants(split="all", **SMALL)
    train, test = (data.formants(split=s, **SMALL) for s in ("train", "test"))
    assert (len(train), len(test)) == (40, 10) and train.spec == test.spec
    for name, values in test.take(np.arange(10)).items():
        np.testing.assert_array_equal(values, everything.take(np.arange(40, 50))[name])
    np.testing.assert_array_equal(train[7]["points"], train.take([31, 7, 2])["points"][1])
    longer = data.formants(train_count=80)
    np.testing.assert_array_equal(longer[7]["points"], train[7]["points"])
    uncached = data.formants(**SMALL, cache_bytes=0)
    np.testing.assert_array_equal(uncached[7]["points"], train[7]["points"])
    # the same word and speaker again is another utterance
    again = data.formants(train_count=60)
    first, second = again[3], again[53]
    assert (first["label"], first["speaker"]) == (second["label"], second["speaker"])
    assert np.abs(first["points"] - second["points"]).mean() > 0.02


def say(symbol, speaker=1, seconds=0.5, word=5):
    samples = np.array([int(8_000 * seconds)])
    return synthesise([symbol], samples, _SPEAKERS[speaker], np.uint64(word), 8_000)


def spectrum(wave):
    """Mean magnitude of Hann windows of 16 ms, too short to show harmonics: (frequencies, values)."""
    windows = np.lib.stride_tricks.sliding_window_view(wave, 128)[400:-600:32] * np.hanning(128)
    return np.fft.rfftfreq(1024, 1 / 8_000), np.abs(np.fft.rfft(windows, 1024)).mean(axis=0)


def test_speakers_have_their_pitch():
    for number, speaker in enumerate(_SPEAKERS):
        wave = say("AH", number)[1_000:2_600]
        echo = np.correlate(wave, wave, "full")[len(wave) - 1 :]
        lag = 25 + echo[25:130].argmax()
        assert 8_000 / lag == pytest.approx(speaker.pitch, rel=0.16)


@pytest.mark.parametrize("symbol", ["IY", "AO", "AH", "EH"])
def test_vowels_have_their_formants(symbol):
    frequency, magnitude = spectrum(say(symbol, 0))
    # each formant is louder than the valley above it
    targets = np.array(_PHONES[symbol].start) * _SPEAKERS[0].tract
    valleys = (targets[:-1] + targets[1:]) / 2
    at = lambda f: magnitude[np.abs(frequency - f) < 60].mean()
    if symbol != "AO":  # whose first two formants are one hump for so short a window
        assert at(targets[0]) > 1.5 * at(valleys[0])
    assert at(targets[1]) > 1.2 * at(valleys[1])


def test_fricatives_hiss_and_stops_close():
    for symbol, low, high in (("S", 1_500, 3_000), ("IY", 3_400, 100)):
        frequency, magnitude = spectrum(say(symbol))
        loud, soft = (magnitude[np.abs(frequency - f) < 400].mean() for f in (high, low))
        assert loud > 3 * soft
    closed = say("K", seconds=0.4)
    assert np.abs(closed[400:1_500]).max() < 0.02 < np.abs(closed[2_000:2_800]).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"train_count": 0}, "train_count=0"),
        ({"speakers": 6}, r"speakers=6 must be in 1..5"),
        ({"max_frames": 2.5}, "max_frames=2.5"),
        ({"audio": {"sample_rate": 4_000, "fmax": 2_000.0}}, "at least 8000"),
        ({"audio": {"bands": 3}}, "no field 'bands'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        data.formants(**options)


def test_other_features_and_rates():
    source = data.formants(
        audio={"sample_rate": 16_000, "n_fft": 512, "hop": 128, "fmax": 8_000.0, "mels": 32},
        max_frames=96,
        **SMALL,
    )
    got = source[3]
    assert got["points"].shape == (96, 32) and got["durations"].sum() == got["frames"]
