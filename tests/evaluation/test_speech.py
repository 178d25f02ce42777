"""Distances of spectrograms against closed forms and a plain dynamic program."""

import numpy as np
import pytest

librosa = pytest.importorskip("librosa")

from diffusion_jax import data, evaluation
from diffusion_jax.data.audio import SPEECH_8K, read_wav
from diffusion_jax.evaluation import speech

A = SPEECH_8K


def points_of(log_mel, frames=24):
    """[n, M] -> normalised [frames, M], silence beyond."""
    out = np.full((frames, A.mels), -1.0, np.float32)
    out[: len(log_mel)] = A.normalise(log_mel)
    return out


@pytest.fixture(scope="module")
def speeches():
    return data.formants(train_count=120, test_count=60, max_frames=48)


def test_valid_frames():
    points = np.full((4, 6, 3), -1.0)
    points[0, 2, 1] = -0.9
    points[1, 5] = 0.5
    points[2, :4] = 0.1
    points[2, 1] = -1.0
    assert speech.valid_frames(points).tolist() == [3, 6, 4, 1]


def test_cepstra_rebuild_the_spectrum():
    x = np.random.default_rng(0).normal(size=(5, 40))
    c = speech.cepstra(x, 40)
    m = np.arange(40) + 0.5
    rebuilt = c[:, :1] + 2 * sum(c[:, k, None] * np.cos(np.pi * k * m / 40) for k in range(1, 40))
    np.testing.assert_allclose(rebuilt, x, atol=1e-12)
    with pytest.raises(ValueError, match=r"count=41 must be in 1..40"):
        speech.cepstra(x, 41)


def test_distances_of_known_differences():
    truth = np.random.default_rng(1).uniform(-5, 0, (12, 40))
    ripple = np.cos(np.pi * 3 * (np.arange(40) + 0.5) / 40)
    cases = {
        "same": (truth, (0, 0, 0)),
        "louder": (truth + 0.4, (0.4, 0.4, 0)),
        # c_3 changes by a half of the amplitude
        "rippled": (
            truth + 0.3 * ripple,
            (0.3 * np.abs(ripple).mean(), 0.3 / np.sqrt(2), 10 / np.log(10) * np.sqrt(2) * 0.15),
        ),
    }
    for name, (mel, (l1, l2, mcd)) in cases.items():
        got = speech.mel_distances(points_of(mel)[None], points_of(truth)[None], A)
        assert got["mel_l1"] == pytest.approx(l1, abs=1e-4), name
        assert got["mel_l2"] == pytest.approx(l2, abs=1e-4), name
        assert got["mcd"] == pytest.approx(mcd, abs=1e-3), name
        assert got["frames_error"] == 0


def test_another_tempo_is_no_distortion():
    truth = np.random.default_rng(2).uniform(-5, 0, (8, 40))
    slow = np.repeat(truth, 2, axis=0)
    got = speech.mel_distances(points_of(slow)[None], points_of(truth)[None], A.to_json())
    assert got["mcd"] == pytest.approx(0, abs=1e-4) and got["frames_error"] == 1
    assert got["mel_l1"] > 0.5


def plain_distortion(a, b):
    """Dynamic time warping written out; mean over the path of least total."""
    cost = 10 / np.log(10) * np.sqrt(2 * ((a[:, None] - b[None]) ** 2).sum(-1))
    total = np.full((len(a) + 1, len(b) + 1), np.inf)
    total[0, 0] = 0
    came = {}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            came[i, j] = min([(i - 1, j - 1), (i, j - 1), (i - 1, j)], key=lambda p: total[p])
            total[i, j] = cost[i - 1, j - 1] + total[came[i, j]]
    steps, at = 0, (len(a), len(b))
    while at != (0, 0):
        steps, at = steps + 1, came[at]
    return total[-1, -1] / steps


def test_distortion_along_the_warping_path():
    rng = np.random.default_rng(3)
    for n, m in ((5, 9), (11, 4), (1, 3), (7, 7)):
        a, b = rng.normal(size=(n, 40)), rng.normal(size=(m, 40))
        expected = plain_distortion(*(speech.cepstra(x)[:, 1:] for x in (a, b)))
        assert speech.cepstral_distortion(a, b) == pytest.approx(expected, rel=1e-9)


def test_missing_frames_are_silence_and_extra_ones_no_matter():
    truth = np.full((10, 40), -2.0)
    got = speech.mel_distances(points_of(truth[:5])[None], points_of(truth)[None], A)
    assert got["mel_l1"] == pytest.approx((-2.0 - A.low) / 2, rel=1e-5)
    assert got["frames_error"] == 0.5
    longer = points_of(np.full((14, 40), -2.0))[None]
    got = speech.mel_distances(longer, points_of(truth)[None], A)
    assert got["mel_l1"] == pytest.approx(0, abs=1e-6) and got["frames_error"] == 0.4
    # frames beyond the stated number do not count, whatever stands there
    junk = points_of(truth)[None].copy()
    junk[:, 5:] = 0.7
    cut = speech.mel_distances(junk, points_of(truth)[None], A, frames=np.array([5]))
    assert cut["mel_l1"] == pytest.approx((-2.0 - A.low) / 2, rel=1e-5)


