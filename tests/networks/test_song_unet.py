"""DDPM++ and NCSN++ against their authors' numbers, and what every field does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit
from unet_goldens import abstract, count, official, recomputed, variant

from diffusion_jax import registry
from diffusion_jax.interop import WeightsError, import_state
from diffusion_jax.interop.song_unet import song_unet as layout
from diffusion_jax.networks import SongUNet
from diffusion_jax.networks.unet_blocks import fir_downsample, fir_upsample

KEY = jax.random.key(0, impl="rbg")  # compiles in a fraction of the time
RNG = np.random.default_rng(0)


def of_golden(config):
    fourier = {"embedding": "fourier", "encoder": "residual", "noise_mult": 2}
    return SongUNet(
        channels=config["model_channels"],
        channel_mults=tuple(config["channel_mult"]),
        num_res_blocks=config["num_blocks"],
        attention_resolutions=tuple(config["attn"]),
        image_size=config["img"],
        resample_filter=tuple(config["filter"]),
        num_classes=config["label_dim"],
        augment_dim=config["augment_dim"],
        **(fourier if config["arch"] == "ncsnpp" else {}),
    )


def of_variant(config):
    return SongUNet(
        channels=config["channels"],
        channel_mults=tuple(config["mult"]),
        num_res_blocks=config["blocks"],
        attention_resolutions=tuple(config["attn"]),
        image_size=config["img"],
        resample_filter=tuple(config["filter"]),
        num_classes=config["classes"],
        augment_dim=config["augment"],
        out_channels=config["out"],
        source_channels=config["in"] - 3,
        **{k: config[k] for k in ("embedding", "encoder", "decoder", "noise_mult") if k in config},
    )


@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp"])
def test_official_outputs(name):
    case = official(name, of_golden, layout)
    case.assert_exported()
    assert case.error("float32") < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm_ddpmpp", "edm_ncsnpp"])
def test_official_outputs_in_float64(name):
    with jax.enable_x64(True):
        assert official(name, of_golden, layout).error("float64") < 1e-9


@pytest.mark.parametrize("name", ["song_plain", "song_skip", "song_residual"])
def test_outputs_of_other_fields(name):
    case = variant(name, of_variant, layout)
    case.assert_exported()
    with jax.enable_x64(True):
        assert case.error("float64") < 1e-9


def test_weights_of_a_preconditioned_network():
    case = official("edm_ddpmpp", of_golden, layout)
    weights = layout(case.net, prefix="model.")
    state = {f"model.{name}": array for name, array in case.state.items()}
    params = import_state(weights, state, case.shapes)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(case.params)))
    assert set(weights.buffers()) <= set(state)


def test_weights_of_another_network_are_refused():
    case = official("edm_ncsnpp", of_golden, layout)
    less = {k: v for k, v in case.state.items() if k != "enc.8x8_aux_residual.weight"}
    with pytest.raises(WeightsError, match=r"missing: 1\n    enc.8x8_aux_residual.weight"):
        import_state(case.weights, less, case.shapes)
    with pytest.raises(WeightsError, match=r"unknown: 1\n    map_label.weight"):
        import_state(case.weights, case.state | {"map_label.weight": np.ones(1)}, case.shapes)
    wrong = case.state | {"dec.8x8_in0.qkv.weight": np.ones((96, 32, 3, 3), np.float32)}
    with pytest.raises(WeightsError, match=r"dec.8x8_in0.qkv.weight has shape \(96, 32, 3, 3\)"):
        import_state(case.weights, wrong, case.shapes)
    with pytest.raises(ValueError, match="names of SongUNet hold the size of the images"):
        layout(case.net.clone(image_size=None))
    assert layout(case.net.clone(image_size=None), image_size=16).names() == case.weights.names()
    with pytest.raises(ValueError, match="image_size = 15 must be divisible by"):
        layout(case.net.clone(image_size=15))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
SIZES = registry.entry("network", "song_unet").meta["sizes"]


@pytest.mark.parametrize(
    "size, parameters",
    [
        ("cifar10-32x32-uncond-vp", 55_733_891),
        slow("cifar10-32x32-cond-vp", 55_735_299),
        slow("cifar10-32x32-uncond-ve", 56_397_827),
        ("cifar10-32x32-cond-ve", 56_400_643),
        slow("ffhq-64x64-uncond-vp", 61_805_571),
        ("ffhq-64x64-uncond-ve", 62_761_091),
    ],
)
def test_published_sizes(size, parameters):
    net = SongUNet(**SIZES[size])
    x = np.zeros((1, net.image_size, net.image_size, 3), np.float32)
    assert count(abstract(net, x)) == parameters
    if size == "cifar10-32x32-uncond-vp":
        assert count(abstract(net.clone(augment_dim=0), x)) == 55_732_739
    if size.startswith("ffhq"):
        assert SIZES[size.replace("ffhq", "afhqv2")] == SIZES[size] | {"dropout": 0.25}


def test_official_initialisation():
    net = SongUNet(
        channels=16,
        channel_mults=(2,),
        num_res_blocks=1,
        attention_resolutions=(4,),
        embedding="fourier",
        num_classes=3,
        augment_dim=9,
    )
    x, label = RNG.standard_normal((2, 4, 4, 3)), np.array([1, 3])
    init = quick_jit(lambda key: net.init_with_output(key, x, np.float32(0.2), label=label))
    y, variables = init(KEY)
    params = variables["params"]
    assert np.abs(y).max() < 1e-3 and np.abs(y).max() > 0
    block = params["down_0_block_0"]

    def reaches(kernel, bound):
        assert 0.9 * bound < np.abs(kernel).max() <= bound

    reaches(block["conv_in"]["kernel"], np.sqrt(6 / (9 * (16 + 32))))
    reaches(block["conv_out"]["kernel"], 1e-5 * np.sqrt(6 / (9 * 64)))
    reaches(block["attention"]["qkv"]["kernel"], np.sqrt(0.2) * np.sqrt(6 / (32 + 96)))
    reaches(block["attention"]["out"]["kernel"], 1e-5 * np.sqrt(6 / 64))
    reaches(params["output"]["kernel"], 1e-5 * np.sqrt(6 / (9 * 35)))
    reaches(params["label"]["table"], np.sqrt(6 / (3 + 16)))
    reaches(params["augment"]["kernel"], np.sqrt(6 / (9 + 16)))
    reaches(params["time_in"]["kernel"], np.sqrt(6 / (16 + 64)))
    drawn = params["time_features"]["frequencies"]
    assert drawn.shape == (8,) and 5 < drawn.std() < 30
    biases = [
        a
        for path, a in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key in ("bias", "label_bias")
    ]
    assert len(biases) > 20 and not any(np.any(a) for a in biases)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 5, 3), (1, 0, 2, 4, -1, 3)])
def test_filters(taps):
    """Against convolution written out, and the two ways against each other: up is 4 times down's adjoint."""
    x, y = RNG.standard_normal((1, 6, 4, 2)), RNG.standard_normal((1, 3, 2, 2))
    line = np.array(taps) / sum(taps)
    pad = len(taps) // 2 - 1
    padded = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    wanted = np.zeros((1, 3, 2, 2))
    for i in range(3):
        for j in range(2):
            window = padded[0, 2 * i : 2 * i + len(taps), 2 * j : 2 * j + len(taps)]
            wanted[0, i, j] = np.einsum("i,j,ijc->c", line, line, window)
    small, large = fir_downsample(jnp.asarray(x), taps), fir_upsample(jnp.asarray(y), taps)
    np.testing.assert_allclose(small, wanted, atol=1e-6)
    assert large.shape == x.shape
    assert np.vdot(large, x) == pytest.approx(4 * np.vdot(y, wanted), abs=1e-5)


