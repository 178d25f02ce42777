"""Recorded speech: the spoken digits and the layout of LJ Speech, on wav files that the tests write."""

import json

import numpy as np
import pytest

pytest.importorskip("librosa")
soundfile = pytest.importorskip("soundfile")

from diffusion_jax import data
from diffusion_jax.data import DataSpec, Pipeline, transcripts
from diffusion_jax.data.audio import SPEECH_8K, SPEECH_22K, write_wav

WORDS = {0: "Z IH R OW", 1: "W AH N", 7: "S EH V AH N", 8: "EY T"}


def note(frequency, samples, rate=8_000, level=0.5):
    """A note without quiet ends, so that trimming leaves it whole."""
    return (level * np.cos(2 * np.pi * frequency * np.arange(samples) / rate)).astype(np.float32)


def wave_of(digit, speaker, take):
    return note(300 + 100 * digit + 20 * speaker, 1_920 + 96 * take)


@pytest.fixture
def recordings(tmp_path):
    """Digits 0, 1, 7 and 8 of two speakers, takes 0, 4, 5 and 12."""
    folder = tmp_path / "fsdd" / "recordings"
    for digit in WORDS:
        for number, speaker in enumerate(("ann", "bob")):
            for take in (0, 4, 5, 12):
                wave = wave_of(digit, number, take)
                write_wav(folder / f"{digit}_{speaker}_{take}.wav", wave, 8_000)
    return tmp_path / "fsdd"


def everything(source):
    return source.take(np.arange(len(source)))


def test_spoken_digits_from_a_folder(recordings):
    train, test = (data.spoken_digits(recordings, split=s) for s in ("train", "test"))
    assert (len(train), len(test)) == (16, 16) and train.spec == test.spec
    assert len(data.spoken_digits(recordings, split="all")) == 32
    got = everything(train)
    assert got["label"].tolist() == sorted([*WORDS] * 4)
    assert got["speaker"].reshape(4, 4).tolist() == [[0, 0, 1, 1]] * 4
    # takes 12 and 5, in the order of the files' names
    assert got["frames"].reshape(8, 2).tolist() == [[32, 25]] * 8
    symbols = np.array(train.spec.symbols)
    assert symbols[0] == "" and train.spec.sizes == {"text": 20, "speaker": 2}
    for text, length, label in zip(got["text"], got["text_length"], got["label"]):
        assert " ".join(symbols[text[:length]]) == WORDS[int(label)]
        assert not text[length:].any() and text[:length].all()
    assert train.spec.class_names[7] == "seven"
    assert got["points"].shape == (16, 64, 40) and got["points"].dtype == np.float32
    for points, frames in zip(got["points"], got["frames"]):
        assert (points[frames:] == -1).all() and (points[:frames].max(axis=1) > 0).all()
    wave = train.wave(3)
    np.testing.assert_allclose(np.abs(wave).max(), 0.95, atol=1e-3)
    mel = SPEECH_8K.normalise(SPEECH_8K.log_mel(wave))
    np.testing.assert_array_equal(got["points"][3, : len(mel)], mel)


def test_an_npz_file_holds_the_same(recordings, tmp_path):
    arrays = {}
    for part, takes in (("train", (12, 5)), ("test", (0, 4))):
        names = [(d, s, t) for d in WORDS for s in (0, 1) for t in takes]
        waves = [np.round(wave_of(*name) * 32_768).astype(np.int16) for name in names]
        arrays |= {
            f"{part}_wave": np.concatenate(waves),
            f"{part}_offsets": np.cumsum([0, *map(len, waves)]).astype(np.int32),
            f"{part}_digit": np.array([d for d, _, _ in names], np.uint8),
            f"{part}_speaker": np.array([("ann", "bob")[s] for _, s, _ in names]),
        }
    (tmp_path / "packed").mkdir()
    np.savez(tmp_path / "packed" / "fsdd.npz", **arrays)
    for split in ("train", "test"):
        a = data.spoken_digits(recordings, split=split)
        for root in (tmp_path / "packed", tmp_path / "packed" / "fsdd.npz"):
            b = data.spoken_digits(root, split=split)
            assert a.spec == b.spec
            for name, values in everything(a).items():
                np.testing.assert_allclose(everything(b)[name], values, atol=1e-4, err_msg=name)

    def refuse(message, **changes):
        kept = {k: v for k, v in (arrays | changes).items() if v is not None}
        np.savez(tmp_path / "bad.npz", **kept)
        with pytest.raises(ValueError, match=message) as caught:
            data.spoken_digits(tmp_path / "bad.npz")
        assert "bad.npz" in str(caught.value)

    offsets = arrays["train_offsets"]
    refuse("no array 'test_digit'", test_digit=None)
    refuse("do not fit", train_offsets=offsets[:-1])
    refuse("do not fit", train_offsets=offsets[::-1])
    refuse("do not fit", train_wave=arrays["train_wave"].astype(np.float32))
    refuse("do not fit", train_digit=arrays["train_digit"] + 10)
    refuse("do not fit", train_speaker=arrays["train_speaker"][1:])
    refuse("Python objects", train_speaker=arrays["train_speaker"].astype(object))
    (tmp_path / "bad.npz").write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match="not a readable"):
        data.spoken_digits(tmp_path / "bad.npz")


