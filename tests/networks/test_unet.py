import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import UNet

KEY = jax.random.key(0)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "shape, fields",
    [
        ((1, 7, 5, 3), dict(channels=6, channel_mults=(1,), heads=3, attention_resolutions=(5,))),
        ((2, 6, 10, 1), dict(channels=10, channel_mults=(1, 3), num_res_blocks=2)),
        ((1, 28, 28, 1), dict(channels=4, channel_mults=(1, 2, 3), attention_resolutions=(14,))),
        ((1, 8, 24, 2), dict(channels=4, channel_mults=(2, 1, 2, 1), middle_attention=False)),
        ((1, 4, 4, 2), dict(channels=5, heads=5, out_channels=7, condition_width=9)),
    ],
)
def test_odd_sizes(shape, fields):
    y, _ = jax.eval_shape(UNet(**fields).init_with_output, KEY, jnp.zeros(shape), 0.5)
    assert y.shape == (*shape[:-1], fields.get("out_channels", shape[-1]))
    assert y.dtype == jnp.float32


@pytest.fixture(scope="module")
def network():
    """A jitted call on 6 x 6 pixels, odd in its channels, heads and coarse resolution."""
    net = UNet(channels=6, channel_mults=(1, 3), attention_resolutions=(3,), heads=3)
    call = jax.jit(net.apply)
    return net, lambda *args: np.asarray(call(*args))


def test_every_layer_reaches_the_output(network, generic):
    net, run = network
    x = normal((2, 6, 6, 3))
    params = generic(net, x, 0.5)
    y = run({"params": params}, x, 0.5)
    assert np.isfinite(y).all() and float(y.std()) > 0.01
    for name in params:
        muted = params | {name: jax.tree.map(np.zeros_like, params[name])}
        assert np.abs(run({"params": muted}, x, 0.5) - y).max() > 1e-4, name


@pytest.mark.parametrize("mirror", ["transpose", "flip"])
def test_mirrored_kernels_mirror_the_output(mirror, network, generic):
    # Holds only if padding, pooling, upsampling and skips treat the picture evenly.
    net, run = network
    x = normal((2, 6, 6, 3))
    params = generic(net, x, 0.5)

    def mirrored(a, axis):
        return np.flip(a, axis) if mirror == "flip" else np.swapaxes(a, axis, axis + 1)

    kernels = jax.tree.map(lambda a: mirrored(a, 0) if a.ndim == 4 else a, params)
    y = run({"params": params}, x, 0.5)
    z = run({"params": kernels}, mirrored(x, 1), 0.5)
    np.testing.assert_allclose(z, mirrored(y, 1), atol=1e-4)
    assert np.abs(run({"params": params}, mirrored(x, 1), 0.5) - z).max() > 1e-2


def attending(**fields):
    shapes = jax.eval_shape(UNet(channels=4, **fields).init, KEY, jnp.zeros((1, 8, 12, 1)), 0.5)
    return sorted(name for name in shapes["params"] if "attention" in name)


def test_attention_is_where_it_was_asked_for():
    both_of_8 = ["down_0_attention_0", "up_0_attention_0", "up_0_attention_1"]
    both_of_4 = ["down_1_attention_0", "up_1_attention_0", "up_1_attention_1"]
    middle = ["middle_attention"]
    assert attending() == middle
    assert attending(middle_attention=False) == []
    assert attending(attention_resolutions=(8, 16)) == sorted(both_of_8 + middle)
    assert attending(attention_resolutions=(4,)) == sorted(both_of_4 + middle)


@pytest.mark.parametrize(
    "shape, fields, match",
    [
        (
            (1, 6, 8, 1),
            dict(channel_mults=(1, 2, 2)),
            r"height = 6 must be .* 2\*\*\(levels - 1\) = 4",
        ),
        ((1, 8, 10, 1), dict(channel_mults=(1, 2, 2)), "width = 10 must be divisible by"),
        ((1, 4, 4, 1), dict(heads=3), "attending level = 8 must be divisible by heads = 3"),
        ((1, 4, 4, 1), dict(channel_mults=()), "channel_mults must name one multiplier"),
        (
            (1, 4, 4, 1),
            dict(channel_mults=(1, 0)),
            r"channel_mults\[1\] must be a positive integer",
        ),
    ],
)
def test_errors(shape, fields, match):
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(UNet(**dict(channels=4) | fields).init, KEY, jnp.zeros(shape), 0.5)