# ---- conditions, dropout, precision, rematerialisation -------------------------------------------

SMALL = dict(
    channels=8,
    channel_mults=(1, 1),
    num_res_blocks=1,
    attention_resolutions=(2,),
    encoder="residual",
    resample_filter=(1, 3, 3, 1),
    num_classes=4,
    augment_dim=3,
    source_channels=1,
    dropout=0.2,
)
X, SOURCE = RNG.standard_normal((3, 4, 4, 2)), RNG.standard_normal((3, 4, 4, 1))
X, SOURCE = X.astype(np.float32), SOURCE.astype(np.float32)
T = np.array([-0.6, 0.1, 0.9], np.float32)
LABEL, AUGMENT = np.array([0, 3, 1]), RNG.standard_normal((3, 3)).astype(np.float32)


def changed(a, value):
    a = a.copy()
    a[1] = value
    return a


def general(net, seed=1):
    """Parameters in general position."""
    rng = np.random.default_rng(seed)
    draw = lambda a: (0.3 * rng.standard_normal(a.shape)).astype(np.float32)
    return jax.tree.map(draw, abstract(net, X, SOURCE))


def apply(net, params, x=X, t=T, label=LABEL, source=SOURCE, augment=AUGMENT, **options):
    given = dict(label=label, source=source, augment_labels=augment)
    return net.apply({"params": params}, x, t, **given, **options)


