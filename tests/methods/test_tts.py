"""Bridge-TTS and Grad-TTS: their laws against closed forms, losses, durations and conditions."""

import functools
import importlib
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_jit import quick_jit

from diffusion_jax import builder, methods, registry
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.methods import Context
from diffusion_jax.methods.tts import natural_scale, recorded_durations
from diffusion_jax.networks import tts
from diffusion_jax.processes import VP, GmaxBridge, VPBridge

T, M, L, SPEAKERS = 12, 4, 4, 2
SPEC = DataSpec(
    kind="points",
    elements={
        "points": Element((T, M), "float32"),
        "frames": Element((), "int32"),
        "text": Element((L,), "int32"),
        "text_length": Element((), "int32"),
        "speaker": Element((), "int32"),
    },
    symbols=("", "a", "b", "c"),
    sizes={"text": 4, "speaker": SPEAKERS},
)
NETWORK = dict(
    patch=1,
    encoder=dict(width=8, depth=1, duration_width=8, prenet_layers=1, dropout=0.1),
    decoder=dict(name="dit", patch_size=2, width=16, depth=1, heads=1, time_features=8),
)
PROCESS = {"bridge_tts": GmaxBridge(), "grad_tts": VP(0.05, 20.0, t_min=1e-5)}
NAMES = registry.names("method", conditions="text")
SPECTRA = np.random.default_rng(42).standard_normal((4, M))
each = pytest.mark.parametrize("name", NAMES)


def utterances(count, seed=0):
    """Spectra that say what is spoken: each symbol has a spectrum, each voice a level."""
    rng = np.random.default_rng(seed)
    length = rng.integers(2, L + 1, count)
    text = np.where(np.arange(L) < length[:, None], rng.integers(1, 4, (count, L)), 0)
    durations = np.where(text > 0, rng.integers(1, 4, (count, L)), 0)
    speaker = rng.integers(0, SPEAKERS, count)
    points = np.full((count, T, M), -1.0)
    for row, symbols, spans, voice in zip(points, text, durations, speaker):
        spoken = np.repeat(SPECTRA[symbols], spans, axis=0)
        row[: len(spoken)] = 0.4 * spoken + 0.3 * voice + 0.05 * rng.standard_normal(spoken.shape)
    return {
        "points": jnp.asarray(points, jnp.float32),
        "frames": jnp.asarray(durations.sum(axis=1), jnp.int32),
        "durations": jnp.asarray(durations, jnp.int32),
        "text": jnp.asarray(text, jnp.int32),
        "text_length": jnp.asarray(length, jnp.int32),
        "speaker": jnp.asarray(speaker, jnp.int32),
        "index": jnp.arange(count, dtype=jnp.int32),
    }


def rows(batch, which):
    return {k: v[np.asarray(which)] for k, v in batch.items()}


def module():
    return tts(symbols=3, mels=M, speakers=SPEAKERS, **NETWORK)


def build(name, network=None, process=None, **options):
    options = {"nfe": 3, **({"sampler": "ddim"} if name == "grad_tts" else {}), **options}
    make = registry.get("method", name)
    return make(process or PROCESS[name], network or module(), SPEC, **options)


class Case(NamedTuple):
    method: methods.Method
    batch: dict
    params: Any
    loss_and_slope: Any


# What the methods compose, with networks that can be read


class Stub:
    """Means 0.1 (symbol + 1), durations as asked; the decoder is `decoded(x, t, source)`."""

    speakers = SPEAKERS

    def __init__(self, decoded=None):
        self.decoded = decoded

    def encoded(self, text, speaker):
        return 0.1 * (text[..., None] + 1.0) * jnp.ones(M)

    def encode(self):
        pass

    def decode(self):
        pass

    def apply(self, variables, *arguments, train, method, rngs):
        if method == self.encode:
            text, _, speaker = arguments
            return self.encoded(text, speaker), jnp.zeros(text.shape)
        x, t, source, mask, _ = arguments
        return self.decoded(x, jnp.broadcast_to(t, x.shape[:1]), source) * mask[..., None]


