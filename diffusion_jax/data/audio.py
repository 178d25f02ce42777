"""Waves, log-mel spectrograms and the way back (librosa and soundfile, imported on first use).

Waves are float32 [N] in [-1, 1], one channel. Spectrograms are [T, M]: time first, low bands first.

  (1) frame t holds the samples around t * hop + hop / 2: the wave is extended by (n_fft - hop) / 2
      reflected samples at both ends, so N samples give N // hop frames
  (2) magnitude of the Hann-windowed Fourier transform, through mel filters of unit area (Slaney)
  (3) log_mel = log(max(mel, floor))                                             natural logarithm
  (4) points = 2 (log_mel - log floor) / (ceiling - log floor) - 1               silence is -1

(1) to (3) are the convention of HiFi-GAN (arXiv 2010.05646), whose vocoders and Grad-TTS (arXiv
2105.06337) share it; (4) brings the values to about [-1, 1] and is undone before listening.
The way back is a nonnegative least-squares inverse of the filters, then Griffin-Lim with momentum
(Griffin, Lim 1984; Perraudin, Balazs, Sondergaard 2013), as librosa has them.
"""

import dataclasses
import functools
import io
import math
import os
import pathlib
import wave as wave_files
from collections.abc import Mapping
from typing import Any

import numpy as np

MAX_SECONDS = 600.0


def libraries():
    """The packages `librosa` and `soundfile`. Raises ImportError with the command that installs them."""
    try:
        import librosa
        import soundfile
    except ImportError as error:
        raise ImportError(
            "speech needs: pip install librosa soundfile (the extra 'audio' of diffusion_jax)"
        ) from error
    return librosa, soundfile