@pytest.fixture(scope="module")
def run():
    net = SongUNet(**SMALL)
    params = general(net)
    call = quick_jit(lambda *given: apply(net, params, *given))

    def called(x=X, t=T, label=LABEL, source=SOURCE, augment=AUGMENT):
        return np.asarray(call(x, t, label, source, augment))

    return called


@pytest.mark.parametrize(
    "other",
    [
        {"x": changed(X, -X[1])},
        {"t": changed(T, 0.2)},
        {"label": changed(LABEL, 2)},
        {"label": changed(LABEL, 4)},
        {"source": changed(SOURCE, -SOURCE[1])},
        {"augment": changed(AUGMENT, 0.0)},
    ],
)
def test_a_condition_changes_its_own_example(run, other):
    y, z = run(), run(**other)
    assert np.abs(y[1] - z[1]).max() > 1e-3
    np.testing.assert_allclose(y[::2], z[::2], rtol=1e-5, atol=1e-6)


def test_a_label_out_of_range_is_nan(run):
    y = run(label=np.array([0, 5, -1]))
    assert np.isfinite(y[0]).all() and np.isnan(y[1:]).all()


ONE_LEVEL = SMALL | dict(channels=4, channel_mults=(1,), attention_resolutions=(4,))


def test_absent_conditions_are_zeros():
    net = SongUNet(**ONE_LEVEL)
    params = general(net)
    given = quick_jit(lambda label, augment: apply(net, params, label=label, augment=augment))
    y = given(np.full(3, 4), np.zeros_like(AUGMENT))
    z = quick_jit(lambda: apply(net, params, label=None, augment=None))()
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-6)


def test_training_gradients_dropout_remat_and_bfloat16():
    net = SongUNet(**ONE_LEVEL)
    params = general(net)

    def loss(params, net):
        y = apply(net, params, train=True, rngs={"dropout": KEY})
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    gradients = jax.value_and_grad(lambda p: loss(p, net), has_aux=True)
    (_, y), g = quick_jit(gradients)(params)
    for path, a in jax.tree_util.tree_leaves_with_path(g):
        assert np.abs(a).max() > 1e-6, path
    assert recomputed(lambda: loss(params, net)) == 0
    assert recomputed(lambda: loss(params, net.clone(remat="dots"))) == 5
    fine, coarse = (
        np.asarray(quick_jit(lambda n=n: apply(n, params))())
        for n in (net, net.clone(dtype="bfloat16"))
    )
    assert np.abs(fine - y).max() > 1e-2  # dropout
    assert fine.dtype == coarse.dtype == np.float32
    assert 1e-4 < np.linalg.norm(coarse - fine) / np.linalg.norm(fine) < 0.05


@pytest.mark.parametrize(
    "fields, match",
    [
        (
            dict(embedding="fourrier"),
            "song_unet: embedding must be one of .*did you mean 'fourier'",
        ),
        (dict(encoder="skips"), "song_unet: encoder must be one of"),
        (dict(decoder=None), "song_unet: decoder must be one of"),
        (dict(resample_filter=(1, 2, 1)), "resample_filter must be an even number of taps"),
        (dict(resample_filter=(1, -1)), "resample_filter must be an even number of taps"),
        (dict(channel_mults=()), "channel_mults must name one multiplier"),
        (
            dict(channel_mults=(1, 1, 1, 1)),
            r"height = 4 must be divisible by 2\*\*\(levels - 1\) = 8",
        ),
        (dict(heads=3), "channels of an attending level = 8 must be divisible by heads = 3"),
        (dict(image_size=0), "image_size must be a positive integer"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (dict(dtype="int8"), "dtype must be a floating dtype"),
        (dict(augment_dim=0), "augment_labels were given to a network without"),
        (dict(augment_dim=4), r"augment_labels must be floating \[B, augment_dim\] = \(3, 4\)"),
        (dict(num_classes=None), "label was given to an unconditional network"),
    ],
)
def test_errors(fields, match):
    net = SongUNet(**SMALL | fields)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(
            lambda key: net.init(
                key, X, T, label=LABEL, source=SOURCE, augment_labels=jnp.asarray(AUGMENT)
            ),
            KEY,
        )
