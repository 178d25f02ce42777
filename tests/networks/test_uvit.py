import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import registry
from diffusion_jax.interop import WeightsError, export_state, import_state
from diffusion_jax.interop.uvit import uvit as layout
from diffusion_jax.methods.base import Network
from diffusion_jax.networks import UViT
from diffusion_jax.networks.layers import BlockStyle, TransformerBlock

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
# Official counts, the (latent) images they were trained on, and the number of classes.
COUNTS = {
    "CIFAR-10 S/2": (44_255_328, (32, 32, 3), None),
    "CelebA-64 S/4": (44_292_228, (64, 64, 3), None),
    "ImageNet-64 M/4": (130_940_292, (64, 64, 3), 1000),
    "ImageNet-64 L/4": (286_827_652, (64, 64, 3), 1000),
    "ImageNet-256 L/2": (286_763_172, (32, 32, 4), 1000),
    "ImageNet-256 H/2": (500_832_016, (32, 32, 4), 1000),
    "ImageNet-512 L/4": (286_861_524, (64, 64, 4), 1000),
    "ImageNet-512 H/4": (500_942_656, (64, 64, 4), 1000),
    "COCO S/2": (44_692_644, (32, 32, 4), None),
    "COCO S/2 deep": (58_345_636, (32, 32, 4), None),
}
GOLDEN = dict(patch_size=2, width=40, depth=4, heads=4, time_scale=1.0)
SMALL = dict(patch_size=2, width=16, depth=4, heads=2)
LABELLED = SMALL | dict(num_classes=4, source_channels=1, mlp_time_embed=True, dropout=0.2)
T = np.array([0.1, 0.5, 0.9], np.float32)
LABEL = np.array([0, 3, 1])


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X, SOURCE, TEXT = normal(3, 4, 6, 2), normal(3, 4, 6, 1), normal(3, 5, 7)


