"""ADM's U-Net in its two forms against their authors' numbers, and what every field does."""

import jax
import numpy as np
import pytest
from quick_jit import quick_jit
from unet_goldens import abstract, count, official, recomputed, variant

from diffusion_jax import registry
from diffusion_jax.interop import WeightsError, export_state, import_state
from diffusion_jax.interop.adm_unet import adm_unet as layout
from diffusion_jax.networks import ADMUNet

KEY = jax.random.key(0, impl="rbg")  # compiles in a fraction of the time
RNG = np.random.default_rng(0)


def guided(config):
    return ADMUNet(
        channels=config["model_channels"],
        channel_mults=tuple(config["channel_mult"]),
        num_res_blocks=config["num_res_blocks"],
        attention_resolutions=tuple(config["img"] // ds for ds in config["attn_ds"]),
        image_size=config["img"],
        head_channels=config["num_head_channels"],
        scale_shift=config["scale_shift"],
        resblock_updown=config["resblock_updown"],
        new_attention_order=config["new_attn_order"],
        num_classes=config["num_classes"],
        learn_sigma=config["out"] == 2 * config["in"],
    )


def edm(config):
    return ADMUNet(
        origin="edm",
        channels=config["model_channels"],
        channel_mults=tuple(config["channel_mult"]),
        num_res_blocks=config["num_blocks"],
        attention_resolutions=tuple(config["attn"]),
        image_size=config["img"],
        head_channels=8,
        num_classes=config["label_dim"],
    )


def of_variant(config):
    fields = dict(
        channels=config["channels"],
        channel_mults=tuple(config["mult"]),
        num_res_blocks=config["blocks"],
        image_size=config["img"],
        head_channels=config["head"] or None,
        num_classes=config["classes"],
        source_channels=config["in"] - 3,
    )
    if "ds" not in config:
        augment = config["augment"]
        attention = tuple(config["attn"])
        return ADMUNet(**fields, origin="edm", attention_resolutions=attention, augment_dim=augment)
    return ADMUNet(
        **fields,
        attention_resolutions=tuple(config["img"] // ds for ds in config["ds"]),
        heads=config.get("heads", 4),
        heads_upsample=config.get("heads_up"),
        scale_shift=config["scale_shift"],
        resblock_updown=config["updown"],
        conv_resample=config["conv"],
        new_attention_order=config["new"],
        learn_sigma=config["out"] == 6,
    )


OFFICIAL = {"edm_adm": edm, "guided_adm": guided}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_official_outputs(name):
    case = official(name, OFFICIAL[name], layout)
    case.assert_exported()
    assert case.error("float32") < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_official_outputs_in_float64(name):
    with jax.enable_x64(True):
        assert official(name, OFFICIAL[name], layout).error("float64") < 1e-9


@pytest.mark.parametrize("name", ["edm_adm", "guided_legacy", "guided_pooled", "guided_additive"])
def test_outputs_of_other_fields(name):
    case = variant(name, of_variant, layout)
    case.assert_exported()
    with jax.enable_x64(True):
        assert case.error("float64") < 1e-9


def test_names_of_other_code_bases():
    case = official("edm_adm", edm, layout)
    state = {f"model.{name}": array for name, array in case.state.items()}
    params = import_state(layout(case.net, prefix="model."), state, case.shapes)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(case.params)))

    case = official("guided_adm", guided, layout)
    state = {  # attention by convolutions over images
        name: array[..., None] if array.ndim == 3 else array for name, array in case.state.items()
    }
    params = import_state(case.weights, state, case.shapes)
    assert all(map(np.array_equal, jax.tree.leaves(params), jax.tree.leaves(case.params)))
    written = export_state(layout(case.net, attention_axes=2), params)
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in state.items()}


