"""Recorded speech with its text: the free spoken digits, and the LJ Speech layout.

Every source of speech (the procedural `formants` too) yields
  "points"       float32 [T, M]  normalised log-mel (`audio.LogMel`), -1 beyond the utterance
  "frames"       int32 []        frames that belong to it, 1..T
  "text"         int32 [L]       symbol ids from 1 on, 0 beyond the text; `spec.symbols` names them
  "text_length"  int32 []        symbols that belong to it, 1..L
  "speaker"      int32 []        0..spec.sizes["speaker"]-1
  "label"        int32 []        the digit, where there is one
with `spec.sizes["text"]` ids (padding included) and `spec.audio` the fields of the `LogMel`.

Nothing is ever downloaded: the message of a missing folder says what to put where.
"""

import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_jax.data import audio as sound
from diffusion_jax.data import transcripts
from diffusion_jax.data.arrays import load_npz
from diffusion_jax.data.source import (
    DataSpec,
    Element,
    RowCache,
    Source,
    check_fraction,
    check_split,
    split_rows,
)
from diffusion_jax.registry import register

LONGER = ("drop", "crop")
UNITS = ("characters", "phonemes")

_DIGIT_FILE = re.compile(r"(?P<digit>\d)_(?P<speaker>[A-Za-z][\w-]*)_(?P<take>\d+)\.wav")
_IDENTIFIER = re.compile(r"[A-Za-z0-9][\w.-]*")
_TEST_TAKES = 5
_ENVIRONMENT = "DIFFUSION_JAX_DATA"


