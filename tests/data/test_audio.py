"""Waves and log-mel spectrograms against their formulas, and wav files of strangers."""

import json
import sys

import numpy as np
import pytest

librosa = pytest.importorskip("librosa")
soundfile = pytest.importorskip("soundfile")

from diffusion_jax.data import audio
from diffusion_jax.data.audio import SPEECH_8K, SPEECH_22K, LogMel


def tone(frequency, seconds=0.5, rate=8_000, level=0.5):
    return (level * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def slaney(frequency):
    """Mel of Slaney's Auditory Toolbox: linear to 1 kHz, logarithmic above."""
    frequency = np.asarray(frequency, np.float64)
    high = 15 + 27 * np.log(np.maximum(frequency, 1000) / 1000) / np.log(6.4)
    return np.where(frequency < 1000, 3 * frequency / 200, high)


def slaney_inverse(mel):
    return np.where(mel < 15, 200 * mel / 3, 1000 * 6.4 ** ((np.maximum(mel, 15) - 15) / 27))


def plain_log_mel(wave, a):
    """The module's (1) to (3), written out: frame by frame, bin by bin."""
    edges = slaney_inverse(np.linspace(slaney(a.fmin), slaney(a.fmax), a.mels + 2))
    bins = np.arange(a.n_fft // 2 + 1) * a.sample_rate / a.n_fft
    filters = np.zeros((a.mels, len(bins)))
    for m, (left, centre, right) in enumerate(zip(edges, edges[1:], edges[2:])):
        rise, fall = (bins - left) / (centre - left), (right - bins) / (right - centre)
        filters[m] = np.maximum(0, np.minimum(rise, fall)) * 2 / (right - left)
    side = (a.n_fft - a.hop) // 2
    count = len(wave) // a.hop
    inside = wave[: count * a.hop].astype(np.float64)
    padded = np.concatenate([inside[side:0:-1], inside, inside[-2 : -side - 2 : -1]])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(a.n_fft) / a.n_fft)
    turn = np.exp(-2j * np.pi * np.outer(np.arange(len(bins)), np.arange(a.n_fft)) / a.n_fft)
    frames = [padded[t * a.hop : t * a.hop + a.n_fft] * window for t in range(count)]
    return np.log(np.maximum([filters @ np.abs(turn @ frame) for frame in frames], a.floor))


@pytest.mark.parametrize("a", [SPEECH_8K, LogMel(16_000, 256, 128, 20, 0.0, 8_000.0, 1e-4, 1.0)])
def test_log_mel_is_its_formula(a):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 1_500).astype(np.float32)
    np.testing.assert_allclose(a.log_mel(wave), plain_log_mel(wave, a), atol=2e-4)


@pytest.mark.parametrize("frequency", [200, 700, 1_000, 2_300, 3_600])
def test_a_tone_peaks_in_its_band(frequency):
    a = SPEECH_8K
    centres = slaney_inverse(np.linspace(slaney(a.fmin), slaney(a.fmax), a.mels + 2))[1:-1]
    mel = a.log_mel(tone(frequency))
    assert set(mel[2:-2].argmax(axis=1)) == {np.abs(centres - frequency).argmin()}
    louder = a.log_mel(2 * tone(frequency))
    audible = mel > a.low + 1e-3
    np.testing.assert_allclose((louder - mel)[audible], np.log(2), atol=1e-3)


def test_a_click_falls_into_the_frame_of_its_sample():
    a = SPEECH_8K
    for place in (1_000, 2_000, 3_333):
        wave = np.zeros(4_000, np.float32)
        wave[place] = 0.9
        energy = np.exp(a.log_mel(wave)).sum(axis=1)
        assert energy.argmax() == place // a.hop