@dataclasses.dataclass(frozen=True)
class LogMel:
    """How a wave becomes a normalised log-mel spectrogram, and back.

    Attributes:
      sample_rate: of the waves, in Hz.
      n_fft: samples in a window; even.
      hop: samples between two frames; n_fft - hop must be even, and hop at most n_fft / 2.
      mels: number of bands, M.
      fmin, fmax: outer edges of the bands in Hz, fmax at most sample_rate / 2.
      floor: smallest band magnitude; below it everything is silence.
      ceiling: logarithm of the magnitude that becomes +1. It should be the loudest that occurs.

    Raises:
      ValueError: a number out of range, or more bands than the window can tell apart.
    """

    sample_rate: int = 22_050
    n_fft: int = 1_024
    hop: int = 256
    mels: int = 80
    fmin: float = 0.0
    fmax: float = 8_000.0
    floor: float = 1e-5
    ceiling: float = 2.0

    def __post_init__(self) -> None:
        for name in ("sample_rate", "n_fft", "hop", "mels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.n_fft % 2 or self.hop % 2 or self.hop > self.n_fft // 2:
            raise ValueError(
                f"n_fft={self.n_fft} and hop={self.hop} must be even, with hop <= n_fft / 2"
            )
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise ValueError(
                f"fmin={self.fmin} and fmax={self.fmax} must satisfy"
                f" 0 <= fmin < fmax <= {self.sample_rate / 2:g} (half of sample_rate)"
            )
        if not self.floor > 0 or not math.log(self.floor) < self.ceiling < math.inf:
            raise ValueError(
                f"floor={self.floor} must be positive and ceiling={self.ceiling} above its logarithm"
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "LogMel":
        """From the fields of `to_json`, or some of them. Raises ValueError for an unknown one."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(known))
        if unknown:
            raise ValueError(f"audio has no field {unknown[0]!r}; valid: {', '.join(known)}")
        return cls(**fields)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return dataclasses.asdict(self)

    def replace(self, changes: Mapping[str, Any] | None) -> "LogMel":
        """With some fields changed. Raises ValueError, as `from_json`."""
        return self.from_json(self.to_json() | dict(changes or {}))

    @property
    def low(self) -> float:
        """log floor: what silence is in `log_mel`."""
        return math.log(self.floor)

    def frames(self, samples: int) -> int:
        """Frames of a wave of so many samples, at least 1."""
        return max(1, samples // self.hop)

    def normalise(self, log_mel: Any) -> np.ndarray:
        """(4) of the module; any shape, float32."""
        scale = 2.0 / (self.ceiling - self.low)
        return ((np.asarray(log_mel, np.float32) - self.low) * scale - 1.0).astype(np.float32)

    def denormalise(self, points: Any) -> np.ndarray:
        """Inverse of `normalise`; values below silence become silence."""
        scale = (self.ceiling - self.low) / 2.0
        values = (np.asarray(points, np.float32) + 1.0) * scale + self.low
        return np.maximum(values, np.float32(self.low)).astype(np.float32)

    def log_mel(self, wave: Any) -> np.ndarray:
        """(1) to (3) of the module: wave [N] -> float32 [N // hop, M]; shorter than a hop is padded.

        Raises:
          ValueError: not a wave, or one with values that are not finite.
        """
        librosa, _ = libraries()
        wave = check_wave(wave)
        wave = wave[: self.frames(len(wave)) * self.hop]
        wave = np.pad(wave, (0, max(0, self.hop - len(wave))))
        wave = np.pad(wave, (self.n_fft - self.hop) // 2, mode="reflect")
        spectrum = librosa.stft(wave, n_fft=self.n_fft, hop_length=self.hop, center=False)
        bands = _filters(self) @ np.abs(spectrum)
        return np.log(np.maximum(bands, self.floor)).T.astype(np.float32)

    def to_wave(self, log_mel: Any, *, iterations: int = 60, seed: int = 0) -> np.ndarray:
        """A wave with about this spectrogram, by Griffin-Lim.

        Args:
          log_mel: [T, M], not normalised.
          iterations: of Griffin-Lim.
          seed: of the phases it starts from.

        Returns:
          float32 [T * hop] in [-1, 1] (louder waves are cut); the phase is made up, so it sounds
          like the original but is not close to it sample by sample.

        Raises:
          ValueError: another shape, values that are not finite, or no iterations.
        """
        librosa, _ = libraries()
        log_mel = np.asarray(log_mel, np.float32)
        if log_mel.ndim != 2 or log_mel.shape[1] != self.mels or not len(log_mel):
            raise ValueError(f"log_mel must be [T, {self.mels}], got shape {log_mel.shape}")
        if not np.isfinite(log_mel).all():
            raise ValueError("log_mel holds values that are not finite")
        if iterations < 1:
            raise ValueError(f"iterations={iterations!r} must be positive")
        silent = log_mel <= self.low + 1e-4
        if silent.all():
            return np.zeros(len(log_mel) * self.hop, np.float32)
        bands = np.where(silent, 0.0, np.exp(np.minimum(log_mel, 20.0))).astype(np.float32)
        # silent frames where there are too few for one window
        frames = max(len(bands), self.n_fft // self.hop + 1)
        bands = np.pad(bands, ((0, frames - len(bands)), (0, 0)))
        magnitude = librosa.util.nnls(_filters(self), bands.T)
        wave = librosa.griffinlim(
            magnitude,
            n_iter=iterations,
            hop_length=self.hop,
            n_fft=self.n_fft,
            pad_mode="reflect",
            random_state=seed,
            length=frames * self.hop - self.hop // 2,
        )
        # librosa centres frame t at t * hop, (1) half a hop later
        wave = np.pad(wave, (self.hop // 2, 0))[: len(log_mel) * self.hop]
        return np.clip(wave, -1.0, 1.0).astype(np.float32)


# Telephone-band speech such as the spoken digits: 12 ms a frame. Peak-normalised waves reach 0.6.
SPEECH_8K = LogMel(8_000, 384, 96, 40, 60.0, 4_000.0, 1e-3, 0.5)
# Grad-TTS on LJ-Speech, and HiFi-GAN's vocoder for it.
SPEECH_22K = LogMel()


@functools.lru_cache(maxsize=8)
def _filters(audio: LogMel) -> np.ndarray:
    """Mel filters float32 [M, n_fft / 2 + 1]. Raises ValueError when a band holds no frequency."""
    librosa, _ = libraries()
    filters = librosa.filters.mel(
        sr=audio.sample_rate,
        n_fft=audio.n_fft,
        n_mels=audio.mels,
        fmin=audio.fmin,
        fmax=audio.fmax,
    )
    empty = np.flatnonzero(filters.sum(axis=1) == 0)
    if len(empty):
        raise ValueError(
            f"mels={audio.mels} is too many for n_fft={audio.n_fft}: {len(empty)} bands hold no"
            " frequency; take fewer bands or a longer window"
        )
    return filters


def check_wave(wave: Any) -> np.ndarray:
    """A wave as float32 [N]. Raises ValueError: another rank, no samples, not finite."""
    wave = np.asarray(wave)
    if wave.ndim != 1 or not len(wave):
        raise ValueError(f"a wave must have shape [N] with N > 0, got {wave.shape}")
    wave = wave.astype(np.float32)
    if not np.isfinite(wave).all():
        raise ValueError("a wave holds values that are not finite")
    return wave


def trim(wave: np.ndarray, audio: LogMel, top_db: float | None) -> np.ndarray:
    """Without the quiet beginning and end: windows more than `top_db` below the loudest; None keeps all."""
    if top_db is None:
        return wave
    if not top_db > 0:
        raise ValueError(f"trim_db={top_db!r} must be positive, or None")
    librosa, _ = libraries()
    return librosa.effects.trim(
        wave, top_db=top_db, frame_length=audio.n_fft, hop_length=audio.hop
    )[0]


def scale_peak(wave: np.ndarray, peak: float | None) -> np.ndarray:
    """Scaled so that the largest absolute value is `peak`; None, or pure silence, stays as it is."""
    if peak is None:
        return wave
    if not 0 < peak <= 1:
        raise ValueError(f"peak={peak!r} must be in (0, 1], or None")
    largest = float(np.abs(wave).max())
    return wave if largest == 0 else (wave * np.float32(peak / largest)).astype(np.float32)


def wav_samples(path: str | os.PathLike, sample_rate: int, max_seconds: float = MAX_SECONDS) -> int:
    """How many samples `read_wav` would give (exactly, unless it resamples), from the header alone.

    Raises:
      ValueError: as `read_wav`.
    """
    header = _header(pathlib.Path(path), max_seconds)
    return max(1, math.ceil(header.frames * sample_rate / header.samplerate))


def read_wav(
    path: str | os.PathLike, sample_rate: int, max_seconds: float = MAX_SECONDS
) -> np.ndarray:
    """A wave from a RIFF WAVE file of a stranger.

    Args:
      path: the file: PCM or float samples; channels are averaged.
      sample_rate: of the result; another one in the file is resampled (soxr, high quality).
      max_seconds: longer files are refused before they are decoded.

    Returns:
      float32 [N].

    Raises:
      ValueError: no such file, not a WAVE file, cut off, empty, too long, or with samples that are not
        finite; the message names the file.
    """
    librosa, soundfile = libraries()
    path = pathlib.Path(path)
    header = _header(path, max_seconds)
    try:
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a readable wav file ({error})") from error
    if len(samples) != header.frames:
        raise ValueError(
            f"{str(path)!r} is cut off: {len(samples)} of {header.frames} samples are there"
        )
    if not np.isfinite(samples).all():
        raise ValueError(f"{str(path)!r} holds samples that are not finite")
    wave = samples.mean(axis=1)
    if rate != sample_rate:
        wave = librosa.resample(wave, orig_sr=rate, target_sr=sample_rate)
    return np.ascontiguousarray(wave, np.float32)


def _header(path: pathlib.Path, max_seconds: float):
    _, soundfile = libraries()
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file")
    try:
        with open(path, "rb") as file:
            start = file.read(12)
        header = soundfile.info(str(path))
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is not a readable wav file ({error})") from error
    if start[:4] != b"RIFF" or start[8:] != b"WAVE":
        raise ValueError(f"{str(path)!r} is not a wav file (RIFF WAVE)")
    stated, actual = int.from_bytes(start[4:8], "little") + 8, path.stat().st_size
    # Programs that write to a pipe cannot know the size and leave all bits, or none, set.
    if actual < stated < 2**32 - 1:
        raise ValueError(f"{str(path)!r} is cut off: {actual} of {stated} bytes are there")
    if not header.frames or header.samplerate < 1:
        raise ValueError(f"{str(path)!r} holds no samples")
    if header.frames > max_seconds * header.samplerate or header.channels > 64:
        raise ValueError(
            f"{str(path)!r} holds {header.frames / header.samplerate:.0f} seconds of"
            f" {header.channels} channels; the limits are {max_seconds:g} seconds and 64"
        )
    return header


def write_wav(path: str | os.PathLike, wave: Any, sample_rate: int) -> pathlib.Path:
    """Writes a wave [N] as 16-bit PCM, whole or not at all; values beyond [-1, 1] are cut.

    Raises:
      ValueError: not a wave, or values that are not finite.
    """
    pcm = np.clip(np.round(check_wave(wave) * 32_768.0), -32_768, 32_767).astype("<i2")
    buffer = io.BytesIO()
    with wave_files.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(int(sample_rate))
        file.writeframes(pcm.tobytes())
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fresh.write_bytes(buffer.getvalue())
    os.replace(fresh, path)
    return path
