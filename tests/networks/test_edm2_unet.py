"""EDM2's U-Net against its authors' numbers, and against a second derivation in NumPy for all fields."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import registry
from diffusion_jax.denoisers import Denoiser
from diffusion_jax.interop import WeightsError, export_state, import_state
from diffusion_jax.interop.edm2_unet import edm2_unet as layout
from diffusion_jax.networks import EDM2UNet
from diffusion_jax.networks import magnitude_preserving as mp
from diffusion_jax.processes import EDM

SMALL = dict(
    channels=8,
    channel_mults=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    head_channels=4,
    log_variance_features=6,
)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 8, 8, 2)).astype(np.float32)
T = np.array([-0.6, 0.1, 0.9], np.float32)
LABEL = np.array([0, 3, 1])
KEY = jax.random.key(0)
BUFFERS = ("frequencies", "phases")


def shapes(net, x=X, label=None, source=None):
    label = np.zeros(len(x), int) if label is None and net.num_classes else label
    init = lambda key: net.init(key, x, np.float32(0.3), label=label, source=source)
    return jax.eval_shape(init, KEY)["params"]


def count(tree):
    """Parameters, and numbers that the official code keeps in buffers."""
    sizes = {True: 0, False: 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sizes[path[-1].key in BUFFERS] += math.prod(leaf.shape)
    return sizes[False], sizes[True]


def general(net, x=X, source=None, seed=0):
    """Parameters in general position: gains are not zero."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32)
    return jax.tree.map(draw, shapes(net, x, source=source))


# ---- the authors' numbers ------------------------------------------------------------------------


class Golden:
    def __init__(self, dtype):
        self.arrays = golden("systems_net_edm2")
        made = json.loads(str(self.arrays["config"]))
        self.config, self.resolution = made, made["img"]
        self.net = EDM2UNet(
            channels=made["model_channels"],
            channel_mults=tuple(made["channel_mult"]),
            num_res_blocks=made["num_blocks"],
            attention_resolutions=tuple(made["attn"]),
            head_channels=made["channels_per_head"],
            log_variance_features=made["logvar"],
            num_classes=made["label_dim"],
            dtype=dtype,
        )
        self.state = {k[2:]: v for k, v in self.arrays.items() if k.startswith("w/")}
        self.x = np.moveaxis(self.arrays["in/x"], 1, -1).astype(dtype)
        self.sigma = self.arrays["in/sigma"].astype(dtype)
        self.label = self.arrays["in/class_labels"].argmax(-1)
        self.weights = layout(self.net, self.resolution)
        self.params = import_state(self.weights, self.state, shapes(self.net, self.x))

    def error(self):
        """Of D and of the uncertainty."""
        process = EDM()
        t = jnp.asarray(process.t_of_lam(-np.log(self.sigma.astype(np.float64))), self.x.dtype)

        def run(params, x):
            network = lambda x, c: self.net.apply({"params": params}, x, c, label=self.label)
            denoise = Denoiser(network, process, "edm", self.config["sigma_data"])
            u = self.net.apply({"params": params}, jnp.log(self.sigma) / 4, method="log_variance")
            point = {"alpha": jnp.ones_like(t), "sigma": jnp.asarray(self.sigma)}
            return denoise.at(x, point), u

        found, u = quick_jit(run)(self.params, self.x)
        wanted = np.moveaxis(self.arrays["out/f64"], 1, -1)
        assert np.abs(wanted).max() > 0.1
        return np.abs(found - wanted).max(), np.abs(u - self.arrays["out/logvar_f64"]).max()


def test_official_weights_give_official_outputs():
    assert max(Golden("float32").error()) <= 5e-5


def test_official_weights_give_official_outputs_in_double_precision(x64):
    assert max(Golden("float64").error()) <= 1e-9


def test_weights_go_back_unchanged():
    case = Golden("float32")
    back = export_state(case.weights, case.params)
    assert back.keys() == case.state.keys()
    for name, value in case.state.items():
        assert back[name].shape == value.shape or not value.ndim, name
        np.testing.assert_array_equal(back[name], value)
    assert count(case.params)[0] == case.config["n_params"]


def test_gains_go_back_without_axes():
    case = Golden("float32")
    assert export_state(case.weights, case.params)["unet.out_gain"].shape == ()