def test_weights_of_another_network_are_refused():
    case = official("guided_adm", guided, layout)
    with pytest.raises(WeightsError, match=r"missing: 1\n    label_emb.weight"):
        less = {k: v for k, v in case.state.items() if k != "label_emb.weight"}
        import_state(case.weights, less, case.shapes)
    with pytest.raises(WeightsError, match=r"(?s)missing: .* unknown: "):
        other = case.net.clone(origin="edm", new_attention_order=False)
        import_state(layout(other), case.state, abstract(other, case.x))
    wrong = case.state | {"label_emb.weight": np.ones((7, 128), np.float32)}
    with pytest.raises(WeightsError, match=r"label_emb.weight has shape \(7, 128\)"):
        import_state(case.weights, wrong, case.shapes)
    for fields, match in (
        (dict(origin="edm", scale_shift=False), "EDM's form has scale_shift"),
        (dict(augment_dim=9), "has no augment_dim"),
        (dict(image_size=None), "names of ADMUNet hold the size of the images"),
    ):
        with pytest.raises(ValueError, match=match):
            layout(case.net.clone(**fields))


SIZES = registry.entry("network", "adm_unet").meta["sizes"]
# The published counts; without variances and with a source beside x, a network has 3 outputs less and 3
# inputs more, and without classes 1000 vectors of 4 times the base width less.
PARAMETERS = {
    "64x64": 295_904_454,
    "128x128": 421_529_606,
    "256x256": 553_838_086,
    "256x256-uncond": 552_814_086,
    "512x512": 558_997_638,
    "edm-imagenet-64x64-cond": 295_899_267,
    "ddbm-edges2handbags-64x64": 295_904_454 - 3 * (9 * 192 + 1) + 3 * 9 * 192 - 1000 * 768,
    "ddbm-diode-256x256": 552_814_086 - 3 * (9 * 256 + 1) + 3 * 9 * 256,
    "dbim-imagenet-256x256": 553_838_086 - 3 * (9 * 256 + 1) + 3 * 9 * 256,
    "i2sb-imagenet-256x256": 552_814_086 - 3 * (9 * 256 + 1),
}


QUICK = ("64x64", "512x512", "edm-imagenet-64x64-cond", "ddbm-edges2handbags-64x64")


@pytest.mark.parametrize(
    "size", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in PARAMETERS]
)
def test_published_sizes(size):
    net = ADMUNet(**SIZES[size])
    side = net.image_size
    source = np.zeros((1, side, side, 3), np.float32) if net.source_channels else None
    x = np.zeros((1, side, side, 3), np.float32)
    assert count(abstract(net, x, source)) == PARAMETERS[size]


def test_every_size_is_counted():
    assert set(SIZES) == {*PARAMETERS, "lsun-256x256"}
    assert SIZES["lsun-256x256"] == SIZES["256x256-uncond"] | {"dropout": 0.1}


# ---- initialisation, conditions, dropout, precision, rematerialisation ---------------------------

SMALL = dict(
    origin="edm",
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    head_channels=8,
    num_classes=4,
    augment_dim=3,
    source_channels=1,
    dropout=0.2,
)
X = RNG.standard_normal((3, 4, 4, 2)).astype(np.float32)
SOURCE = RNG.standard_normal((3, 4, 4, 1)).astype(np.float32)
T = np.array([-0.6, 0.1, 0.9], np.float32)
LABEL, AUGMENT = np.array([0, 3, 1]), RNG.standard_normal((3, 3)).astype(np.float32)


def changed(a, value):
    a = a.copy()
    a[1] = value
    return a


def general(net, seed=1):
    """Parameters in general position."""
    rng = np.random.default_rng(seed)
    draw = lambda a: (0.2 * rng.standard_normal(a.shape)).astype(np.float32)
    return jax.tree.map(draw, abstract(net, X, SOURCE))


def apply(net, params, x=X, t=T, label=LABEL, source=SOURCE, augment=AUGMENT, **options):
    given = dict(label=label, source=source, augment_labels=augment)
    return net.apply({"params": params}, x, t, **given, **options)


ONE_LEVEL = SMALL | dict(channel_mults=(2,), attention_resolutions=())