def test_longer_recordings(recordings):
    dropped = data.spoken_digits(recordings, max_frames=28)
    assert set(everything(dropped)["frames"]) == {25} and len(dropped) == 8
    cropped = data.spoken_digits(recordings, max_frames=28, longer="crop")
    assert sorted(set(everything(cropped)["frames"])) == [25, 28] and len(cropped) == 16
    with pytest.raises(ValueError, match="no utterance of 10 frames"):
        data.spoken_digits(recordings, max_frames=10)


def test_silence_is_trimmed_and_loudness_equal(tmp_path):
    plain = note(500, 1_920)
    quiet = np.concatenate([np.zeros(3_000), 0.05 * plain, np.zeros(3_000)])
    write_wav(tmp_path / "1_ann_5.wav", plain, 8_000)
    write_wav(tmp_path / "1_ann_6.wav", quiet, 8_000)
    points, frames = (everything(data.spoken_digits(tmp_path))[k] for k in ("points", "frames"))
    assert frames[0] == 20 and 20 <= frames[1] <= 28
    loud = [p[p.max(axis=1) > 0.3] for p in points]
    np.testing.assert_allclose(loud[0].max(), loud[1].max(), atol=0.02)
    untouched = data.spoken_digits(tmp_path, trim_db=None, peak=None, max_frames=96)
    assert everything(untouched)["frames"].tolist() == [20, 82]
    assert np.abs(untouched.wave(1)).max() == pytest.approx(0.025, abs=1e-4)


def test_another_sample_rate_is_resampled(tmp_path):
    write_wav(tmp_path / "a" / "1_ann_5.wav", note(1_000, 4_000), 8_000)
    write_wav(tmp_path / "b" / "1_ann_5.wav", note(1_000, 11_025, rate=22_050), 22_050)
    a, b = (data.spoken_digits(tmp_path / folder)[0] for folder in "ab")
    assert a["frames"] == b["frames"] == 41
    inside = slice(3, 38)
    audible = a["points"][inside] > -0.5
    assert audible.sum() > 60
    gap = np.abs(a["points"] - b["points"])[inside][audible]
    assert gap.max() < 0.02


def test_root_from_the_environment(recordings, monkeypatch):
    monkeypatch.delenv("DIFFUSION_JAX_DATA", raising=False)
    for build in (data.spoken_digits, data.ljspeech):
        with pytest.raises(ValueError, match=r"needs root=.*DIFFUSION_JAX_DATA"):
            build()
    monkeypatch.setenv("DIFFUSION_JAX_DATA", str(recordings.parent))
    with pytest.raises(ValueError, match=r"spoken_digits' does not exist; .*spoken digit dataset"):
        data.spoken_digits()
    recordings.rename(recordings.parent / "spoken_digits")
    assert len(data.spoken_digits()) == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, "unknown split 'valid'"),
        ({"longer": "cut"}, "unknown longer 'cut'; valid: drop, crop"),
        ({"max_frames": 0}, "max_frames=0"),
        ({"audio": {"hops": 3}}, "no field 'hops'"),
        ({"trim_db": -1}, "trim_db=-1"),
        ({"peak": 2}, "peak=2"),
    ],
)
def test_options_are_checked(recordings, options, message):
    with pytest.raises(ValueError, match=message):
        data.spoken_digits(recordings, **options)


