"""Text to speech: Bridge-TTS (arXiv 2312.03491) and Grad-TTS (arXiv 2105.06337), one model, two paths.

A text encoder gives each symbol a mean spectrum and a duration; monotonic alignment search finds the
durations of a recording; means repeated by durations are z `[B, T, M]`, a blurred spectrogram. Then
  (1) Bridge-TTS  x_t = a z + b x0 + c eps, from z itself; data prediction |x0_hat - x0|^2
  (2) Grad-TTS    x_t = alpha x0 + (1 - alpha) z + sigma eps, from z + noise
(2) is a variance-preserving process of the residual x - z, run as such. x, x0 and z are `scale` times the
data's points: by default natural logarithms (up to a constant), in which both papers state their
schedules. Losses: that of the decoder, and
  (3) encoder     |z - x0|^2 + |log d_hat - log d|^2, with alignment and durations d held constant
Both papers' losses are means over the frames of a batch; here over the frames of an example, then over
examples, so that every sharding of a batch has the same loss.

Deviations: (3) is a plain square in both (Grad-TTS: half of it and a constant); a temperature divides the
variance of noise, as both papers write it (Grad-TTS's code divides the standard deviation: its 1.5 is
2.25 here); the first alignments may be even (`flat_start`).
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion_jax import guidance as transforms
from diffusion_jax import objectives, placement
from diffusion_jax.denoisers import Denoiser
from diffusion_jax.methods.base import OBJECTIVE, Method
from diffusion_jax.numerics import example_keys
from diffusion_jax.objectives import alignment
from diffusion_jax.processes import BridgeProcess, GaussianProcess
from diffusion_jax.registry import check_choice, register
from diffusion_jax.samplers.build import build_sampler
from diffusion_jax.samplers.scan import sample as run_sampler

SILENCE = -1.0  # what stands beyond an utterance, in the data and in samples
TRAINS = ("encoder", "decoder", "apart", "together")
LENGTHS = ("predicted", "frames", "durations")
# Options of a default sampler where nothing is said.
PAPER_OPTIONS = {"bridge_tts": {"temperature": 2.0}, "euler": {"grid": "uniform", "offset": 0.5}}
# Streams of a loss's key beside OBJECTIVE.
_ENCODER_DROPOUT, _DECODER_DROPOUT, _SEGMENT = range(10, 13)


class Prior(NamedTuple):
    """What the encoder says of a batch.

    Attributes:
      source: z in the data's unit, float32 `[B, T, M]`, zero from `frames` on.
      frames: int32 `[B]`.
      durations: int32 `[B, L]`.
    """

    source: jax.Array
    frames: jax.Array
    durations: jax.Array


def _conditions(batch, *wanted):
    for name in wanted:
        if name not in batch:
            raise ValueError(f"the model is conditioned on {name!r}; the batch has {sorted(batch)}")
    return [batch[name] for name in wanted]


def encode(module, params, batch, train=False, key=None):
    """`(mean [B, L, M], log_duration [B, L])` of the texts of a batch; dropout draws from `key`.

    Raises:
      ValueError: the batch lacks a condition.
    """
    text, text_length = _conditions(batch, "text", "text_length")
    speaker = _speaker(module, batch)
    own = {"params": placement.parameters({"encoder": params["encoder"]})}
    rngs = {"dropout": key} if train else None
    return module.apply(
        own, text, text_length, speaker, train=train, method=module.encode, rngs=rngs
    )


def _speaker(module, batch):
    return _conditions(batch, "speaker")[0] if module.speakers else None


def align(mean, batch, flat=None):
    """`(index [B, T], durations [B, L])` of recordings: the best alignment of their frames.

    Args:
      mean: `[B, L, M]` of the encoder.
      batch: holds the recordings as "points" and "frames".
      flat: bool scalar: split evenly instead; None: never.
    """
    x0, frames, length = _conditions(batch, "points", "frames", "text_length")
    scores = alignment.unit_gaussian_scores(mean, x0)
    index, durations = alignment.monotonic_alignment(scores, length, frames)
    if flat is None:
        return index, durations
    even = alignment.even_durations(length, frames, mean.shape[1])
    evenly = alignment.index_of(even, x0.shape[1])
    return jnp.where(flat, evenly, index), jnp.where(flat, even, durations)


def recorded_durations(module, params, batch):
    """Durations int32 `[B, L]` of the recordings of a batch, for `sample(..., lengths="durations")`."""
    mean, _ = encode(module, params, batch)
    return align(mean, batch)[1]


def prior(module, params, batch, size, *, length_scale=1.0, lengths="predicted") -> Prior:
    """The `Prior` that samples of a batch begin with.

    Args:
      module, params: of the network `tts`.
      batch: conditions "text", "text_length", "speaker" where there are several, and what `lengths`
        takes from it.
      size: T.
      length_scale: factor on predicted durations: slower above 1.
      lengths: "predicted"; "frames": predictions stretched to the batch's "frames" int `[B]`; or
        "durations": those of the batch, int `[B, L]`.
    """
    check_choice("lengths", lengths, LENGTHS)
    mean, log_duration = encode(module, params, batch)
    inside = alignment.valid(batch["text_length"], mean.shape[1])
    exact = jnp.where(inside, jnp.exp(log_duration), 0.0)
    if lengths == "durations":
        durations = jnp.where(inside, *_conditions(batch, "durations"), 0)
    elif lengths == "frames":
        durations = alignment.fit_durations(exact, *_conditions(batch, "frames"))
    else:
        durations = jnp.ceil(exact * length_scale).astype(jnp.int32)
    source, frames = alignment.regulate(mean, durations, size)
    return Prior(source, frames, durations)


@dataclasses.dataclass(frozen=True)
class _Decoder:
    """The decoder of a network `tts` as a function of its arrays, hashed by value."""

    module: Any

    def __call__(self, params, source, mask, speaker, centre, dropout, x, t):
        """Called at x + centre; with a key for dropout it trains."""
        train = dropout is not None
        return self.module.apply(
            {"params": placement.parameters({"decoder": params})},
            x if centre is None else x + centre,
            t,
            source,
            mask,
            speaker,
            train=train,
            method=self.module.decode,
            rngs={"dropout": dropout} if train else None,
        )


class _Path(NamedTuple):
    """What differs between the two methods.

    Attributes:
      centre: `(z) -> array or None`: what x is minus what the process walks.
      denoiser: `(network, source) -> Denoiser`.
      losses: `(denoiser, the same masked, key, x0, z, index, total) -> [B]`, means over all of `[T, M]`.
      start: `(key, z, index) -> x_init`.
    """

    centre: Any
    denoiser: Any
    losses: Any
    start: Any


def _method(process, module, spec, path: _Path, sampler, nfe, sampler_options, options) -> Method:
    trains, flat_start, segment = (
        options[name] for name in ("trains", "flat_start", "segment_frames")
    )
    check_choice("trains", trains, TRAINS)
    check_choice("lengths", options["lengths"], LENGTHS)
    for name in ("text", "text_length", "frames"):
        if name not in spec.elements:
            raise ValueError(
                f"text to speech needs {name!r}: the data has {', '.join(sorted(spec.elements))}"
            )
    if not isinstance(flat_start, int) or flat_start < 0:
        raise ValueError(f"flat_start must be a number of steps, got {flat_start!r}")
    size = spec.shape[0]
    if segment is not None and not 1 <= segment <= size:
        raise ValueError(f"segment_frames must lie in 1..{size}, got {segment!r}")
    if options["length_scale"] <= 0:
        raise ValueError(f"length_scale must be positive, got {options['length_scale']}")
    scale = options["scale"]
    if scale is None:
        scale = natural_scale(spec)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")

    def init(key, batch):
        x = batch[spec.kind]
        t = jnp.full(x.shape[:1], 0.5, jnp.float32)
        speaker = _speaker(module, batch)
        return module.init(key, x, t, batch["text"], batch["text_length"], speaker)["params"]

    def bind(params, batch, source, frames_mask, dropout):
        network = jax.tree_util.Partial(
            _Decoder(module),
            params["decoder"],
            source,
            frames_mask,
            _speaker(module, batch),
            path.centre(source),
            dropout,
        )
        denoise = path.denoiser(network, source)
        return denoise, transforms.inpaint(
            denoise, 0.0, frames_mask[..., None].astype(source.dtype)
        )

    def encoder_losses(params, batch, context, train, key):
        mean, log_duration = encode(module, params, batch, train, key)
        flat = context.step < flat_start if flat_start and trains != "decoder" else None
        index, durations = align(mean, batch, flat)
        z, frames = scale * alignment.at_symbols(mean, index), batch["frames"]
        inside = alignment.valid(frames, size)
        x0 = jnp.where(inside[..., None], scale * batch["points"], 0.0)
        error = jnp.square(z - x0).mean(axis=-1).sum(axis=1) / frames
        symbols = alignment.valid(batch["text_length"], durations.shape[1])
        log_d = jnp.log(jnp.maximum(durations, 1).astype(jnp.float32))
        misses = jnp.where(symbols, jnp.square(log_duration - log_d), 0.0)
        metrics = {
            "encoder_mse": error.mean(),
            "duration_mse": (misses.sum(axis=1) / batch["text_length"]).mean(),
        }
        return sum(metrics.values()), metrics, (z, x0, inside)

    def decoder_loss(params, key, batch, context, z, x0, inside):
        if segment is not None:
            keys = example_keys(jax.random.fold_in(key, _SEGMENT), batch["index"])
            z, x0, inside = _segments(keys, batch["frames"], segment, z, x0, inside)
        dropout = jax.random.fold_in(jax.random.fold_in(key, _DECODER_DROPOUT), batch["index"][0])
        weighted, masked = bind(params, batch, z, inside, dropout if context.train else None)
        objective = jax.random.fold_in(key, OBJECTIVE)
        total = context.batch_size
        losses = path.losses(weighted, masked, objective, x0, z, batch["index"], total)
        return (losses * (z.shape[1] / inside.sum(axis=1))).mean()  # outside, errors are zero

    def loss(params, key, batch, context):
        encoder_key = jax.random.fold_in(
            jax.random.fold_in(key, _ENCODER_DROPOUT), batch["index"][0]
        )

        learning = context.train and trains != "decoder"
        value, metrics, aligned = encoder_losses(params, batch, context, learning, encoder_key)
        if trains == "encoder":
            return value, metrics
        if trains != "together":
            aligned = jax.lax.stop_gradient(aligned)
        if trains == "decoder":
            value = 0.0
        own = decoder_loss(params, key, batch, context, *aligned)
        return value + own, metrics | {"decoder_loss": own}

    @functools.partial(jax.jit, static_argnums=2)
    def spoken(params, batch, lengths):
        pace = options["length_scale"]
        z, frames, _ = prior(module, params, batch, size, length_scale=pace, lengths=lengths)
        return scale * z, alignment.valid(frames, size)

    def say(params, batch, lengths=None):
        names = ("text", "text_length", "durations", "frames", "speaker")
        told = {name: jnp.asarray(batch[name]) for name in names if name in batch}
        return spoken({"encoder": params["encoder"]}, told, lengths or options["lengths"])

    def denoiser(params, batch, train=False, key=None, raw=False):
        z, mask = say(params, batch)
        return bind(params, batch, z, mask, key if train else None)[1]

    if sampler_options is None:
        sampler_options = PAPER_OPTIONS.get(sampler, {})

    def make(name=sampler, nfe=None, **more):
        own = sampler_options if name == sampler else {}  # they are of that sampler
        return build_sampler(process, name, nfe, **{**own, **more})

    default = make(sampler, nfe)

    def sample(params, key, batch, sampler=None, *, lengths=None, **more):
        start_key, walk_key = jax.random.split(key)
        index = jnp.asarray(batch["index"])
        z, mask = say(params, batch, lengths)
        denoise = bind(params, batch, z, mask, None)[1]
        start, shift = path.start(start_key, z, index), path.centre(z)
        chosen = default if sampler is None else sampler
        drawn = run_sampler(chosen, denoise, walk_key, start, index=index, **more)

        def shown(x):
            centre = 0.0 if shift is None else jnp.broadcast_to(shift, x.shape)
            inside = jnp.broadcast_to(mask[..., None], x.shape)
            return jnp.where(inside, (x + centre) / scale, SILENCE)

        return jax.tree.map(shown, drawn)

    return Method(init, loss, denoiser, sample, default, make, process)


def natural_scale(spec) -> float:
    """Natural logarithms of magnitude in a unit of the data's points, 1 where nothing is known."""
    if spec.audio is None:
        return 1.0
    return (spec.audio["ceiling"] - math.log(spec.audio["floor"])) / 2.0