def test_weights_of_another_network_are_refused():
    case = Golden("float32")
    target = shapes(case.net, case.x)
    missing = {k: v for k, v in case.state.items() if k != "unet.out_gain"}
    with pytest.raises(WeightsError, match=r"missing: 1\n *unet.out_gain"):
        import_state(case.weights, missing, target)
    with pytest.raises(WeightsError, match=r"unknown: 1\n *unet.extra"):
        import_state(case.weights, case.state | {"unet.extra": np.zeros(1)}, target)
    other = case.state | {"unet.emb_label.weight": np.zeros((32, 7), np.float32)}
    with pytest.raises(WeightsError, match=r"unet.emb_label.weight has shape"):
        import_state(case.weights, other, target)
    with pytest.raises(WeightsError, match="down_1_block_0/qkv"):  # attends elsewhere
        import_state(layout(case.net, 32), case.state, target)
    with pytest.raises(ValueError, match="source_channels must be 0, got 1"):
        layout(EDM2UNet(source_channels=1))


@pytest.mark.parametrize(
    ("size", "channels", "official"),
    [
        ("XXS", 4, 31_309_029),
        ("XS", 4, 124_713_253),
        ("S", 4, 280_212_837),
        ("S", 3, 280_209_381),
        ("M", 4, 497_807_781),
        ("L", 4, 777_498_085),
        ("XL", 4, 1_119_283_749),
        ("XXL", 4, 1_523_164_773),
    ],
)
def test_published_sizes(size, channels, official):
    sizes = registry.entry("network", "edm2_unet").meta["sizes"]
    net = EDM2UNet(**sizes[size], num_classes=1000)
    params = shapes(net, np.zeros((1, 64, 64, channels), np.float32))
    assert count(params) == (official, 2 * (net.channels + 128))
    laid_out = {leaf.ours for leaf in layout(net, 64).leaves}
    assert laid_out == {
        "/".join(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(params)
    }


# ---- a second derivation, by the official names ----------------------------------------------------


def unit(x, axis):
    return x / (1e-4 + np.sqrt(np.mean(x**2, axis, keepdims=True)))


def conv(state, name, x, gain=1.0):
    """x [B, C, ...], zero padding."""
    w = state[name + ".weight"].astype(float)
    w = unit(w, tuple(range(1, w.ndim))) * gain / np.sqrt(w[0].size)
    if w.ndim == 2:
        return x @ w.T
    r = w.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (0, 0), (r, r), (r, r)))
    height, width = x.shape[2:]
    return sum(
        np.einsum("oc,bchw->bohw", w[..., i, j], padded[:, :, i : i + height, j : j + width])
        for i in range(2 * r + 1)
        for j in range(2 * r + 1)
    )


def mp_silu(x):
    return x / (1 + np.exp(-x)) / 0.596


def mp_sum(a, b, t):
    return (a + t * (b - a)) / np.sqrt((1 - t) ** 2 + t**2)