def test_folders_of_strangers(recordings, tmp_path):
    folder = recordings / "recordings"

    def refuse(message, path):
        with pytest.raises(ValueError, match=message) as caught:
            data.spoken_digits(recordings)
        assert path.name in str(caught.value)
        path.unlink()

    for name in ("seven_ann_5.wav", "7_ann.wav", "77_ann_5.wav", "7_ann_x.wav"):
        (folder / name).write_bytes(b"")
        refuse("not named digit_speaker_take", folder / name)
    (folder / "7_ann_9.wav").write_bytes(b"RIFF and nothing more")
    refuse("not a readable wav", folder / "7_ann_9.wav")
    content = (folder / "7_ann_5.wav").read_bytes()
    (folder / "7_ann_9.wav").write_bytes(content[: len(content) // 2])
    refuse("cut off", folder / "7_ann_9.wav")
    write_wav(tmp_path / "elsewhere.wav", note(300, 999), 8_000)
    (folder / "7_ann_9.wav").symlink_to(tmp_path / "elsewhere.wav")
    refuse("leads out of", folder / "7_ann_9.wav")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="holds no wav files"):
        data.spoken_digits(tmp_path / "nothing")


def test_batches_are_a_function_of_seed_and_step(recordings):
    def batch(step):
        return Pipeline(data.spoken_digits(recordings), 5, seed=3).batch(step)

    walk = dict(Pipeline(data.spoken_digits(recordings), 5, seed=3).iterate(0, 4, workers=3))
    for step in (0, 3):
        for name, values in batch(step).items():
            np.testing.assert_array_equal(values, walk[step][name], err_msg=name)
    halves = [
        Pipeline(data.spoken_digits(recordings), 6, seed=3, host=(h, 2)).batch(1) for h in (0, 1)
    ]
    whole = Pipeline(data.spoken_digits(recordings), 6, seed=3).batch(1)
    for name, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([h[name] for h in halves]), values)


def test_spec_survives_json_and_shows_spectrograms(recordings):
    source = data.spoken_digits(recordings)
    spec = DataSpec.from_json(json.loads(json.dumps(source.spec.to_json())))
    assert spec == source.spec
    shown = spec.decode(source[0]["points"])
    assert shown.shape == (40, 64, 1) and shown.dtype == np.uint8
    # digit 0 is a note of 300 Hz: loud at the bottom, silent beyond its frames
    assert shown[-12:, 10].max() > 200 and shown[:12, 10].max() < 60 and not shown[:, 40:].any()
    fields = source.spec.to_json()
    for changes, message in (
        ({"audio": None}, "needs audio"),
        ({"sizes": {"words": 3}}, "'words', which is no element"),
    ):
        with pytest.raises(ValueError, match=message):
            DataSpec.from_json(fields | changes)


def test_run_folders_of_older_versions_are_read():
    fields = data.digits().spec.to_json()
    for name in ("sizes", "audio"):
        del fields[name]
    assert DataSpec.from_json(fields) == data.digits().spec
    with pytest.raises(ValueError, match="fields"):
        DataSpec.from_json({k: v for k, v in fields.items() if k != "show"})


SENTENCES = {
    "LJ001-0001": ("Dr. Smith paid £2.", "Doctor Smith paid two pounds."),
    "LJ001-0002": ("Hello, world!", "Hello, world!"),
    "LJ002-0001": ("Café — “late”", "Café — “late”"),
    "LJ002-0002": ("Hello", "Hello"),
}


@pytest.fixture
def lj(tmp_path):
    root = tmp_path / "LJSpeech-1.1"
    for number, name in enumerate(SENTENCES):
        write_wav(root / "wavs" / f"{name}.wav", note(440, 5_120 + 2_560 * number, 22_050), 22_050)
    write_metadata(root, SENTENCES)
    return root


