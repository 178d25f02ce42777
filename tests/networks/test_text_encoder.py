"""The text encoder and the network of text to speech: padding, voices, what gradients reach."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax.networks import TextEncoder, tts

RNG = np.random.default_rng(0)
TEXT = np.array([[3, 1, 2, 5, 4], [2, 2, 1, 0, 0], [5, 0, 0, 0, 0]])
LENGTH = np.array([5, 3, 1])
SPEAKER = np.array([0, 1, 1])
SMALL = dict(width=8, depth=2, heads=2, duration_width=8, prenet_layers=2)


@pytest.fixture(scope="module")
def encoder():
    """`(call, slopes)` of an encoder in general position."""
    network = TextEncoder(symbols=5, mels=3, speakers=2, **SMALL)
    shapes = jax.eval_shape(network.init, jax.random.key(0), TEXT, LENGTH, SPEAKER)["params"]
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten([0.5 * RNG.standard_normal(v.shape).astype(np.float32) for v in leaves])

    @quick_jit
    def call(text, length, speaker):
        return network.apply({"params": params}, text, length, speaker)

    def slope(params):
        return network.apply({"params": params}, TEXT, LENGTH, SPEAKER)[1].sum()

    return call, quick_jit(jax.grad(slope))(params)


def test_padding_does_not_change_the_rest(encoder):
    call, _ = encoder
    mean, log_duration = call(TEXT, LENGTH, SPEAKER)
    assert mean.shape == (3, 5, 3) and log_duration.shape == (3, 5)
    inside = np.arange(5) < LENGTH[:, None]
    assert (np.asarray(mean)[~inside] == 0).all() and (np.asarray(log_duration)[~inside] == 0).all()
    other = call(np.where(inside, TEXT, 4), LENGTH, SPEAKER)
    np.testing.assert_allclose(mean, other[0], atol=1e-6)
    longer = np.pad(TEXT, ((0, 0), (0, 4)), constant_values=3)
    wide, wide_log = call(longer, LENGTH, SPEAKER)
    np.testing.assert_allclose(wide[:, :5], mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(wide_log[:, :5], log_duration, rtol=1e-4, atol=1e-5)


def test_symbols_and_voices_are_heard(encoder):
    call, _ = encoder
    mean, log_duration = (np.asarray(v) for v in call(TEXT, LENGTH, SPEAKER))
    changed = TEXT.copy()
    changed[0, 4] = 1
    other = np.asarray(call(changed, LENGTH, SPEAKER)[0])
    assert (np.abs(other[0] - mean[0]).max(axis=-1) > 1e-4).all()  # every symbol sees the others
    np.testing.assert_allclose(other[1:], mean[1:], atol=1e-6)
    voice = [np.asarray(v) for v in call(TEXT, LENGTH, 1 - SPEAKER)]
    assert np.abs(voice[0] - mean).max() > 1e-3 and np.abs(voice[1] - log_duration).max() > 1e-3


def test_durations_teach_the_duration_predictor_alone(encoder):
    _, slopes = encoder
    for name, branch in slopes.items():
        largest = max(np.abs(v).max() for v in jax.tree.leaves(branch))
        assert (largest > 0) == name.startswith("duration"), name


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(width=9), "width = 9 must be divisible by heads = 2"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(depth=0), "depth must be a positive integer, got 0"),
    ],
)
def test_bad_fields(change, words):
    network = TextEncoder(symbols=5, mels=3, **{**SMALL, **change})
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(network.init, jax.random.key(0), TEXT, LENGTH)


def test_bad_inputs():
    network = TextEncoder(symbols=5, mels=3, speakers=2, **SMALL)
    start = lambda *a: jax.eval_shape(network.init, jax.random.key(0), *a)
    with pytest.raises(ValueError, match="speaker is missing; the network has 2 speakers"):
        start(TEXT, LENGTH)
    with pytest.raises(ValueError, match=r"text must be integers \[B, L\], got float32"):
        start(TEXT.astype(np.float32), LENGTH, SPEAKER)
    with pytest.raises(ValueError, match=r"text_length must be \[B\] = \(3,\)"):
        start(TEXT, LENGTH[:2], SPEAKER)
    with pytest.raises(ValueError, match=r"speaker must be integers \[B\] = \(3,\)"):
        start(TEXT, LENGTH, SPEAKER[:1])


@pytest.fixture(scope="module")
def decode():
    network = tts(
        symbols=5,
        mels=6,  # neither side fits the levels: both are padded
        speakers=2,
        patch=2,
        encoder=SMALL,
        decoder=dict(channels=4, channel_mults=(1, 2), heads=1),
    )
    x = jnp.zeros((3, 7, 6))
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), x, jnp.zeros(3), TEXT, LENGTH, SPEAKER
    )["params"]
    leaves, tree = jax.tree.flatten(shapes)
    params = tree.unflatten([0.3 * RNG.standard_normal(v.shape).astype(np.float32) for v in leaves])
    return quick_jit(
        lambda *a: network.apply({"params": {"decoder": params["decoder"]}}, *a, method="decode")
    )


def test_the_decoder_reads_and_writes_inside_the_mask_only(decode):
    x, source = RNG.standard_normal((2, 3, 7, 6)).astype(np.float32)
    mask, t = np.arange(7) < np.array([7, 4, 1])[:, None], np.array([0.2, 0.5, 0.9], np.float32)
    y = np.asarray(decode(x, t, source, mask, SPEAKER))
    assert y.shape == x.shape and (y[~mask] == 0).all() and (np.abs(y[mask]) > 0).any()
    x2, source2 = (np.where(mask[..., None], v, 9.0).astype(np.float32) for v in (x, source))
    np.testing.assert_allclose(decode(x2, t, source2, mask, SPEAKER), y, atol=1e-5)
    for other in (
        decode(x + 0.5, t, source, mask, SPEAKER),
        decode(x, t, source + 0.5, mask, SPEAKER),
        decode(x, t, source, mask, 1 - SPEAKER),
        decode(x, 0.5 * t, source, mask, SPEAKER),
        decode(x, t, source, np.ones_like(mask), SPEAKER),
    ):
        assert np.abs(np.asarray(other)[1][mask[1]] - y[1][mask[1]]).max() > 1e-4


def test_decoders_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"must be an image network, got 'mlp'; valid: .*dit, .*unet"
    ):
        tts(symbols=3, mels=4, decoder={"name": "mlp"})
    with pytest.raises(ValueError, match="unexpected keyword argument 'chanels'"):
        tts(symbols=3, mels=4, decoder={"chanels": 4})