class Speech(Source):
    """Utterances whose spectrograms are computed when they are needed.

    Args:
      waves: `(row) -> float32 [N]`, prepared (trimmed, scaled).
      arrays: the other entries of the spec, [N, ...] each.
      spec: see the module; `show` is "mel".
      cache_bytes: spectrograms stay in memory when all together need no more than this.
    """

    def __init__(
        self,
        waves: Callable[[int], np.ndarray],
        arrays: Mapping[str, np.ndarray],
        spec: DataSpec,
        cache_bytes: int = 2**30,
    ) -> None:
        self.spec = spec
        self.audio = sound.LogMel.from_json(spec.audio)
        self._waves, self._arrays = waves, dict(arrays)
        held = {"points": (spec.shape, np.float32), "frames": ((), np.int32)}
        self._cache = RowCache(len(self), held, cache_bytes)

    def __len__(self) -> int:
        return len(self._arrays["text"])

    def wave(self, row: int) -> np.ndarray:
        """The recording behind an example, float32 [N] at `audio.sample_rate`."""
        return self._waves(row)

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        points = np.full((len(rows), *self.spec.shape), -1.0, np.float32)
        frames = np.zeros(len(rows), np.int32)
        for at, row in enumerate(rows):
            mel = self.audio.normalise(self.audio.log_mel(self.wave(int(row))))
            mel = mel[: self.spec.shape[0]]
            points[at, : len(mel)], frames[at] = mel, len(mel)
        return {"points": points, "frames": frames}

    def _take(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        if not len(rows):
            return {k: np.zeros((0, *e.shape), e.dtype) for k, e in self.spec.elements.items()}
        taken = self._cache.take(rows, self._read)
        return taken | {name: values[rows] for name, values in self._arrays.items()}


def speech_spec(
    audio: sound.LogMel,
    max_frames: int,
    text_length: int,
    symbols: tuple[str, ...],
    speakers: int,
    class_names: tuple[str, ...] | None = None,
    more: Mapping[str, Element] | None = None,
) -> DataSpec:
    """The spec of the module's text."""
    elements = {
        "points": Element((max_frames, audio.mels), "float32"),
        "frames": Element((), "int32"),
        "text": Element((text_length,), "int32"),
        "text_length": Element((), "int32"),
        "speaker": Element((), "int32"),
    }
    if class_names is not None:
        elements["label"] = Element((), "int32")
    return DataSpec(
        kind="points",
        elements=elements | dict(more or {}),
        num_classes=None if class_names is None else len(class_names),
        class_names=class_names,
        symbols=symbols,
        show="mel",
        sizes={"text": len(symbols), "speaker": speakers},
        audio=audio.to_json(),
    )


DIGIT_SYMBOLS = transcripts.symbol_table(
    phoneme for word in transcripts.DIGIT_PHONEMES.values() for phoneme in word
)


def digit_texts(labels: np.ndarray) -> dict[str, np.ndarray]:
    """The phonemes of digits [N]: {"text": int32 [N, 5], "text_length": int32 [N]}."""
    words = [transcripts.DIGIT_PHONEMES[name] for name in transcripts.DIGITS]
    ids, lengths = transcripts.encode(words, DIGIT_SYMBOLS)
    return {"text": ids[labels], "text_length": lengths[labels]}


@register("data", "spoken_digits", kinds=("points",))
def spoken_digits(
    root: str | pathlib.Path | None = None,
    *,
    split: str = "train",
    audio: Mapping[str, Any] | None = None,
    max_frames: int = 64,
    longer: str = "drop",
    trim_db: float | None = 30.0,
    peak: float | None = 0.95,
) -> Speech:
    """Spoken digits 0..9 with their phonemes (the free spoken digit dataset), 8 kHz.

    Args:
      root: a folder of wav files `digit_speaker_take.wav` (or with such a folder `recordings` in it);
        or an .npz file, or a folder with one: `train_` and `test_` arrays `wave` (int16, end to end),
        `offsets`, `digit` and `speaker`. None: the folder `spoken_digits` in `$DIFFUSION_JAX_DATA`.
      split: "train" (takes from 5 on), "test" (takes 0 to 4) or "all": the set's own division.
      audio: fields of `audio.SPEECH_8K` to change, such as {"hop": 64}.
      max_frames: T.
      longer: what becomes of longer utterances: "drop", or "crop" (the end is cut off).
      trim_db: silence at both ends is cut where it is so much quieter than the loudest window; None
        keeps it.
      peak: every recording is scaled to this largest amplitude (speakers differ twentyfold in level);
        None keeps its own.

    Raises:
      ValueError: no such folder or file (with what is needed), names of another form, a wav or npz
        file that is corrupt, an unknown option, no utterance short enough.
      ImportError: librosa or soundfile is missing.
    """
    check_split(split)
    check_frames(max_frames)
    _check_longer(longer)
    sound.libraries()
    features = sound.SPEECH_8K.replace(audio)
    place = _place(
        root,
        "spoken_digits",
        "the free spoken digit dataset (FSDD) as its wav files digit_speaker_take.wav,"
        " or as an .npz file; data 'formants' needs no files",
    )
    npz = _npz_in(place)
    read = _digits_npz(npz) if npz else _digits_folder(place, features.sample_rate)
    labels, names, is_test, waves = read
    speakers = sorted(set(names))
    rows = {"train": ~is_test, "test": is_test, "all": np.ones(len(labels), bool)}[split]
    prepared, kept = [], []
    for row in np.flatnonzero(rows):
        wave = sound.scale_peak(sound.trim(waves(row), features, trim_db), peak)
        if longer == "crop" or features.frames(len(wave)) <= max_frames:
            prepared.append(wave[: max_frames * features.hop])
            kept.append(row)
    if not kept:
        raise ValueError(
            f"split={split!r} of {str(place)!r} has no utterance of {max_frames} frames"
        )
    labels = labels[kept]
    arrays = digit_texts(labels) | {
        "speaker": np.array([speakers.index(names[row]) for row in kept], np.int32),
        "label": labels,
    }
    length = arrays["text"].shape[1]
    spec = speech_spec(
        features, max_frames, length, DIGIT_SYMBOLS, len(speakers), transcripts.DIGITS
    )
    return Speech(prepared.__getitem__, arrays, spec)


def check_frames(max_frames: int) -> None:
    """Raises ValueError unless `max_frames` is a positive integer."""
    if not isinstance(max_frames, int) or max_frames < 1:
        raise ValueError(f"max_frames={max_frames!r} must be a positive integer")


def _check_longer(longer: str) -> None:
    if longer not in LONGER:
        raise ValueError(f"unknown longer {longer!r}; valid: {', '.join(LONGER)}")


def _place(root: str | pathlib.Path | None, name: str, what: str) -> pathlib.Path:
    """The file or folder of a set. Raises ValueError with what has to be there."""
    home = os.environ.get(_ENVIRONMENT)
    if root is None and home is None:
        raise ValueError(
            f"data {name!r} needs root=..., or ${_ENVIRONMENT} with a folder {name!r}: {what}"
        )
    place = pathlib.Path(home, name) if root is None else pathlib.Path(root)
    place = place.expanduser()
    if not place.exists():
        raise ValueError(f"root={str(place)!r} does not exist; it must hold {what}")
    return place


def _npz_in(place: pathlib.Path) -> pathlib.Path | None:
    if place.is_file():
        return place
    found = sorted(place.glob("*.npz"))
    return found[0] if len(found) == 1 else None


def _digits_npz(path: pathlib.Path):
    """Labels, speakers' names, which are for testing, and `(row) -> wave`."""
    arrays = load_npz(path)
    labels, names, is_test, waves = [], [], [], []
    for part in ("train", "test"):
        try:
            wave, offsets, digit, speaker = (
                arrays[f"{part}_{name}"] for name in ("wave", "offsets", "digit", "speaker")
            )
        except KeyError as error:
            raise ValueError(
                f"{str(path)!r} has no array {error.args[0]!r}; it needs wave, offsets, digit and"
                " speaker with the prefixes train_ and test_"
            ) from error
        ordered = np.issubdtype(offsets.dtype, np.integer) and offsets.ndim == 1 and len(offsets)
        if (
            wave.dtype != np.int16
            or wave.ndim != 1
            or not ordered
            or offsets[0] != 0
            or offsets[-1] != len(wave)
            or (np.diff(offsets.astype(np.int64)) <= 0).any()
            or digit.shape != speaker.shape
            or digit.shape != (len(offsets) - 1,)
            or not np.issubdtype(digit.dtype, np.integer)
            or (digit.size and not 0 <= int(digit.min()) <= int(digit.max()) <= 9)
        ):
            raise ValueError(
                f"{str(path)!r}: the {part} arrays do not fit one another (int16 wave [S], rising"
                " offsets [N + 1] from 0 to S, digit 0..9 [N], speaker [N])"
            )
        labels.append(digit.astype(np.int32))
        names += [str(name) for name in speaker]
        is_test.append(np.full(len(digit), part == "test"))
        waves += np.split(wave, offsets[1:-1]) if len(digit) else []
    return (
        np.concatenate(labels),
        names,
        np.concatenate(is_test),
        lambda row: waves[row].astype(np.float32) / 32_768,
    )


def _digits_folder(place: pathlib.Path, sample_rate: int):
    folder = place / "recordings" if (place / "recordings").is_dir() else place
    files = _wav_files(folder)
    if not files:
        raise ValueError(f"{str(folder)!r} holds no wav files digit_speaker_take.wav")
    found = [_DIGIT_FILE.fullmatch(path.name) for path in files]
    for path, match in zip(files, found):
        if match is None:
            raise ValueError(
                f"{str(path)!r} is not named digit_speaker_take.wav, as 7_george_12.wav"
            )
    return (
        np.array([int(match["digit"]) for match in found], np.int32),
        [match["speaker"] for match in found],
        np.array([int(match["take"]) < _TEST_TAKES for match in found]),
        lambda row: sound.read_wav(files[row], sample_rate),
    )


def _wav_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """Sorted; a link that leads out of the folder is refused."""
    home = folder.resolve()
    found = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() == ".wav" and not path.name.startswith(".")
    )
    for path in found:
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise ValueError(f"{str(path)!r} is a link that leads out of {str(home)!r}")
    return found