def write_metadata(root, sentences):
    lines = ["|".join((name, *texts)) for name, texts in sentences.items()]
    (root / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def spoken(source):
    symbols = np.array(source.spec.symbols)
    got = everything(source)
    return ["".join(symbols[t[:n]]) for t, n in zip(got["text"], got["text_length"])]


def test_ljspeech_characters(lj):
    source = data.ljspeech(lj, split="all", max_frames=64)
    assert spoken(source) == [
        "doctor smith paid two pounds.",
        "hello, world!",
        'cafe - "late"',
        "hello",
    ]
    got = everything(source)
    assert got["frames"].tolist() == [20, 30, 40, 50] and "label" not in got
    assert got["points"].shape == (4, 64, 80) and source.spec.audio == SPEECH_22K.to_json()
    assert got["text"].shape == (4, 29) and source.spec.sizes["speaker"] == 1
    assert source.spec.sizes["text"] == len(source.spec.symbols) == len(set(source.spec.symbols))
    mel = SPEECH_22K.normalise(SPEECH_22K.log_mel(source.wave(2)))
    np.testing.assert_array_equal(got["points"][2, :40], mel)


def test_ljspeech_phonemes_and_blanks(lj, tmp_path):
    lexicon = tmp_path / "lexicon"
    lexicon.write_text(
        ";;; comment\nHELLO  HH AH0 L OW1\nHELLO(1)  HH EH0 L OW1\nWORLD W ER1 L D # place\n"
    )
    source = data.ljspeech(lj, split="all", units="phonemes", lexicon=lexicon, max_frames=64)
    assert spoken(source)[1] == "HHAHLOW, WERLD!" and spoken(source)[3] == "HHAHLOW"
    assert spoken(source)[0] == "doctor smith paid two pounds."
    assert source[1]["text_length"] == 4 + 2 + 4 + 1
    blank = data.ljspeech(lj, split="all", blank=True, max_frames=64)
    got = blank[3]
    assert got["text_length"] == 11
    assert [blank.spec.symbols[i] for i in got["text"][:11]][:4] == ["<blank>", "h", "<blank>", "e"]
    assert blank.spec.symbols[-1] == "<blank>"
    assert blank.spec.sizes["text"] == len(blank.spec.symbols)


def test_ljspeech_parts(lj, tmp_path):
    train, test = (
        data.ljspeech(lj, split=s, test_fraction=0.5, max_frames=64) for s in ("train", "test")
    )
    assert train.spec == test.spec
    assert sorted(spoken(train) + spoken(test)) == sorted(spoken(data.ljspeech(lj, split="all")))
    chosen = tmp_path / "test.txt"
    chosen.write_text("DUMMY/LJ002-0001.wav|whatever\nLJ001-0002\n\n")
    options = {"test_list": chosen, "max_frames": 64}
    assert spoken(data.ljspeech(lj, split="test", **options)) == ["hello, world!", 'cafe - "late"']
    assert len(data.ljspeech(lj, split="train", **options)) == 2
    assert len(data.ljspeech(lj, split="all", **options)) == 4
    chosen.write_text("LJ999-0001\n")
    with pytest.raises(ValueError, match="'LJ999-0001' is not in"):
        data.ljspeech(lj, **options)
    short = data.ljspeech(lj, split="all", max_frames=32)
    assert everything(short)["frames"].tolist() == [20, 30]
    crop = data.ljspeech(lj, split="all", max_frames=32, longer="crop")
    assert everything(crop)["frames"].tolist() == [20, 30, 32, 32]


def test_unpaired_and_malformed_transcripts(lj):
    def refuse(message, sentences=None):
        if sentences is not None:
            write_metadata(lj, sentences)
        with pytest.raises(ValueError, match=message):
            data.ljspeech(lj)

    refuse("'LJ002-0002' has no line in metadata.csv", dict(list(SENTENCES.items())[:3]))
    refuse("'LJ003-0001' has no wav file", SENTENCES | {"LJ003-0001": ("a", "a")})
    refuse("line 5: '../secret|a' is not id|text|text", SENTENCES | {"../secret": ("a",)})
    refuse("line 5: 'LJ003-0001' is not id", SENTENCES | {"LJ003-0001": ()})
    path = lj / "metadata.csv"
    path.write_bytes(b"LJ001-0001|caf\xe9|caf\xe9\n")
    refuse("not UTF-8")
    path.write_text("LJ001-0001|a|a\nLJ001-0001|b|b\n")
    refuse("line 2: 'LJ001-0001' occurs twice")
    path.write_text("\n")
    refuse("holds no lines")
    path.unlink()
    refuse("metadata.csv' is not a file")


def test_ljspeech_finds_broken_recordings(lj):
    path = lj / "wavs" / "LJ001-0002.wav"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"LJ001-0002.wav' is cut off"):
        data.ljspeech(lj, split="all")
    path.write_bytes(content)
    source = data.ljspeech(lj, split="all", max_frames=64)
    path.write_bytes(b"gone bad later")
    with pytest.raises(ValueError, match="LJ001-0002"):
        source.take([0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"units": "words"}, "unknown units 'words'; valid: characters, phonemes"),
        ({"units": "phonemes"}, "phonemes need a lexicon"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
        ({"max_frames": 5}, "no utterance of 5 frames"),
    ],
)
def test_ljspeech_options(lj, options, message):
    with pytest.raises(ValueError, match=message):
        data.ljspeech(lj, **options)


def test_words_end_at_quotes_but_not_at_apostrophes():
    lexicon = {"hello": ("HH", "AH", "L", "OW"), "don't": ("D", "OW", "N", "T")}
    assert transcripts.phonemes("'hello', don't", lexicon) == [
        *["'", "HH", "AH", "L", "OW", "'", ",", " "],
        *["D", "OW", "N", "T"],
    ]


@pytest.mark.parametrize(
    ("content", "message"), [("HELLO\n", "line 1: 'HELLO' names no"), (";;; \n", "holds no words")]
)
def test_broken_lexicons(lj, tmp_path, content, message):
    (tmp_path / "lexicon").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.ljspeech(lj, units="phonemes", lexicon=tmp_path / "lexicon")