def block(net, state, name, x, emb, attends):
    if name.endswith("down"):
        x = (x[:, :, ::2] + x[:, :, 1::2]) / 2
        x = (x[..., ::2] + x[..., 1::2]) / 2
    if name.endswith("up"):
        x = x.repeat(2, axis=2).repeat(2, axis=3)
    skips, encodes = name + ".conv_skip.weight" in state, name.startswith("unet.enc")
    if encodes:
        x = unit(conv(state, name + ".conv_skip", x) if skips else x, 1)
    y = conv(state, name + ".conv_res0", mp_silu(x))
    c = conv(state, name + ".emb_linear", emb, state[name + ".emb_gain"]) + 1
    y = conv(state, name + ".conv_res1", mp_silu(y * c[:, :, None, None]))
    if skips and not encodes:
        x = conv(state, name + ".conv_skip", x)
    x = mp_sum(x, y, net.residual_balance)
    assert attends == (name + ".attn_qkv.weight" in state)
    if attends:
        heads = x.shape[1] // net.head_channels
        y = conv(state, name + ".attn_qkv", x)
        y = unit(y.reshape(len(y), heads, x.shape[1] // heads, 3, -1), 2)
        q, k, v = (y[:, :, :, i] for i in range(3))
        w = np.exp(np.einsum("nhcq,nhck->nhqk", q, k) / np.sqrt(q.shape[2]))
        y = np.einsum("nhqk,nhck->nhcq", w / w.sum(-1, keepdims=True), v)
        x = mp_sum(x, conv(state, name + ".attn_proj", y.reshape(x.shape)), net.attention_balance)
    return np.clip(x, -net.clip, net.clip)


def plain_run(net, state, x, t, label, resolution):
    """F(x, c_noise, label) of a state dict with the official names, in float64."""
    fourier = lambda name, c: (
        np.sqrt(2)
        * np.cos(np.outer(c, state[name + ".freqs"].astype(float)) + state[name + ".phases"])
    )
    emb = conv(state, "unet.emb_noise", fourier("unet.emb_fourier", t))
    if net.num_classes:
        onehot = np.eye(net.num_classes + 1)[label][:, :-1] * np.sqrt(net.num_classes)
        emb = mp_sum(emb, conv(state, "unet.emb_label", onehot), net.label_balance)
    emb, x = mp_silu(emb), np.moveaxis(x, -1, 1).astype(float)
    x = conv(state, f"unet.enc.{resolution}x{resolution}_conv", np.append(x, x[:, :1] * 0 + 1, 1))
    skips, levels, depth = [x], len(net.channel_mults), net.num_res_blocks
    for level in range(levels):
        side = resolution >> level
        parts = (["down"] if level else []) + [f"block{i}" for i in range(depth)]
        for part in parts:
            attends = part != "down" and side in net.attention_resolutions
            x = block(net, state, f"unet.enc.{side}x{side}_{part}", x, emb, attends)
            skips.append(x)
    for level in reversed(range(levels)):
        side = resolution >> level
        parts = ["in0", "in1"] if level == levels - 1 else ["up"]
        for part in parts + [f"block{i}" for i in range(depth + 1)]:
            if part.startswith("block"):
                skip, s = skips.pop(), net.concat_balance
                a, b = x.shape[1], skip.shape[1]
                both = [x * (1 - s) / np.sqrt(a), skip * s / np.sqrt(b)]
                x = np.concatenate(both, 1) * np.sqrt((a + b) / ((1 - s) ** 2 + s**2))
            attends = part == "in0" or (
                part.startswith("block") and side in net.attention_resolutions
            )
            x = block(net, state, f"unet.dec.{side}x{side}_{part}", x, emb, attends)
    return np.moveaxis(conv(state, "unet.out_conv", x, state["unet.out_gain"]), 1, -1)


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_classes=4, num_res_blocks=2, label_balance=0.3, concat_balance=0.6),
        dict(residual_balance=0.4, attention_balance=0.2, clip=1.5, head_channels=8),
        dict(channel_mults=(1, 2, 3), attention_resolutions=(8, 4), noise_mult=2, embedding_mult=1),
    ],
)
def test_equals_a_second_derivation(fields):
    net = EDM2UNet(**SMALL | fields)
    params = general(net)
    x = np.concatenate([X, X[:, :, ::-1]], axis=2)  # not square: its shorter side decides
    label = np.array([0, 3, 4]) if net.num_classes else None  # 4: the null label
    state = export_state(layout(net, 8), params)
    found = quick_jit(net.apply)({"params": params}, x, T, label=label)
    wanted = plain_run(net, state, x, T.astype(float), label, 8)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_levels_narrower_than_a_head_do_not_attend():
    net = EDM2UNet(**SMALL | dict(head_channels=9, attention_resolutions=(8,)))
    assert "qkv" not in shapes(net)["down_0_block_0"]  # 8 channels
    assert {leaf.ours for leaf in layout(net, 8).leaves if "qkv" in leaf.ours} == {
        "middle_block_0/qkv/kernel"
    }
    with pytest.raises(ValueError, match=r"channels of an attending level = 20 .* by heads = 3"):
        shapes(EDM2UNet(**SMALL | dict(channels=10, head_channels=6)))


# ---- invariants ----------------------------------------------------------------------------------


