"""The Inception-v3 of FID against PyTorch, on random weights drawn by name."""

import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.interop.inception import abstract, inception
from diffusion_jax.interop.mapping import WeightsError, export_state, import_state
from diffusion_jax.networks import inception as net
from tests.golden_files import golden
from tests.quick_jit import quick_jit

BLOCKS = {
    "stem": net.ConvNorm(12, (3, 3), 2, "VALID"),
    "a": net.MixedA(32),
    "b": net.MixedB(),
    "c": net.MixedC(16),
    "d": net.MixedD(),
    "e_mean": net.MixedE("mean"),
    "e_max": net.MixedE("max"),
}
STEM = {"kernel": "conv.weight", "scale": "bn.weight", "bias": "bn.bias", "mean": "bn.running_mean"}
STEM["var"] = "bn.running_var"


def draw(name, shape):
    """The recipe of the golden: an array of the state dict from its name and PyTorch's shape."""
    z = np.random.default_rng([1512, zlib.crc32(name.encode())])
    z = z.standard_normal(shape, dtype=np.float32)
    if name.endswith("running_var"):
        return 0.5 + np.abs(z)
    if name.endswith("bn.weight"):
        return 1 + np.float32(0.1) * z
    if name.endswith((".bias", "running_mean")):
        return np.float32(0.1) * z
    return z * np.float32((2.0 / np.prod(shape[1:])) ** 0.5)


@functools.cache
def state_dict():
    stored = golden("networks_inception")
    ends = np.cumsum(stored["ranks"])
    shapes = np.split(stored["shapes"], ends[:-1])
    return {str(n): draw(str(n), tuple(s)) for n, s in zip(stored["names"], shapes)}


def block_params(prefix, shapes):
    def leaf(path, shape):
        layer, name = [key.key for key in path][:-1], path[-1].key
        full = ".".join([prefix, *layer, STEM[name]])
        if name != "kernel":
            return draw(full, shape.shape)
        return draw(full, tuple(shape.shape[i] for i in (3, 2, 0, 1))).transpose(2, 3, 1, 0)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_of_each_kind(name):
    stored, block = golden("networks_inception"), BLOCKS[name]
    x = stored["block_x"][..., :5] if name == "stem" else stored["block_x"]
    shapes = jax.eval_shape(block.init, jax.random.key(0), x)["params"]
    out = quick_jit(block.apply)({"params": block_params(name, shapes)}, x)
    np.testing.assert_allclose(out[..., ::4], stored[f"block/{name}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preparation", net.PREPARATIONS)
def test_images_are_prepared_as_the_reference_does(preparation):
    stored = golden("networks_inception")
    x = net.prepare(jnp.asarray(stored["images"]), preparation)
    assert x.shape == (2, net.SIZE, net.SIZE, 3) and x.dtype == jnp.float32
    np.testing.assert_allclose(x[:, ::23, ::23], stored[f"{preparation}/prepared"], atol=2e-6)


@pytest.mark.parametrize("preparation", net.PREPARATIONS)
@pytest.mark.parametrize("shape", [(299, 299), (31, 301), (400, 7), (1, 2)])
def test_resizing_keeps_constants_and_in_between_stays_linear(shape, preparation):
    weights = [net.resize_weights(n, net.SIZE, preparation) for n in shape]
    for n, matrix in zip(shape, weights):
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-6)
        assert matrix.min() >= 0 and np.count_nonzero(matrix, axis=1).max() <= 2
        if n == net.SIZE:
            np.testing.assert_array_equal(matrix, np.eye(n, dtype=np.float32))


def test_grey_images_are_three_equal_channels():
    grey = np.arange(24, dtype=np.uint8).reshape(1, 4, 6, 1)
    np.testing.assert_array_equal(net.prepare(grey), net.prepare(np.repeat(grey, 3, axis=-1)))


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\].*got \(4, 4, 3\)"):
        net.prepare(jnp.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match="preparation must be one of"):
        net.prepare(jnp.zeros((1, 4, 4, 3)), "tensorflow2")


def test_the_layout_is_that_of_the_published_file():
    shapes = abstract()
    state = state_dict()
    assert sum(x.size for x in jax.tree.leaves(shapes)) == sum(v.size for v in state.values())
    learned = sum(v.size for n, v in state.items() if "running" not in n)
    assert (
        learned == 23_834_568 + 8 * 2049
    )  # torchvision's without its auxiliary head, 8 classes more
    params = import_state(inception(), state, shapes)
    back = export_state(inception(), params)
    assert set(back) == set(state)
    assert all(np.array_equal(back[name], state[name]) for name in state)
    counters = {"Mixed_5b.branch1x1.bn.num_batches_tracked": np.int64(0)}
    import_state(inception(), state | counters, shapes)

    other = dict(state)
    other["fc.weight"] = np.zeros((1000, 2048), np.float32)
    with pytest.raises(WeightsError, match=r"fc\.weight.*1000"):
        import_state(inception(), other, shapes)
    with pytest.raises(WeightsError, match=r"unknown: 1\n    AuxLogits\.fc\.weight"):
        import_state(inception(), state | {"AuxLogits.fc.weight": np.zeros(3)}, shapes)


@pytest.mark.parametrize("preparation", net.PREPARATIONS)
def test_the_whole_network(preparation):
    stored, module = golden("networks_inception"), net.InceptionV3(preparation)
    params = import_state(inception(module), state_dict(), abstract(module))
    out = quick_jit(module.apply)({"params": params}, stored["images"])
    for name, size in (net.DIMENSIONS | {"unbiased": 1008}).items():
        assert out[name].shape == (2, size) and out[name].dtype == jnp.float32
        reference = stored[f"{preparation}/{name}"]
        np.testing.assert_allclose(out[name], reference, atol=1e-5, rtol=1e-5)
