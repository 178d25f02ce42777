import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import registry
from diffusion_jax.guidance import guide
from diffusion_jax.interop import WeightsError, export_state, import_state
from diffusion_jax.interop.dit import dit as layout
from diffusion_jax.networks import DiT
from diffusion_jax.networks.features import sincos_positions, time_features

KEY = jax.random.key(0)
# Trainable parameters with 1000 classes and learned variance, and the entries of the frozen table.
COUNTS = {
    "S/2": (32_865_056, 98_304),
    "S/4": (32_920_448, 24_576),
    "S/8": (33_142_016, 6_144),
    "B/2": (130_315_808, 196_608),
    "B/4": (130_426_496, 49_152),
    "B/8": (130_869_248, 12_288),
    "L/2": (457_840_672, 262_144),
    "L/4": (457_988_224, 65_536),
    "L/8": (458_578_432, 16_384),
    "XL/2": (674_834_720, 294_912),
    "XL/4": (675_000_704, 73_728),
    "XL/8": (675_664_640, 18_432),
}
GOLDEN = dict(
    patch_size=2, width=48, depth=2, heads=4, num_classes=7, out_channels=8, time_scale=1.0
)


def count(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


def channels_last(image):
    return np.moveaxis(image, 1, -1)


def official():
    return {k[2:]: v for k, v in golden("systems_net_dit").items() if k.startswith("w/")}


def abstract(net, shape=(1, 8, 8, 4)):
    return jax.eval_shape(net.init, KEY, jnp.zeros(shape), jnp.zeros(1))["params"]


def imported(net):
    return import_state(layout(net), official(), abstract(net))


def test_sizes_are_the_published_ones():
    assert set(registry.entry("network", "dit").meta["sizes"]) == set(COUNTS)


@pytest.mark.parametrize("size", sorted(COUNTS))
def test_has_the_parameters_of_the_paper(size):
    fields = registry.entry("network", "dit").meta["sizes"][size]
    net = DiT(**fields, out_channels=8, num_classes=1000)
    trainable, table = COUNTS[size]
    assert count(abstract(net, (1, 32, 32, 4))) == trainable
    side = 32 // net.patch_size
    assert sincos_positions(side, side, net.width).size == table


@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-5), ("float64", 1e-9)])
def test_official_outputs(dtype, tolerance):
    numbers = golden("systems_net_dit")
    x, t, label = channels_last(numbers["in/x"]), numbers["in/t"], numbers["in/y"]
    net = DiT(**GOLDEN, dtype=dtype)
    params = imported(DiT(**GOLDEN))
    total = json.loads(str(numbers["config"]))["n_params"]
    assert count(params) + official()["pos_embed"].size == total
    with jax.enable_x64(dtype == "float64"):
        y = quick_jit(net.apply)({"params": params}, x.astype(dtype), t, label=label)
        assert y.dtype == dtype
    np.testing.assert_allclose(y, channels_last(numbers["out/f64"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize("channels, case", [(3, "three"), (4, "all")])
def test_official_guided_outputs(channels, case):
    # The guided half of the official output: prediction, then the variance of the conditional model.
    numbers = golden("systems_net_dit")
    x, t, label = channels_last(numbers["in/x"]), numbers["in/t"], numbers["in/y"]
    net = DiT(**GOLDEN)
    apply, params = quick_jit(net.apply), imported(net)

    def told(label):
        return lambda x, t: apply({"params": params}, x, t, label=label)

    got = guide(told(label), told(np.full(3, 7)), 1.5, channels)(x, t)
    expected = channels_last(numbers[f"out/cfg_{case}_channels_f64"])
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-5)
    assert np.abs(expected - numbers["out/f64"].transpose(0, 2, 3, 1)).max() > 1e-2


def test_positions_and_time_features_are_the_official_tables():
    tables = golden("systems_tables_dit")
    for name, table in tables.items():
        kind, _, size = name.partition("/")
        if kind == "dit_sincos2d":
            features, side = (int(part.strip("dimgr")) for part in size.split("_"))
            got = sincos_positions(side, side, features)
            np.testing.assert_allclose(got, table, rtol=0, atol=1e-7)
        if kind == "emb_cos_first":
            features, times = int(size.removeprefix("dim")), tables["times"]
            got = time_features(jnp.asarray(times), features, scale=1.0)
            np.testing.assert_allclose(got, table, rtol=0, atol=5e-5)
            with jax.enable_x64(True):
                got = time_features(jnp.asarray(times), features, scale=1.0, dtype="float64")
            np.testing.assert_allclose(got, table, rtol=0, atol=1e-12)


def test_weights_go_there_and_back():
    net, state = DiT(**GOLDEN), official()
    back = export_state(layout(net, image_size=8), imported(net))
    assert set(back) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    assert "pos_embed" not in export_state(layout(net), imported(net))


def test_other_weights_are_refused():
    net, state = DiT(**GOLDEN), official()
    params = abstract(net)
    rest = {k: v for k, v in state.items() if k != "blocks.1.attn.qkv.bias"}
    with pytest.raises(WeightsError, match=r"missing: 1\s+blocks.1.attn.qkv.bias"):
        import_state(layout(net), rest, params)
    with pytest.raises(WeightsError, match=r"unknown: 1\s+head.weight"):
        import_state(layout(net), state | {"head.weight": np.zeros(3)}, params)
    with pytest.raises(WeightsError, match="unknown: 10"):
        shallow = DiT(**GOLDEN | {"depth": 1})
        import_state(layout(shallow), state, abstract(shallow))
    with pytest.raises(WeightsError, match="patches have side 4 here"):
        coarse = DiT(**GOLDEN | {"patch_size": 4})
        import_state(layout(coarse), state, abstract(coarse))
    with pytest.raises(WeightsError, match=r"y_embedder\.embedding_table\.weight has shape"):
        more = DiT(**GOLDEN | {"num_classes": 8})
        import_state(layout(more), state, abstract(more))
    with pytest.raises(ValueError, match="source_channels must be 0"):
        layout(DiT(source_channels=1))
    with pytest.raises(ValueError, match="image_size = 7 must be divisible by patch_size = 2"):
        layout(net, image_size=7)


def test_starts_as_the_official_network_does():
    net = DiT(width=64, depth=2, heads=2, num_classes=10)
    key = jax.random.key(0, impl="rbg")
    params = quick_jit(net.init)(key, jnp.zeros((1, 4, 4, 8)), jnp.zeros(1))["params"]
    condition, block = params["condition"], params["blocks"]["block"]
    for kernel in (condition["time_in"]["kernel"], condition["time_out"]["kernel"]):
        assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert condition["label"]["table"].std() == pytest.approx(0.02, rel=0.15)
    kernels = [params["input"]["kernel"], block["attention"]["qkv"]["kernel"][1]]
    kernels += [block["attention"]["out"]["kernel"][0], block["mlp_in"]["kernel"][1]]
    kernels += [block["mlp_out"]["kernel"][0]]
    for kernel in kernels:  # Xavier: uniform within sqrt(6 / (inputs + outputs))
        bound = (6 / sum(kernel.shape)) ** 0.5
        assert 0.98 * bound < np.abs(kernel).max() <= bound
        assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.05)
    zero = [block["modulation"], params["output_modulation"], params["output"]]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero))
    biases = jax.tree_util.tree_leaves_with_path(params)
    assert not any(np.any(leaf) for path, leaf in biases if path[-1].key == "bias")