PARAMS = {"encoder": {}, "decoder": {}}


class Linear(Stub):
    """A table of means and durations, and `v x + w z`."""

    params = {
        "encoder": {"mean": 0.4 * SPECTRA, "duration": np.array([0.1, 0.2, 0.3, 0.4])},
        "decoder": {"v": np.float32(0.5), "w": np.float32(0.7)},
    }
    params = jax.tree.map(lambda v: np.asarray(v, np.float32), params)

    def apply(self, variables, *arguments, train, method, rngs):
        own = variables["params"]
        if method == self.encode:
            text, table = arguments[0], own["encoder"]
            return jnp.asarray(table["mean"])[text], jnp.asarray(table["duration"])[text]
        x, _, source, mask, _ = arguments
        return (own["decoder"]["v"] * x + own["decoder"]["w"] * source) * mask[..., None]


@functools.cache
def case(name):
    """One of the two with a real network: they share all that is compiled."""
    real = name == "bridge_tts"
    method, batch = build(name, module() if real else Linear(), trains="apart"), utterances(8)
    params = Linear.params
    if real:
        leaves, tree = jax.tree.flatten(jax.eval_shape(method.init, jax.random.key(0), batch))
        rng = np.random.default_rng(0)
        noise = [0.2 * rng.standard_normal(v.shape).astype(v.dtype) for v in leaves]
        params = tree.unflatten(noise)
    run = lambda p, key, batch: method.loss(p, key, batch, Context(batch_size=8))
    return Case(method, batch, params, quick_jit(jax.value_and_grad(run, has_aux=True)))


@each
def test_any_sharding_of_a_batch_has_the_same_loss(name):
    batch, context = utterances(8), Context(batch_size=8)
    for segment in (None, 6):
        method = build(name, Linear(), segment_frames=segment)
        loss = quick_jit(
            lambda b, m=method: m.loss(Linear.params, jax.random.key(3), b, context)[0]
        )
        halves = [([0, 1, 2, 3], [4, 5, 6, 7]), ([6, 1, 3, 4], [5, 0, 7, 2])]
        values = [[loss(rows(batch, half)) for half in pair] for pair in halves]
        np.testing.assert_allclose(*(np.mean(v) for v in values), rtol=2e-5)
        assert values[0][0] != values[0][1] and np.isfinite(values).all()


@each
def test_what_each_stage_teaches(name):
    batch, context, found = utterances(8), Context(batch_size=8), {}
    for trains in ("encoder", "decoder", "apart", "together"):
        method = build(name, Linear(), trains=trains)
        run = lambda p, m=method: m.loss(p, jax.random.key(0), batch, context)
        (value, metrics), slopes = quick_jit(jax.value_and_grad(run, has_aux=True))(Linear.params)
        own = metrics.get("decoder_loss", 0.0)
        encoder = metrics["encoder_mse"] + metrics["duration_mse"]
        expected = {"encoder": encoder, "decoder": own}.get(trains, encoder + own)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        found[trains] = slopes
    moved = {
        trains: {part for part in slopes if any(np.any(v != 0) for v in slopes[part].values())}
        for trains, slopes in found.items()
    }
    both = {"encoder", "decoder"}
    assert moved == {
        "encoder": {"encoder"},
        "decoder": {"decoder"},
        "apart": both,
        "together": both,
    }
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found["apart"]["encoder"], found["encoder"]["encoder"])
    jax.tree.map(close, found["apart"]["decoder"], found["together"]["decoder"])
    gap = found["together"]["encoder"]["mean"] - found["encoder"]["encoder"]["mean"]
    assert np.abs(gap).max() > 1e-3  # the decoder's gradient reaches the means