def _segments(keys, frames, size, *arrays):
    """The same random `size` frames of each array `[B, T, ...]`, within the example where it is as long."""
    last = jnp.maximum(frames - size, 0)
    begin = jax.vmap(lambda k, n: jax.random.randint(k, (), 0, n + 1))(keys, last)
    cut = jax.vmap(lambda v, i: jax.lax.dynamic_slice_in_dim(v, i, size))
    return tuple(cut(v, begin) for v in arrays)


@register("method", "bridge_tts", family="bridge", paper="2312.03491", conditions="text")
def bridge_tts(
    process,
    module,
    spec,
    *,
    parameterization: str = "x0",
    times: str = "uniform",
    times_options: Mapping[str, Any] | None = None,
    trains: str = "apart",
    flat_start: int = 0,
    segment_frames: int | None = None,
    scale: float | None = None,
    length_scale: float = 1.0,
    lengths: str = "predicted",
    sampler: str = "bridge_tts",
    nfe: int | None = 4,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Bridge-TTS (arXiv 2312.03491): a bridge from the encoder's aligned output to the spectrogram.

    The loss is the plain squared error of what the network predicts, over the frames of an example.

    Args:
      process: a bridge process: "gmax_bridge", "vp_bridge" or "brownian_bridge" (constant g).
      module: network `tts`.
      spec: the data's `DataSpec` with "text", "text_length" and "frames".
      parameterization: "x0", or "i2sb" for the paper's noise prediction.
      times, times_options: of `objectives.bridge_denoising`.
      trains: "encoder", then "decoder" on its fixed output: the paper's two stages, two runs of which
        the second begins with the first (`train.init_from`); or both in one run, "apart" (the decoder's
        gradient stops at z) or "together".
      flat_start: steps in which alignments are even; searched ones need means that mean something.
      segment_frames: the decoder learns on random segments of so many frames; None: on all.
      scale: of x over the data's points; None: natural logarithms, as the data's audio says.
      length_scale, lengths: of the durations in sampling, see `prior`; `sample` takes `lengths` too.
      sampler, nfe, sampler_options: the default sampler; options None are the paper's, temperature 2.
    Raises:
      ValueError: another kind of process, data without texts, options out of range.
    """
    if not isinstance(process, BridgeProcess):
        raise ValueError(f"bridge_tts needs a bridge process, got {type(process).__name__}")
    draw_times = objectives.times.build_times(times, **(times_options or {}))

    def losses(weighted, masked, key, x0, z, index, total):
        def weight(point):
            return 1.0 / weighted.output_scale(point) ** 2

        found, _ = objectives.bridge_denoising(
            process, masked, key, x0, z, weight=weight, times=draw_times, index=index, total=total
        )
        return found

    path = _Path(
        centre=lambda z: None,
        denoiser=lambda network, z: Denoiser(network, process, parameterization, source=z),
        losses=losses,
        start=lambda key, z, index: z,
    )
    options = {
        "trains": trains,
        "flat_start": flat_start,
        "segment_frames": segment_frames,
        "scale": scale,
        "length_scale": length_scale,
        "lengths": lengths,
    }
    return _method(process, module, spec, path, sampler, nfe, sampler_options, options)


@register("method", "grad_tts", family="gaussian", paper="2105.06337", conditions="text")
def grad_tts(
    process,
    module,
    spec,
    *,
    parameterization: str = "score",
    weighting: str = "eps",
    weighting_options: Mapping[str, Any] | None = None,
    times: str = "uniform",
    times_options: Mapping[str, Any] | None = None,
    temperature: float = 1.5,
    trains: str = "together",
    flat_start: int = 0,
    segment_frames: int | None = None,
    scale: float | None = None,
    length_scale: float = 1.0,
    lengths: str = "predicted",
    sampler: str = "euler",
    nfe: int | None = 10,
    sampler_options: Mapping[str, Any] | None = None,
) -> Method:
    """Grad-TTS (arXiv 2105.06337): diffusion towards noise around the encoder's aligned output.

    The process is that of x - z; the network is shown x. Samples begin with z + N(0, 1 / temperature).

    Args:
      process: a Gaussian process of the residual; the paper's is "vp", beta from 0.05 to 20.
      parameterization, weighting, weighting_options, times, times_options: as for `score`; the paper's
        network gives a score and its error of eps counts plainly.
      temperature: above 1 there is less noise to begin with.
      others: as for `bridge_tts`. The paper trains both parts together; its sampler is Euler's on
        even times with the slope at the middle of each step's (options None).
    Raises:
      ValueError: another kind of process, data without texts, options out of range.
    """
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"grad_tts needs a Gaussian process, got {type(process).__name__}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    weight = objectives.weightings.build_weighting(weighting, **(weighting_options or {}))
    draw_times = objectives.times.build_times(times, **(times_options or {}))

    def losses(weighted, masked, key, x0, z, index, total):
        found, _ = objectives.denoising(
            process,
            masked,
            key,
            x0 - z,
            weighting=weight,
            times=draw_times,
            index=index,
            total=total,
        )
        return found

    def start(key, z, index):
        return process.prior(key, z.shape, index=index) / temperature**0.5

    path = _Path(
        centre=lambda z: z,
        denoiser=lambda network, z: Denoiser(network, process, parameterization),
        losses=losses,
        start=start,
    )
    options = {
        "trains": trains,
        "flat_start": flat_start,
        "segment_frames": segment_frames,
        "scale": scale,
        "length_scale": length_scale,
        "lengths": lengths,
    }
    return _method(process, module, spec, path, sampler, nfe, sampler_options, options)