def count(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


def channels_last(image):
    return np.moveaxis(image, 1, -1)


def official():
    return {k[2:]: v for k, v in golden("systems_net_uvit").items() if k.startswith("w/")}


def abstract(net, x=X, **conditions):
    return jax.eval_shape(lambda key: net.init(key, x, 0.5, **conditions), KEY)["params"]


def reference(state, x, t, heads, label=None, text=None):
    """The network of the paper in NumPy, from a state dict; x [B, C, H, W]."""
    w = {k: np.asarray(v, np.float64) for k, v in state.items()}
    erf = np.vectorize(math.erf)

    def linear(name, h):
        return h @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(name, h):
        h = h - h.mean(-1, keepdims=True)
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5)
        return h * w[name + ".weight"] + w[name + ".bias"]

    def block(name, h, skip=None):
        if skip is not None:
            h = linear(name + ".skip_linear", np.concatenate([h, skip], -1))
        q, k, v = np.split(linear(name + ".attn.qkv", norm(name + ".norm1", h)), 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
        scores = np.exp(np.einsum("bqhn,bkhn->bhqk", q, k) / np.sqrt(q.shape[-1]))
        y = np.einsum("bhqk,bkhn->bqhn", scores / scores.sum(-1, keepdims=True), v)
        h = h + linear(name + ".attn.proj", y.reshape(h.shape))
        y = linear(name + ".mlp.fc1", norm(name + ".norm2", h))
        return h + linear(name + ".mlp.fc2", y * 0.5 * (1 + erf(y / np.sqrt(2))))

    kernel = w["patch_embed.proj.weight"]
    width, channels, p, _ = kernel.shape
    batch, _, height, across = x.shape
    rows, columns = height // p, across // p
    pixels = x.reshape(batch, channels, rows, p, columns, p)
    h = np.einsum("bcipjq,dcpq->bijd", pixels, kernel) + w["patch_embed.proj.bias"]
    h = h.reshape(batch, rows * columns, width)
    angles = t[:, None] * 10_000.0 ** (-np.arange(width // 2) / (width // 2))
    time = np.concatenate([np.cos(angles), np.sin(angles)], -1)[:, None]
    if "time_embed.0.weight" in w:
        y = linear("time_embed.0", time)
        time = linear("time_embed.2", y / (1 + np.exp(-y)))
    tokens = [time, h] if text is None else [time, linear("context_embed", text), h]
    if label is not None:
        tokens = [w["label_emb.weight"][label][:, None], *tokens]
    h = np.concatenate(tokens, axis=1) + w["pos_embed"]
    skips, half = [], sum(k.endswith("skip_linear.bias") for k in w)
    for i in range(half):
        h = block(f"in_blocks.{i}", h)
        skips.append(h)
    h = block("mid_block", h)
    for i in range(half):
        h = block(f"out_blocks.{i}", h, skips.pop())
    h = linear("decoder_pred", norm("norm", h))[:, -rows * columns :]
    y = h.reshape(batch, rows, columns, p, p, channels).transpose(0, 5, 1, 3, 2, 4)
    y = y.reshape(x.shape)
    if "final_layer.weight" not in w:
        return y
    padded = np.pad(y, ((0, 0), (0, 0), (1, 1), (1, 1)))
    around = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    y = np.einsum("bchwij,ocij->bohw", around, w["final_layer.weight"])
    return y + w["final_layer.bias"][None, :, None, None]


def test_reference_is_the_official_network():
    numbers = golden("systems_net_uvit")
    y = reference(official(), numbers["in/x"].astype(float), numbers["in/t"], 4)
    np.testing.assert_allclose(y, numbers["out/f64"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 5e-5), ("float64", 1e-9)])
def test_official_outputs(dtype, tolerance):
    numbers = golden("systems_net_uvit")
    x, t = channels_last(numbers["in/x"]), numbers["in/t"]
    net = UViT(**GOLDEN, dtype=dtype)
    params = import_state(layout(net), official(), abstract(UViT(**GOLDEN), x))
    assert count(params) == json.loads(str(numbers["config"]))["n_params"]
    with jax.enable_x64(dtype == "float64"):
        y = quick_jit(net.apply)({"params": params}, x.astype(dtype), t)
        assert y.dtype == dtype
    np.testing.assert_allclose(y, channels_last(numbers["out/f64"]), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "fields, conditions",
    [
        (dict(num_classes=4, mlp_time_embed=True, conv=False), {"label": LABEL}),
        (dict(num_classes=4, null_label=False, patch_size=1), {"label": LABEL}),
        (dict(text_channels=7, text_length=5, depth=6), {"text": TEXT}),
        (dict(mlp_time_embed=True, qkv_bias=True, conv=False), {}),
    ],
)
def test_conditions_in_the_official_order(fields, conditions, generic):
    net = UViT(**SMALL | {"time_scale": 1.0} | fields)
    times = np.array([3.0, 500.0, 999.0], np.float32)
    params = generic(net, X, times, **conditions)
    y = quick_jit(net.apply)({"params": params}, X, times, **conditions)
    state = export_state(layout(net), params)
    again = import_state(layout(net), state, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    x = np.moveaxis(X, -1, 1).astype(float)
    expected = channels_last(reference(state, x, times, net.heads, **conditions))
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("size", sorted(COUNTS))
def test_has_the_parameters_of_the_paper(size):
    sizes = registry.entry("network", "uvit").meta["sizes"]
    assert set(sizes) == set(COUNTS)
    expected, shape, classes = COUNTS[size]
    net = UViT(**{"num_classes": classes} | sizes[size])
    conditions = {"label": np.zeros(1, int)} if classes else {}
    if net.text_channels:
        conditions["text"] = np.zeros((1, 77, 768), np.float32)
    assert count(abstract(net, np.zeros((1, *shape), np.float32), **conditions)) == expected


def test_weights_go_there_and_back_and_others_are_refused():
    net, state = UViT(**GOLDEN), official()
    params = import_state(layout(net), state, abstract(net, np.zeros((1, 8, 8, 3), np.float32)))
    back = export_state(layout(net), params)
    assert set(back) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)
    rest = {k: v for k, v in state.items() if k != "out_blocks.1.skip_linear.weight"}
    with pytest.raises(WeightsError, match=r"missing: 1\s+out_blocks.1.skip_linear.weight"):
        import_state(layout(net), rest, params)
    plain = UViT(**GOLDEN, conv=False)
    with pytest.raises(WeightsError, match=r"unknown: 2\s+final_layer.bias"):
        import_state(layout(plain), state, abstract(plain, np.zeros((1, 8, 8, 3), np.float32)))
    large = abstract(net, np.zeros((1, 16, 16, 3), np.float32))
    with pytest.raises(WeightsError, match="pos_embed has shape"):
        import_state(layout(net), state, large)


def test_without_skips_it_is_a_plain_transformer(generic):
    net = UViT(**SMALL, conv=False)
    params = generic(net, X, T)
    skip = params["out_blocks"]["skip"]
    skip["kernel"][:] = np.concatenate([np.eye(16), np.zeros((16, 16))])
    skip["bias"][:] = 0.0
    block = TransformerBlock(
        2, style=BlockStyle(epsilon=1e-5, qkv_bias=False, exact_gelu=True, identity=False)
    )
    at = lambda tree, i: jax.tree.map(lambda a: a[i], tree)
    second = params["out_blocks"]["block"]
    blocks = [at(params["in_blocks"], 0), at(params["in_blocks"], 1), params["mid_block"]]
    blocks += [at(second, 1), at(second, 0)]

    def states(module, name):
        return isinstance(module, TransformerBlock) and module.name == "mid_block"

    capture = {"capture_intermediates": states, "mutable": ["intermediates"]}
    y, seen = quick_jit(lambda p: net.apply({"params": p}, X, T, **capture))(params)
    run = quick_jit(lambda p, h: block.apply({"params": p}, h, None, None, False))
    h = seen["intermediates"]["mid_block"]["__call__"][0]
    for p in blocks[3:]:
        h = run(p, h)
    h = np.asarray(h, np.float64)
    h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5)
    h = h * params["norm"]["norm"]["scale"] + params["norm"]["norm"]["bias"]
    h = (h @ params["output"]["kernel"] + params["output"]["bias"])[:, 1:]
    h = h.reshape(3, 2, 3, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(X.shape)
    np.testing.assert_allclose(y, h, atol=1e-4 * np.abs(h).max())


def test_starts_as_the_official_network_does():
    net = UViT(patch_size=2, width=64, depth=2, heads=2, num_classes=100)
    key = jax.random.key(0, impl="rbg")
    x = jnp.zeros((1, 16, 16, 8))
    params = quick_jit(net.init)(key, x, jnp.zeros(1), label=jnp.zeros(1, int))["params"]
    assert params["positions"].std() == pytest.approx(0.02, rel=0.05)
    for kernel in (
        params["in_blocks"]["attention"]["qkv"]["kernel"],
        params["out_blocks"]["block"]["mlp_out"]["kernel"],
        params["out_blocks"]["skip"]["kernel"],
        params["output"]["kernel"],
    ):
        assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert params["label"]["table"].std() == pytest.approx(1.0, rel=0.05)
    # PyTorch's convolutions: uniform within 1 / sqrt(inputs)
    assert params["input"]["kernel"].std() == pytest.approx((1 / 32 / 3) ** 0.5, rel=0.05)
    assert params["conv"]["kernel"].std() == pytest.approx((1 / 72 / 3) ** 0.5, rel=0.1)
    assert 0.8 * 72**-0.5 < np.abs(params["conv"]["bias"]).max() <= 72**-0.5


class Built:
    """A network with label and source in general position, in training: its value, compiled once."""

    def __init__(self, generic):
        self.net = UViT(**LABELLED)
        self.params = generic(self.net, X, T, label=LABEL, source=SOURCE)
        self.run = quick_jit(functools.partial(self.value, self.net))

    @staticmethod
    def value(net, params, x, t, label, source, key):
        given = dict(label=label, source=source, train=True, rngs={"dropout": key})
        return net.apply({"params": params}, x, t, **given)

    def __call__(self, x=X, t=T, label=LABEL, source=SOURCE, key=KEY, params=None):
        params = self.params if params is None else params
        return np.asarray(self.run(params, x, t, label, source, key))


_BUILT = []


@pytest.fixture
def net(generic):
    if not _BUILT:
        _BUILT.append(Built(generic))
    return _BUILT[0]


def replaced(a, value):
    a = a.copy()
    a[1] = value
    return a


def test_conditions_change_their_own_example(net):
    y = net()
    assert y.shape == X.shape and y.dtype == np.float32 and np.isfinite(y).all()
    for changed in (
        dict(x=replaced(X, -X[1])),
        dict(t=replaced(T, 0.51)),
        dict(label=replaced(LABEL, 2)),
        dict(label=replaced(LABEL, 4)),  # the null class
        dict(source=replaced(SOURCE, SOURCE[1] + 0.5)),
    ):
        z = net(**changed)
        assert np.abs(z[1] - y[1]).max() > 1e-3
        np.testing.assert_allclose(z[::2], y[::2], rtol=1e-5, atol=1e-5)
    z = net(label=np.array([0, 5, -1]))
    assert np.isfinite(z[0]).all() and np.isnan(z[1:]).all()


def test_every_parameter_learns_and_gradients_of_recomputed_blocks_are_true(net):
    remat = UViT(**LABELLED, remat=True)
    weight = np.cos(7.0 * np.arange(X.size)).reshape(X.shape)
    call = lambda p: jnp.vdot(weight, net.value(remat, p, X, T, LABEL, SOURCE, KEY))
    value, gradient = quick_jit(jax.value_and_grad(call))(net.params)
    assert value == pytest.approx(float(np.vdot(weight, net())), rel=1e-4)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(g).max() > 1e-6, f"{jax.tree_util.keystr(path)} has no effect"
    step = 5e-5
    move = lambda sign: jax.tree.map(
        lambda p, g: p + sign * step * np.sign(g), net.params, gradient
    )
    slope = (
        (np.vdot(weight, net(params=move(1))) - np.vdot(weight, net(params=move(-1)))) / 2 / step
    )
    assert slope == pytest.approx(sum(np.abs(g).sum() for g in jax.tree.leaves(gradient)), rel=0.02)


def test_dropout_draws_from_its_key_in_training_alone(net):
    assert np.abs(net(key=jax.random.key(1)) - net()).max() > 1e-3
    np.testing.assert_array_equal(net(), net())


def test_in_evaluation_and_in_bfloat16(net):
    def forward(dtype):
        half = UViT(**LABELLED, dtype=dtype)
        call = lambda p: half.apply({"params": p}, X, T, source=SOURCE)
        return quick_jit(call)(
            net.params
        )  # no key is asked for; without a label it is the null class

    y, z = forward("float32"), forward("bfloat16")
    assert np.abs(y - net(label=np.full(3, 4))).max() > 1e-3
    assert z.dtype == np.float32
    assert 1e-4 < np.linalg.norm(z - y) / np.linalg.norm(y) < 0.05


@pytest.mark.parametrize(
    "fields, conditions, message",
    [
        (dict(depth=3), {}, "depth = 3 must be divisible by two halves = 2"),
        (dict(heads=3), {}, "width = 16 must be divisible by heads = 3"),
        (dict(patch_size=4), {}, "width = 6 must be divisible by patch_size = 4"),
        (dict(dropout=1.0), {}, r"dropout must be in \[0, 1\), got 1.0"),
        (dict(num_classes=2, null_label=False), {}, "label is missing"),
        (dict(), {"text": TEXT}, "text was given to a network built without"),
        (dict(text_channels=7), {}, r"text is missing; .* \(3, 77, 7\)"),
        (dict(text_channels=7), {"text": TEXT}, r"must be floating \(3, 77, 7\), got"),
        (dict(text_channels=7, num_classes=2), {}, "exclude one another"),
        (dict(), {"label": LABEL}, "label was given to an unconditional network"),
    ],
)
def test_errors(fields, conditions, message):
    with pytest.raises(ValueError, match="uvit: .*" + message):
        abstract(UViT(**SMALL | fields), **conditions)


def test_another_image_size_is_refused():
    net = UViT(**SMALL)
    params = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), abstract(net))
    with pytest.raises(ValueError, match="positions for 7 tokens, the input makes 5"):
        jax.eval_shape(net.apply, {"params": params}, X[:, :, :4], T)
    with pytest.raises(ValueError, match="source_channels must be 0"):
        layout(UViT(source_channels=1))


def test_without_null_class_labels_are_neither_dropped_nor_guided():
    net = UViT(**SMALL, num_classes=4, null_label=False)
    with pytest.raises(
        ValueError, match=r"UViT has no null class: label_dropout must be 0, got 0\.1"
    ):
        Network(net, num_classes=4, label_dropout=0.1)
    with pytest.raises(ValueError, match="class-conditional model with a null class"):
        Network(net, num_classes=4).unconditional({"label": LABEL})