@pytest.mark.slow
def test_one_batch_is_learnt():
    method, batch, _, run = case("bridge_tts")
    params = quick_jit(method.init)(jax.random.key(1), batch)
    optimizer = optax.adam(1e-2)

    @quick_jit
    def update(params, state, slope):
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state

    state, losses = quick_jit(optimizer.init)(params), []
    for step in range(60):
        (_, metrics), slope = run(params, jax.random.key(step), batch)
        losses.append([float(metrics[k]) for k in ("encoder_mse", "duration_mse", "decoder_loss")])
        params, state = update(params, state, slope)
    before, after = np.mean(losses[:5], axis=0), np.mean(losses[-10:], axis=0)
    assert (after < [0.5 * before[0], 0.7 * before[1], 0.9 * before[2]]).all()


@each
def test_an_example_is_the_same_in_every_chunk(name):
    method, batch, params, _ = case(name)
    sample = quick_jit(
        lambda part: method.sample(params, jax.random.key(5), part, lengths="frames")
    )
    first, second = (np.asarray(sample(rows(batch, r))) for r in (range(5), range(3, 8)))
    assert first.shape == (5, T, M) and np.isfinite(first).all()
    np.testing.assert_allclose(first[3:], second[:2], rtol=1e-4, atol=1e-5)
    outside = np.arange(T) >= batch["frames"][:5, None]
    assert (first[outside] == -1.0).all() and (first[~outside] != -1.0).all()
    assert len(np.unique(first[:, 0], axis=0)) == 5


class Paced(Stub):
    """Symbols of 2.2 frames, a decoder that hears who speaks."""

    def encoded(self, text, speaker):
        return 0.1 * (text + speaker[:, None] + 1.0)[..., None] * jnp.ones(M)

    def apply(self, variables, *arguments, train, method, rngs):
        if method == self.encode:
            return self.encoded(arguments[0], arguments[2]), jnp.full((3, L), math.log(2.2))
        _, _, source, mask, speaker = arguments
        return (source + speaker[:, None, None]) * mask[..., None]


@each
def test_lengths_and_conditions(name):
    batch = rows(utterances(3), range(3))
    heard = {k: v for k, v in batch.items() if k in ("text", "text_length", "speaker", "index")}

    def frames(batch, scale=1.0, lengths=None, default="predicted"):
        method = build(name, Paced(), length_scale=scale, lengths=default)
        drawn = np.asarray(method.sample(PARAMS, jax.random.key(0), batch, lengths=lengths))
        return (drawn != -1.0).any(axis=-1).sum(axis=1)

    length = np.asarray(heard["text_length"])
    np.testing.assert_array_equal(frames(heard), np.minimum(3 * length, T))
    np.testing.assert_array_equal(frames(batch, scale=0.5), 2 * length)
    np.testing.assert_array_equal(frames(batch, lengths="frames"), batch["frames"])
    given = {**heard, "durations": jnp.tile(jnp.array([2, 1, 0, 1]), (3, 1))}
    expected = np.array([0, 2, 3, 3, 4])[length]  # what stands at padding counts for nothing
    np.testing.assert_array_equal(frames(given, default="durations"), expected)

    method = build(name, Paced())
    for missing in ("text", "text_length", "speaker"):
        lacking = {k: v for k, v in heard.items() if k != missing}
        with pytest.raises(ValueError, match=f"conditioned on '{missing}'; the batch has"):
            method.denoiser(PARAMS, lacking)
    with pytest.raises(ValueError, match="conditioned on 'frames'"):
        method.sample(PARAMS, jax.random.key(0), heard, lengths="frames")
    with pytest.raises(ValueError, match="lengths must be one of predicted, frames, durations"):
        method.sample(PARAMS, jax.random.key(0), heard, lengths="given")
    x = jnp.ones((3, T, M))
    plain = method.denoiser(PARAMS, heard)(x, 0.5)
    other = method.denoiser(PARAMS, {**heard, "speaker": 1 - heard["speaker"]})(x, 0.5)
    assert (abs(other - plain)[:, 0] > 1e-3).all()