def test_a_small_network_may_start_with_large_conditions():
    net = DiT(width=64, depth=1, heads=2, num_classes=10, condition_stddev=None)
    params = quick_jit(net.init)(KEY, jnp.zeros((1, 4, 4, 1)), jnp.zeros(1))["params"]
    assert params["condition"]["label"]["table"].std() == pytest.approx(1.0, rel=0.15)
    assert params["condition"]["time_out"]["kernel"].std() == pytest.approx(64**-0.5, rel=0.05)


def test_parameters_serve_every_size(generic):
    net = DiT(width=16, depth=1, heads=2, out_channels=2)
    params = generic(net, jnp.zeros((1, 4, 4, 3)), 0.5)
    for height, width in ((4, 4), (2, 8), (10, 6)):
        x = jax.random.normal(KEY, (2, height, width, 3))
        y = quick_jit(net.apply)({"params": params}, x, 0.5)
        assert y.shape == (2, height, width, 2) and np.isfinite(y).all()


def test_output_patches_lie_on_input_patches(generic):
    # With closed gates the network maps every patch by itself, so a changed
    # pixel must change its own patch and no other.
    net = DiT(patch_size=2, width=16, depth=2, heads=2)
    x = jax.random.normal(KEY, (1, 6, 4, 1))
    params = generic(net, x, 0.5)
    modulation = params["blocks"]["block"]["modulation"]["linear"]
    modulation |= jax.tree.map(np.zeros_like, modulation)
    apply = quick_jit(net.apply)
    y = apply({"params": params}, x, 0.5)
    z = apply({"params": params}, x.at[0, 4, 1].add(1.0), 0.5)
    changed = np.asarray(np.abs(y - z)[0, :, :, 0] > 1e-4)
    expected = np.zeros((6, 4), bool)
    expected[4:6, 0:2] = True
    np.testing.assert_array_equal(changed, expected)


def test_errors():
    with pytest.raises(ValueError, match="width = 6 must be divisible by patch_size = 4"):
        jax.eval_shape(DiT(patch_size=4).init, KEY, jnp.zeros((1, 8, 6, 1)), 0.5)
    with pytest.raises(ValueError, match="width divisible by 4, got 6"):
        jax.eval_shape(DiT(width=6, heads=2).init, KEY, jnp.zeros((1, 8, 8, 1)), 0.5)