def test_frames_of_any_length():
    a = SPEECH_8K
    for samples in (1, 2, 95, 96, 191, 192, 1_000):
        mel = a.log_mel(np.full(samples, 0.1, np.float32))
        assert mel.shape == (max(1, samples // 96), 40) == (a.frames(samples), 40)
        assert np.isfinite(mel).all()


def test_normalisation():
    for a in (SPEECH_8K, SPEECH_22K):
        assert a.normalise(np.log(a.floor)) == -1 and a.normalise(a.ceiling) == pytest.approx(1)
        values = np.linspace(a.low, a.ceiling + 1, 50)
        np.testing.assert_allclose(a.denormalise(a.normalise(values)), values, atol=1e-5)
        assert a.denormalise(-3.0) == pytest.approx(a.low)


def test_griffin_lim_returns_the_spectrogram():
    a = SPEECH_8K
    time = np.arange(4_800) / 8_000
    phase = 2 * np.pi * (120 * time + 40 * time**2)
    wave = sum(np.cos(k * phase) / k for k in range(1, 20)) * 0.2 * (time < 0.5)
    mel = a.log_mel(wave)
    again = a.to_wave(mel)
    assert again.shape == (len(mel) * a.hop,) and again.dtype == np.float32
    error = np.abs(a.log_mel(again) - mel).mean()
    assert error < 0.2  # measured 0.08 nats; white noise of the same level: above 1
    few = np.abs(a.log_mel(a.to_wave(mel, iterations=1)) - mel).mean()
    assert few > 1.3 * error
    np.testing.assert_array_equal(again, a.to_wave(mel))


def test_griffin_lim_keeps_the_place_of_a_sound():
    a, time = SPEECH_8K, np.arange(4_800)
    late = []
    for place in (2_000, 2_030, 2_060, 2_480):
        burst = np.exp(-0.5 * ((time - place) / 150) ** 2) * np.sin(0.8 * time)
        again = a.to_wave(a.log_mel(burst)) ** 2
        late.append((again * time[: len(again)]).sum() / again.sum() - place)
    # half a hop is 48 samples
    assert np.abs(np.mean(late)) < 16 and np.abs(late).max() < 40


def test_griffin_lim_of_silence_and_of_few_frames():
    a = SPEECH_8K
    assert not a.to_wave(np.full((5, 40), a.low)).any()
    for frames in (1, 2, 3):
        assert np.isfinite(a.to_wave(np.full((frames, 40), -2.0))).all()


@pytest.mark.parametrize(
    ("log_mel", "options", "message"),
    [
        (np.zeros((4, 39)), {}, r"\[T, 40\]"),
        (np.zeros((0, 40)), {}, r"\[T, 40\]"),
        (np.full((4, 40), np.nan), {}, "finite"),
        (np.zeros((4, 40)), {"iterations": 0}, "iterations=0"),
    ],
)
def test_griffin_lim_refuses(log_mel, options, message):
    with pytest.raises(ValueError, match=message):
        SPEECH_8K.to_wave(log_mel, **options)


def test_features_survive_json():
    for a in (SPEECH_8K, SPEECH_22K):
        assert LogMel.from_json(json.loads(json.dumps(a.to_json()))) == a
    assert SPEECH_8K.replace({"hop": 64}).hop == 64
    assert SPEECH_22K == LogMel(22_050, 1_024, 256, 80, 0.0, 8_000.0, 1e-5, 2.0)  # HiFi-GAN's


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hops": 3}, "no field 'hops'"),
        ({"mels": 0}, "mels=0"),
        ({"hop": 97}, "even"),
        ({"hop": 200}, "n_fft / 2"),
        ({"fmax": 4_001.0}, "fmin < fmax <= 4000"),
        ({"fmin": 4_000.0}, "fmin < fmax"),
        ({"floor": 0.0}, "floor=0.0"),
        ({"ceiling": -9.0}, "ceiling=-9.0"),
    ],
)
def test_features_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        SPEECH_8K.replace(changes)


@pytest.mark.filterwarnings("ignore:Empty filters")
def test_more_bands_than_the_window_tells_apart():
    with pytest.raises(ValueError, match=r"mels=300 is too many for n_fft=384"):
        SPEECH_8K.replace({"mels": 300}).log_mel(tone(440))