def test_recordings_are_aligned():
    """An encoder that knows the spectra finds the true durations."""
    batch = utterances(20)

    class Knows(Stub):
        def encoded(self, text, speaker):
            return 0.4 * jnp.asarray(SPECTRA)[text] + 0.3 * speaker[:, None, None]

    text = np.asarray(batch["text"])
    differ = ((text[:, 1:] != text[:, :-1]) | (text[:, 1:] == 0)).all(axis=1)
    found = np.asarray(recorded_durations(Knows(), {"encoder": {}}, batch))
    np.testing.assert_array_equal(found[differ], batch["durations"][differ])
    assert differ.sum() >= 5


# The laws of the two paths


BRIDGES = [GmaxBridge(), VPBridge(19.99, 0.01, 1e-5, 1 - 1e-5)]


@pytest.mark.parametrize("process", BRIDGES, ids=lambda p: type(p).__name__)
def test_bridge_reaches_the_closed_form(process):
    """Data N(z + 1, 0.3^2) given z: the flow from z is known; of the SDE's steps, how variances go on."""
    spread, scale = 0.3, 2.0

    def decoded(x, t, source):
        a, b, c = (v[:, None, None] for v in (process.a(t), process.b(t), process.c(t)))
        gain = b * spread**2 / (b**2 * spread**2 + c**2)
        return source + 1.0 + gain * (x - a * source - b * (source + 1.0))

    method = build("bridge_tts", Stub(decoded), process, scale=scale, lengths="frames")
    batch = utterances(4)
    ode = method.build_sampler("bridge_tts_ode", 400)
    z = np.asarray(method.sample(PARAMS, jax.random.key(0), batch, build_still(method, process)))
    got = np.asarray(method.sample(PARAMS, jax.random.key(0), batch, ode))
    inside = np.arange(T) < batch["frames"][:, None]
    z = scale * z[inside]
    s, e = 1 - 1e-5, process.t_min

    def moments(t):
        a, b, c = (float(f(t)) for f in (process.a, process.b, process.c))
        return a * z + b * (z + 1.0), math.hypot(b * spread, c)

    (mean_s, std_s), (mean_e, std_e) = moments(s), moments(e)
    expected = (mean_e + std_e / std_s * (z - mean_s)) / scale
    np.testing.assert_allclose(got[inside], expected, atol=0.02 * spread)

    many = {k: jnp.repeat(v[:1], 64, axis=0) for k, v in batch.items()} | {"index": jnp.arange(64)}
    sde = method.build_sampler("bridge_tts", 200, temperature=1.0)
    drawn = np.asarray(method.sample(PARAMS, jax.random.key(1), many, sde))
    drawn = drawn[:, : int(batch["frames"][0])] * scale
    z0 = z[: drawn.shape[1]]
    error = (drawn - z0 - 1.0).ravel()
    assert error.mean() == pytest.approx(0.0, abs=5 * spread / math.sqrt(error.size))
    times, variance = np.linspace(1 - 1e-5, process.t_min, 201), 0.0
    for i, (t, u) in enumerate(itertools.pairwise(times)):
        b, c = float(process.b(t)), float(process.c(t))
        alpha, alpha_u, r, r_u = (
            float(v) for v in (process.alpha(t), process.alpha(u), process.rho2(t), process.rho2(u))
        )
        gain = b * spread**2 / (b**2 * spread**2 + c**2)
        slope = alpha_u * (r_u / r / alpha + (1 - r_u / r) * gain)
        fresh = alpha_u**2 * r_u * (1 - r_u / r) if i < 199 else 0.0
        variance = slope**2 * variance + fresh
    assert math.sqrt(variance) == pytest.approx(spread, rel=0.1)
    assert error.std() == pytest.approx(math.sqrt(variance), rel=0.05)