def test_magnitudes_are_kept_at_initialisation():
    """Every block's output stays near unit magnitude, and D is c_skip x."""
    net = EDM2UNet(channels=64, channel_mults=(1,), num_res_blocks=1, attention_resolutions=())
    x = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)

    def run(key):
        params = net.init(key, x, T[:2])["params"]
        # Attention averages, which keeps the magnitude of equal values, not of independent ones.
        y, seen = net.apply(
            {"params": params},
            x,
            T[:2],
            capture_intermediates=lambda m, _: isinstance(m, mp.Block),
            mutable=["intermediates"],
        )
        denoise = Denoiser(
            lambda x, t: net.apply({"params": params}, x, t), EDM(), "edm", sigma_data=0.5
        )
        size = lambda v: jnp.sqrt(jnp.mean(jnp.square(v)))
        magnitudes = {k: size(v["__call__"][0]) for k, v in seen["intermediates"].items()}
        point = EDM().point(jnp.full(2, 0.4))
        c_skip = 0.5**2 / (point["sigma"] ** 2 + 0.5**2)
        return y, magnitudes, denoise.at(x, point) - c_skip[:, None, None, None] * x

    y, magnitudes, rest = jax.tree.map(np.asarray, quick_jit(run)(KEY))
    np.testing.assert_array_equal(y, 0.0)
    np.testing.assert_allclose(rest, 0.0, atol=1e-6)
    assert len(magnitudes) == 5
    assert max(abs(v - 1.0) for v in magnitudes.values()) < 0.2, magnitudes


@pytest.mark.parametrize(
    ("inputs", "kind"),
    [
        (128, dict()),
        (64, dict(resample="down")),
        (192, dict(decoder=True)),
        (128, dict(decoder=True, resample="up")),
    ],
)
def test_blocks_keep_magnitudes(inputs, kind):
    module, rng = mp.Block(128, **kind), np.random.default_rng(3)
    x = rng.standard_normal((2, 16, 16, inputs)).astype(np.float32)
    emb = rng.standard_normal((2, 8)).astype(np.float32)
    y, _ = quick_jit(lambda key: module.init_with_output(key, x, emb, False))(KEY)
    assert y.shape[1] == {"down": 8, "up": 32}.get(kind.get("resample"), 16)
    assert np.sqrt(np.mean(np.square(y))) == pytest.approx(1.0, abs=0.1)


def test_layers_keep_magnitudes():
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal((4000, n)).astype(np.float32) for n in (12, 36))
    size = lambda v: float(np.sqrt(np.mean(np.square(v))))
    assert size(mp.silu(a)) == pytest.approx(1.0, abs=0.02)
    assert size(mp.mixed(a, b[:, :12], 0.3)) == pytest.approx(1.0, abs=0.02)
    both = np.asarray(mp.concatenated(a, b, 0.2))
    assert size(both) == pytest.approx(1.0, abs=0.02)
    # What a layer after it sees of both, in sums of squares, is in the shares of t.
    sums = np.square(both[:, :12]).sum(), np.square(both[:, 12:]).sum()
    assert np.sqrt(sums[1] / sums[0]) == pytest.approx(0.2 / 0.8, abs=0.01)
    fourier = mp.Fourier(300)
    t = rng.uniform(-1, 1, 200).astype(np.float32)
    assert size(fourier.apply(fourier.init(KEY, t), t)) == pytest.approx(1.0, abs=0.03)


def test_normalize_has_a_gradient_at_zero():
    x = jnp.zeros((2, 3)).at[1].set(jnp.array([1.0, -2.0, 2.0]))
    y, gradient = jax.value_and_grad(lambda x: mp.normalize(x)[:, 0].sum())(x)
    assert np.isfinite(gradient).all()
    assert float(y) == pytest.approx(1 / (math.sqrt(3) + 1e-4), rel=1e-5)


# ---- the contract of networks ---------------------------------------------------------------------


class Built:
    """A conditional network with a source, its value and gradients in training, compiled once."""

    def __init__(self, **fields):
        self.net = EDM2UNet(
            **SMALL
            | dict(channel_mults=(1,), num_classes=4, source_channels=1, dropout=0.3)
            | fields
        )
        self.source = X[..., :1] * 0.5
        self.params = general(self.net, source=self.source)
        self._train = quick_jit(jax.value_and_grad(self._loss, has_aux=True))
        self._call = quick_jit(self.forward)

    def forward(self, params, x, t, label, source, key=None):
        given = {} if key is None else dict(train=True, rngs={"dropout": key})
        return self.net.apply({"params": params}, x, t, label=label, source=source, **given)

    def _loss(self, *args):
        y = self.forward(*args)
        return jnp.sum(jnp.sin(y)), y

    def __call__(self, x=X, t=T, label=LABEL, source=None):
        return np.asarray(
            self._call(self.params, x, t, label, self.source if source is None else source)
        )

    def train(self, key=KEY):
        (_, y), gradients = self._train(self.params, X, T, LABEL, self.source, key)
        return np.asarray(y), gradients