def test_recordings_of_one_word_are_closer_than_of_two(speeches):
    got = speeches.take([3, 53, 7])
    close = speech.mel_distances(got["points"][:1], got["points"][1:2], A)["mcd"]
    far = speech.mel_distances(got["points"][:1], got["points"][2:], A)["mcd"]
    assert close < 0.6 * far


def test_utterance_distance_sees_blur_and_noise(speeches):
    train, points = (speeches.take(np.arange(*span)) for span in ((0, 60), (60, 120)))
    reference = speech.utterance_features(train["points"], A, train["frames"])
    assert reference.shape == (60, 39)

    def distance(values):
        features = speech.utterance_features(values, A, points["frames"])
        return speech.utterance_frechet(features, reference)

    assert speech.utterance_frechet(reference, reference) == pytest.approx(0, abs=1e-6)
    real = distance(points["points"])
    inside = np.arange(48)[:, None] < points["frames"][:, None, None]
    padded = np.pad(points["points"], ((0, 0), (3, 3), (0, 0)), mode="edge")
    blurred = np.mean([padded[:, i : i + 48] for i in range(7)], axis=0)
    noise = np.random.default_rng(0).normal(size=blurred.shape)
    assert distance(np.where(inside, blurred, -1)) > 3 * real
    assert distance(np.where(inside, points["points"] + 0.3 * noise, -1)) > 3 * real


def test_pictures(speeches):
    got = speeches.take([0, 1, 2])
    shown = speech.mel_images(got["points"])
    assert shown.shape == (3, 40, 48, 3) and -1 <= shown.min() and shown.max() <= 1
    assert shown[0, :, 47].mean() < -0.95  # silence beyond the utterance is dark
    low_then_high = np.full((10, 40), -1.0)
    low_then_high[:5, 0] = low_then_high[5:, 39] = 1.0
    bright = speech.mel_images(low_then_high).mean(-1) > 0
    assert bright.sum() == 10 and bright[39, :5].all() and bright[0, 5:].all()
    assert np.isnan(speech.mel_images(np.full((4, 3), np.nan))).all()
    names = speech.captions(speeches.spec, got)
    assert names == ["zero, speaker 0", "one, speaker 0", "two, speaker 0"]
    grid = speech.spectrogram_grid({"truth": got["points"], "4": got["points"]}, names, columns=2)
    assert grid.dtype == np.uint8 and grid.ndim == 3
    one = speech.spectrogram_grid({"truth": got["points"][:2]}, names[:2], columns=2)
    assert grid.shape[0] > 2 * one.shape[0]
    with pytest.raises(ValueError, match="as many titles"):
        speech.spectrogram_grid({"truth": got["points"]}, names[:2])


def test_captions_without_labels(speeches):
    batch = {k: v for k, v in speeches.take([7]).items() if k != "label"}
    assert speech.captions(speeches.spec, batch) == ["S EH V AH N, speaker 0"]


def test_wav_files_sound_like_their_spectrograms(speeches, tmp_path):
    got = speeches.take([0, 7])
    names = speech.captions(speeches.spec, got)
    paths = speech.write_waves(tmp_path / "new", got["points"], speeches.spec.audio, names)
    assert [p.name for p in paths] == ["000_zero_speaker_0.wav", "001_seven_speaker_0.wav"]
    for path, points, frames in zip(paths, got["points"], got["frames"]):
        wave = read_wav(path, 8_000)
        assert len(wave) == A.hop * speech.valid_frames(points[None])[0] <= A.hop * frames
        assert np.abs(wave).max() == pytest.approx(0.95, abs=1e-3)
        mel, truth = A.log_mel(wave), A.denormalise(points)[: len(wave) // A.hop]
        offset = np.median((mel - truth)[truth > -3])  # the file is scaled to its peak
        assert np.abs(mel - truth - offset)[truth > -5].mean() < 0.25
    with pytest.raises(ValueError, match="expected 2 titles, got 1"):
        speech.write_waves(tmp_path, got["points"], A, names[:1])


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (np.zeros((2, 24, 39)), {}, r"\[N, T, 40\]"),
        (np.zeros((2, 20, 40)), {}, "differ in shape"),
        (np.full((2, 24, 40), np.nan), {}, "2 of 2 spectrograms hold NaN"),
        (np.zeros((2, 24, 40)), {"frames": [1, 25]}, r"frames must be 2 integers in 1..24"),
        (np.zeros((2, 24, 40)), {"truth_frames": [1.0, 2.0]}, "frames must be 2 integers"),
    ],
)
def test_refusals(points, options, message):
    with pytest.raises(ValueError, match=message):
        speech.mel_distances(points, np.zeros((2, 24, 40)), A, **options)


def test_names_are_public():
    assert evaluation.mel_distances is speech.mel_distances