@register("data", "ljspeech", kinds=("points",))
def ljspeech(
    root: str | pathlib.Path | None = None,
    *,
    split: str = "train",
    units: str = "characters",
    lexicon: str | pathlib.Path | None = None,
    blank: bool = False,
    audio: Mapping[str, Any] | None = None,
    max_frames: int = 896,
    longer: str = "drop",
    test_fraction: float = 0.04,
    test_list: str | pathlib.Path | None = None,
    cache_bytes: int = 2**30,
) -> Speech:
    """One speaker reading sentences, in the layout of LJ Speech: `metadata.csv` and `wavs/*.wav`.

    Args:
      root: the folder. Lines of `metadata.csv` are `id|text|normalised text` (the last is used); each
        id has a file `wavs/id.wav`, and each file a line. None: the folder `ljspeech` in
        `$DIFFUSION_JAX_DATA`.
      split: "train", "test" or "all".
      units: "characters" (lower case, without accents), or "phonemes" of words that `lexicon` has and
        characters of the others.
      lexicon: a pronouncing dictionary in the layout of CMUdict, for phonemes.
      blank: put a blank between all symbols and at the ends, as Grad-TTS does.
      audio: fields of `audio.SPEECH_22K` to change.
      max_frames: T; LJ Speech's longest recording has 870.
      longer: what becomes of longer utterances: "drop", or "crop" (the end of the sound is cut off,
        the text stays).
      test_fraction: share that "test" takes (deterministic) where there is no `test_list`.
      test_list: a text file with the test utterances, an id or a path a line (what follows "|" is
        ignored); all others are for training.
      cache_bytes: spectrograms stay in memory when all together need no more than this.

    Raises:
      ValueError: no such folder, malformed lines, a transcript without its recording or the reverse, a
        corrupt file (its header now, its samples when they are needed), an unknown option.
      ImportError: librosa or soundfile is missing.
    """
    check_split(split)
    check_fraction(test_fraction)
    check_frames(max_frames)
    _check_longer(longer)
    if units not in UNITS:
        raise ValueError(f"unknown units {units!r}; valid: {', '.join(UNITS)}")
    if (units == "phonemes") != (lexicon is not None):
        raise ValueError(f"units={units!r} and lexicon={lexicon!r}: phonemes need a lexicon")
    sound.libraries()
    features = sound.SPEECH_22K.replace(audio)
    place = _place(root, "ljspeech", "metadata.csv and wavs/*.wav, as LJ Speech 1.1 has them")
    texts = _metadata(place)
    files = {path.stem: path for path in _wav_files(place / "wavs")}
    for missing in (set(texts) - set(files), set(files) - set(texts)):
        if missing:
            first = min(missing)
            lacks = "wav file" if first in texts else "line in metadata.csv"
            raise ValueError(f"{str(place)!r}: {first!r} has no {lacks} ({len(missing)} such)")
    words = {} if lexicon is None else transcripts.read_lexicon(lexicon)
    sequences = [transcripts.phonemes(text, words) for text in texts.values()]
    symbols = transcripts.symbol_table((s for seq in sequences for s in seq), blank=blank)
    ids, lengths = transcripts.encode(sequences, symbols)
    names = list(texts)
    if test_list is not None:
        is_test = np.isin(names, _test_ids(test_list, texts))
        rows = np.flatnonzero({"train": ~is_test, "test": is_test}.get(split, is_test | ~is_test))
    else:
        rows = split_rows(len(names), split, round(test_fraction * len(names)))
    if longer == "drop":
        rate = features.sample_rate
        sizes = [features.frames(sound.wav_samples(files[names[row]], rate)) for row in rows]
        rows = rows[np.array(sizes, np.int64) <= max_frames]
    if not len(rows):
        raise ValueError(
            f"split={split!r} of {str(place)!r} has no utterance of {max_frames} frames"
        )
    arrays = {
        "text": ids[rows],
        "text_length": lengths[rows],
        "speaker": np.zeros(len(rows), np.int32),
    }
    spec = speech_spec(features, max_frames, ids.shape[1], symbols, 1)

    def wave(row: int) -> np.ndarray:
        return sound.read_wav(files[names[rows[row]]], features.sample_rate)

    return Speech(wave, arrays, spec, cache_bytes)