@pytest.fixture(scope="module")
def built():
    return Built()


def test_projection_changes_no_output_and_gradients_are_orthogonal_to_rows(built):
    params, (_, gradients) = built.params, built.train()
    projected = built.net.project(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(projected):
        if path[-1].key == "kernel":
            rows = np.sqrt(np.mean(np.square(leaf), axis=tuple(range(leaf.ndim - 1))))
            np.testing.assert_allclose(rows, 1.0, atol=1e-3)
    assert projected["output_gain"] == params["output_gain"]
    y, z = (built._call(p, X, T, LABEL, built.source) for p in (params, projected))
    np.testing.assert_allclose(z, y, atol=2e-3 * np.abs(y).max())  # the 1e-4 in (1)
    kernel, gradient = (
        np.reshape(p["middle_block_0"]["conv_in"]["kernel"], (-1, 8)) for p in (params, gradients)
    )
    lengths = np.linalg.norm(kernel, axis=0) * np.linalg.norm(gradient, axis=0)
    assert lengths.min() > 0
    assert np.abs(np.sum(kernel * gradient, axis=0) / lengths).max() < 2e-4
    for name in ("time_features", "uncertainty"):
        assert not any(np.any(v) for v in jax.tree.leaves(gradients[name]))


def changed(y, z):
    return [bool(v) for v in np.abs(y - z).max((1, 2, 3)) > 1e-3 * np.abs(y).max()]


def test_conditions_change_their_own_example(built):
    y = built()
    assert y.dtype == np.float32 and y.shape == X.shape
    second = lambda a, value: np.stack([a[0], value, a[2]])
    assert changed(y, built(t=second(T, np.float32(0.4)))) == [False, True, False]
    assert changed(y, built(label=second(LABEL, 2))) == [False, True, False]
    assert changed(y, built(source=second(built.source, X[1, :, :, 1:]))) == [False, True, False]
    assert changed(y, built(x=second(X, X[1] + 1))) == [False, True, False]
    null = built(label=second(LABEL, 4))
    assert changed(y, null) == [False, True, False]
    wrong = built(label=np.array([0, 5, -1]))
    np.testing.assert_allclose(wrong[0], y[0], atol=1e-5 * np.abs(y).max())
    assert np.isnan(wrong[1:]).all()
    with pytest.raises(ValueError, match="label is missing in training"):
        built.net.apply({"params": built.params}, X, T, source=built.source, train=True)


def test_training_is_dropout_rounding_is_coarse_and_remat_is_the_same(built):
    y, gradients = built.train()
    assert np.abs(y - built()).max() > 1e-3
    np.testing.assert_array_equal(y, built.train()[0])
    assert np.abs(y - built.train(jax.random.key(1))[0]).max() > 1e-3
    remat = Built(remat=True)
    assert jax.tree.structure(remat.params) == jax.tree.structure(built.params)
    z, others = remat.train()
    np.testing.assert_allclose(z, y, atol=1e-5 * np.abs(y).max())
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others)):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max() + 1e-7)


def test_bfloat16(built):
    coarse, y = Built(dtype="bfloat16")(), built()
    assert coarse.dtype == np.float32
    assert 1e-4 < np.linalg.norm(coarse - y) / np.linalg.norm(y) < 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(channel_mults=()), "channel_mults must name one multiplier"),
        (dict(channels=0), "channels must be a positive integer, got 0"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (dict(label_balance=1.5), r"label_balance must be in \[0, 1\], got 1.5"),
        (dict(dtype="int32"), "dtype must be a floating dtype"),
        (dict(remat="some"), "remat must be one of"),
        (dict(channel_mults=(1, 2, 2, 2, 2)), r"height = 8 must be divisible by 2\*\*"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        shapes(EDM2UNet(**SMALL | fields))