def build_still(method, process):
    """A sampler that stays where it starts: x0_hat counts for nothing."""
    from diffusion_jax.samplers.linear import SRC, Rows

    rows = Rows(source=True)
    rows.add(process.point(0.5), SRC)
    return rows.sampler(process.point(0.5))


def test_bridge_tts_network_sees_the_bridge():
    """What the decoder is shown in training is a z + b x0 + c eps."""
    seen = {}

    def decoded(x, t, source):
        seen.update(x=x, t=t, source=source)
        return jnp.zeros_like(x)

    check_shown("bridge_tts", decoded, seen, lambda p, t: (p.a(t), p.b(t), p.c(t)))


def test_grad_tts_network_sees_noise_around_the_encoder():
    """x_t = x0 exp(-B/2) + z (1 - exp(-B/2)) + noise of variance 1 - exp(-B)."""
    seen = {}

    def decoded(x, t, source):
        seen.update(x=x, t=t, source=source)
        return jnp.zeros_like(x)

    def law(process, t):
        total = 0.05 * t + 0.5 * (20.0 - 0.05) * t**2
        kept = np.exp(-0.5 * total)
        return 1.0 - kept, kept, np.sqrt(1.0 - kept**2)

    check_shown("grad_tts", decoded, seen, law)


def check_shown(name, decoded, seen, law):
    batch = utterances(512)
    method = build(name, Stub(decoded), scale=2.0, trains="apart")
    _, metrics = method.loss(PARAMS, jax.random.key(0), batch, Context())
    x, t, z = (np.asarray(seen[k], np.float64) for k in ("x", "t", "source"))
    assert t.min() < 0.01 and t.max() > 0.99
    a, b, c = (np.asarray(v)[:, None, None] for v in law(PROCESS[name], t))
    noise = (x - a * z - b * 2.0 * np.asarray(batch["points"])) / c
    inside = np.arange(T) < np.asarray(batch["frames"])[:, None]
    calm = inside & (c[..., 0] > 0.02)  # elsewhere float32 divides its rounding
    error = 4.0 / math.sqrt(noise[calm].size)
    assert noise[calm].mean() == pytest.approx(0.0, abs=error)
    assert noise[calm].std() == pytest.approx(1.0, abs=error)
    if name == "grad_tts":  # a score of zero: what is left is the noise itself
        own = (np.where(inside[..., None], noise, 0) ** 2).sum((1, 2)) / (batch["frames"] * M)
        np.testing.assert_allclose(metrics["decoder_loss"], own[t > 1e-3].mean(), rtol=0.02)


def test_grad_tts_starts_with_less_noise_at_a_higher_temperature():
    batch = utterances(64)
    inside = np.arange(T) < batch["frames"][:, None]

    def start(temperature):
        network = Stub(lambda x, t, source: source - x)
        options = {"temperature": temperature, "scale": 2.0, "lengths": "frames"}
        method = build("grad_tts", network, **options)
        drawn = method.sample(PARAMS, jax.random.key(0), batch, trajectory=True)
        return 2.0 * np.asarray(drawn[1])[0][inside]

    z, *starts = (start(v) for v in (1e12, 1.0, 4.0))
    assert set(np.round(10 * z.ravel())) <= {4.0, 6.0, 8.0}  # 0.1 (symbol + 1), twice
    for noisy, std in zip(starts, (1.0, 0.5)):
        assert np.std(noisy - z) == pytest.approx(std, rel=0.05)