def _metadata(place: pathlib.Path) -> dict[str, str]:
    """Clean texts by id, in the order of the file."""
    path = place / "metadata.csv"
    texts: dict[str, str] = {}
    for number, line in enumerate(transcripts.read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        name, *columns = line.split("|")
        text = transcripts.clean(columns[-1]) if columns else ""
        if not _IDENTIFIER.fullmatch(name) or not text:
            raise ValueError(f"{str(path)!r}, line {number}: {line[:60]!r} is not id|text|text")
        if name in texts:
            raise ValueError(f"{str(path)!r}, line {number}: {name!r} occurs twice")
        texts[name] = text
    if not texts:
        raise ValueError(f"{str(path)!r} holds no lines")
    return texts


def _test_ids(path: str | pathlib.Path, texts: Sequence[str] | Mapping[str, str]) -> list[str]:
    lines = (line.split("|", 1)[0].strip() for line in transcripts.read_text(path).splitlines())
    names = [line.rsplit("/", 1)[-1].removesuffix(".wav") for line in lines if line]
    unknown = [name for name in names if name not in texts]
    if unknown or not names:
        what = f"{unknown[0]!r} is not in metadata.csv" if unknown else "it is empty"
        raise ValueError(f"test_list={str(path)!r}: {what}")
    return names