def test_official_initialisation():
    """Zero, with PyTorch's own initialisation where it is not; EDM's and guided-diffusion's are one."""
    net = ADMUNet(**ONE_LEVEL)
    init = quick_jit(lambda key: net.init_with_output(key, X, T, label=LABEL, source=SOURCE))
    y, variables = init(KEY)
    np.testing.assert_array_equal(y, np.zeros_like(X))
    params = variables["params"]
    block = params["up_0_block_0"]

    def reaches(layer, inputs):
        for part, least in ((layer["kernel"], 0.9), (layer["bias"], 0.5)):
            assert least < np.abs(part).max() * np.sqrt(inputs) <= 1.0

    reaches(params["input"], 9 * 3)
    reaches(params["time_in"], 8)
    reaches(block["conv_in"], 9 * 32)
    reaches(block["modulation"], 32)
    reaches(block["skip"], 32)
    attention = params["middle_block_0"]["attention"]
    reaches(attention["qkv"], 16)
    for zero in (block["conv_out"], attention["out"], params["augment"], params["output"]):
        assert not any(np.any(a) for a in jax.tree.leaves(zero))
    assert params["label"]["table"].shape == (4, 32) and 0.8 < params["label"]["table"].std() < 1.2


@pytest.fixture(scope="module")
def run():
    net = ADMUNet(**SMALL)
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


def test_own_time(run):
    """The network's own time is affine in t."""
    net = ADMUNet(**SMALL)
    told = net.clone(time_scale=4.0, time_offset=0.3)
    params = general(net)
    y = quick_jit(lambda: apply(told, params, t=(T - 0.3) / 4.0))()
    np.testing.assert_allclose(y, run(), rtol=1e-4, atol=1e-5)


def test_a_label_out_of_range_is_nan(run):
    y = run(label=np.array([0, 5, -1]))
    assert np.isfinite(y[0]).all() and np.isnan(y[1:]).all()


def test_absent_conditions_dropout_remat_and_bfloat16():
    net = ADMUNet(**ONE_LEVEL)
    params = general(net)

    def training(net):
        return lambda: apply(net, params, train=True, rngs={"dropout": KEY})

    call = quick_jit(lambda label, augment: apply(net, params, label=label, augment=augment))
    fine, zeros = call(LABEL, AUGMENT), call(np.full(3, 4), np.zeros_like(AUGMENT))
    absent = quick_jit(lambda: apply(net, params, label=None, augment=None))()
    np.testing.assert_allclose(absent, zeros, rtol=1e-5, atol=1e-6)
    coarse = quick_jit(lambda: apply(net.clone(dtype="bfloat16"), params))()
    assert fine.dtype == coarse.dtype == np.float32
    assert 1e-4 < np.linalg.norm(coarse - fine) / np.linalg.norm(fine) < 0.05
    assert np.abs(quick_jit(training(net))() - fine).max() > 1e-2
    assert recomputed(training(net)) == 0
    assert recomputed(training(net.clone(remat=True))) == 5


@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(origin="guided"), "adm_unet: origin must be one of guided_diffusion, edm"),
        (dict(origin="guided_diffusion"), "must be divisible by the number of groups = 32"),
        (dict(new_attention_order=True), "order of attention channels of its own"),
        (dict(channel_mults=()), "channel_mults must name one positive multiplier"),
        (dict(channel_mults=(1, 0.1)), "channel_mults must name one positive multiplier"),
        (
            dict(channel_mults=(1, 1, 1, 1)),
            r"height = 4 must be divisible by 2\*\*\(levels - 1\) = 8",
        ),
        (dict(head_channels=None, heads=3), "attending level = 16 must be divisible by heads = 3"),
        (dict(head_channels=0), "head_channels must be a positive integer"),
        (dict(dropout=-0.1), r"dropout must be in \[0, 1\)"),
        (dict(augment_dim=0), "augment_labels were given to a network without"),
        (dict(source_channels=0), "source was given to a network built without one"),
    ],
)
def test_errors(fields, match):
    net = ADMUNet(**SMALL | fields)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(
            lambda key: net.init(key, X, T, label=LABEL, source=SOURCE, augment_labels=AUGMENT),
            KEY,
        )