def test_euler_of_grad_tts():
    """Its published loop: dx = (z - x - score) beta h / 2 at the middle of each step's time."""
    steps, rng = 7, np.random.default_rng(0)
    z = 0.3
    score = lambda x, t: -(x - 0.7) / (1.5 - t)
    x = start = rng.standard_normal((5, 1))
    for i in range(steps):
        t = 1.0 - (i + 0.5) / steps
        beta = 0.05 + (20.0 - 0.05) * t
        x = x - 0.5 * (z - x - score(x, t)) * beta / steps
    process = VP(0.05, 20.0, t_min=1e-5)

    def denoise(r, t):
        return (r + process.sigma(t) ** 2 * score(r + z, t)) / process.alpha(t)

    from diffusion_jax.samplers import euler, sample

    sampler = euler(process, steps, offset=0.5, grid="uniform", t_end=0.0)
    got = sample(sampler, denoise, None, jnp.asarray(start - z, jnp.float32))
    np.testing.assert_allclose(got + z, x, rtol=2e-4, atol=2e-4)
    with pytest.raises(ValueError, match=r"offset must lie in \[0, 1\), got 1.0"):
        euler(process, 5, offset=1.0)


# Construction


def test_scale_is_that_of_the_spectrogram():
    assert natural_scale(SPEC) == 1.0
    audio = {"floor": 1e-5, "ceiling": 2.0}
    heard = DataSpec(**{**{f: getattr(SPEC, f) for f in ("kind", "elements")}, "audio": audio})
    assert natural_scale(heard) == pytest.approx((2.0 + 11.5129) / 2, rel=1e-5)


def test_a_config_takes_its_sizes_from_the_data():
    config = {
        "process": {"name": "gmax_bridge"},
        "network": {"name": "tts", **NETWORK},
        "method": {"name": "bridge_tts"},
    }
    built = builder.build_method(config, SPEC)
    assert built.module.encoder.symbols == 3 and built.module.encoder.mels == M
    assert built.module.speakers == SPEAKERS and built.module.decoder.num_classes == SPEAKERS


@pytest.mark.slow
@pytest.mark.parametrize("paper", ["bridge_tts", "grad_tts"])
def test_full_scale_has_the_size_of_the_paper(paper):
    """Shapes alone: 7.2M parameters in the encoder, 7.6M in the decoder."""
    config = importlib.import_module(f"configs.{paper}.ljspeech").get_config()
    size, letters = config.data.max_frames, 190
    shapes = {"points": (size, 80), "frames": (), "text": (letters,), "text_length": ()}
    kinds = {"points": "float32"}
    elements = {k: Element(v, kinds.get(k, "int32")) for k, v in shapes.items()}
    spec = DataSpec(kind="points", elements=elements, sizes={"text": 150})
    method = builder.build_method(config, spec).method
    batch = spec.zeros(2)
    params = jax.eval_shape(method.init, jax.random.key(0), batch)
    count = {k: sum(math.prod(v.shape) for v in jax.tree.leaves(params[k])) for k in params}
    assert count["encoder"] == pytest.approx(7.2e6, rel=0.1)
    assert count["decoder"] == pytest.approx(7.6e6, rel=0.1)
    loss = lambda p: method.loss(p, jax.random.key(0), batch, Context(batch_size=2))
    assert jax.eval_shape(loss, params)[0].shape == ()
    drawn = jax.eval_shape(lambda p: method.sample(p, jax.random.key(0), batch), params)
    assert drawn.shape == (2, size, 80)
    for options in config.evaluate.samplers:
        asked = {k: v for k, v in options.items() if k != "name"}
        assert method.build_sampler(options["name"], **asked).nfe == options["nfe"]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: build("bridge_tts", process=VP()), "bridge_tts needs a bridge process, got VP"),
        (lambda: build("grad_tts", process=GmaxBridge()), "grad_tts needs a Gaussian process"),
        (lambda: build("grad_tts", temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: build("bridge_tts", trains="both"), "trains must be one of encoder, decoder"),
        (lambda: build("bridge_tts", segment_frames=99), r"must lie in 1\.\.12, got 99"),
        (lambda: build("bridge_tts", length_scale=0.0), "length_scale must be positive"),
        (lambda: build("bridge_tts", scale=-1.0), "scale must be positive, got -1.0"),
        (lambda: build("bridge_tts", flat_start=-1), "flat_start must be a number of steps"),
    ],
)
def test_parts_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()