@pytest.mark.parametrize("wave", [np.zeros((2, 3)), np.zeros(0), np.array([0.0, np.inf])])
def test_not_a_wave(wave):
    with pytest.raises(ValueError, match="a wave"):
        SPEECH_8K.log_mel(wave)


def test_trim_and_peak():
    wave = np.concatenate([np.zeros(2_000), tone(500), np.zeros(3_000)]).astype(np.float32)
    kept = audio.trim(wave, SPEECH_8K, 30.0)
    assert 4_000 <= len(kept) <= 4_000 + 4 * 384
    assert audio.trim(wave, SPEECH_8K, None) is wave
    assert np.abs(audio.scale_peak(kept, 0.9)).max() == pytest.approx(0.9)
    assert not audio.scale_peak(np.zeros(5, np.float32), 0.9).any()
    for call in (lambda: audio.trim(wave, SPEECH_8K, 0), lambda: audio.scale_peak(wave, 1.5)):
        with pytest.raises(ValueError, match=r"trim_db=0|peak=1\.5"):
            call()


def test_wav_files_round_trip(tmp_path):
    wave = tone(440, level=0.8)
    path = audio.write_wav(tmp_path / "new" / "a.wav", wave, 8_000)
    np.testing.assert_allclose(audio.read_wav(path, 8_000), wave, atol=0.6 / 32_768)
    assert audio.wav_samples(path, 8_000) == len(wave)
    audio.write_wav(path, 2 * wave, 8_000)
    assert np.abs(audio.read_wav(path, 8_000)).max() <= 1.0
    assert [p.name for p in path.parent.iterdir()] == ["a.wav"]


def test_channels_are_averaged_and_rates_brought_to_one(tmp_path):
    stereo = np.stack([tone(440), -0.5 * tone(440)], axis=1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 8_000, subtype="FLOAT")
    np.testing.assert_allclose(
        audio.read_wav(tmp_path / "stereo.wav", 8_000), tone(440) / 4, atol=1e-6
    )
    soundfile.write(tmp_path / "fast.wav", tone(1_000, rate=22_050), 22_050, subtype="FLOAT")
    slow = audio.read_wav(tmp_path / "fast.wav", 8_000)
    assert len(slow) == audio.wav_samples(tmp_path / "fast.wav", 8_000)
    middle = slice(500, 3_500)
    np.testing.assert_allclose(slow[middle], tone(1_000)[middle], atol=5e-3)


def broken_files(folder):
    """name -> message of files that must be refused."""
    good = audio.write_wav(folder / "good.wav", tone(440), 8_000).read_bytes()
    (folder / "noise.wav").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.wav").write_bytes(b"")
    (folder / "cut.wav").write_bytes(good[:5_000])
    (folder / "head.wav").write_bytes(good[:20])
    audio.write_wav(folder / "long.wav", np.zeros(8_000), 8)
    soundfile.write(folder / "flac.wav", tone(440), 8_000, format="FLAC")
    soundfile.write(folder / "nan.wav", np.full(100, np.nan), 8_000, subtype="FLOAT")
    (folder / "none.wav").write_bytes(good[:40] + bytes(4))
    return {
        "noise.wav": "not a readable wav",
        "empty.wav": "not a readable wav",
        "cut.wav": "cut off: 5000 of 8044 bytes",
        "head.wav": "wav",
        "long.wav": "1000 seconds",
        "flac.wav": "not a wav file",
        "nan.wav": "not finite",
        "none.wav": "cut off|no samples|not a readable",
        "missing.wav": "not a file",
    }


def test_files_of_strangers(tmp_path):
    for name, message in broken_files(tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            audio.read_wav(tmp_path / name, 8_000)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa", None)
    with pytest.raises(ImportError, match="pip install librosa soundfile"):
        SPEECH_8K.log_mel(tone(440))
