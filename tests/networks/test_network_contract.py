"""What every registered network must do. A new network joins by an entry in `CASES`.

A network is compiled once for its value and gradients in training; most tests share that call. What
is not under test is NumPy: every small JAX operation on a new shape would be compiled too.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import registry

B, CLASSES = 3, 4
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


# Per name: fields of a small network, x, source (None if it takes none), shape of the output.
CASES = {
    "mlp": (dict(width=16, depth=2), normal(B, 3), normal(B, 2), (B, 3)),
    "unet": (
        dict(channels=4, channel_mults=(1,)),
        normal(B, 4, 6, 2),
        normal(B, 4, 6, 1),
        (B, 4, 6, 2),
    ),
    "dit": (
        dict(width=16, depth=2, heads=2),
        normal(B, 4, 6, 2),
        normal(B, 4, 6, 1),
        (B, 4, 6, 2),
    ),
    "token_transformer": (
        dict(vocab_size=5, width=16, depth=2),
        RNG.integers(0, 6, (B, 6)).astype(np.int32),
        None,
        (B, 6, 5),
    ),
}
T = np.array([0.1, 0.5, 0.9], np.float32)
LABEL = np.array([0, 3, 1])
KEY = jax.random.key(0)
every_network = pytest.mark.parametrize("name", sorted(CASES))


def make(name, **fields):
    small, _, source, _ = CASES[name]
    common = dict(num_classes=CLASSES, time_features=8, dropout=0.2)
    if source is not None:
        common["source_channels"] = source.shape[-1]
    return registry.get("network", name)(**common | small | fields)


class Built:
    """A conditional network in general position, its value and its gradients, compiled once."""

    def __init__(self, name, generic, **fields):
        _, self.x, self.source, self.shape = CASES[name]
        self.network = make(name, **fields)
        self.params = generic(self.network, self.x, T, label=LABEL, source=self.source)
        self.weight = np.cos(7.0 * np.arange(np.prod(self.shape))).reshape(self.shape)
        self._call = jax.jit(jax.value_and_grad(self._loss, argnums=(0, 1), has_aux=True))

    def forward(self, params, t, x, label, source, key=None):
        """In training if there is a key for dropout."""
        given = {} if key is None else dict(train=True, rngs={"dropout": key})
        return self.network.apply({"params": params}, x, t, label=label, source=source, **given)

    def _loss(self, *args):
        y = self.forward(*args)
        return jnp.vdot(self.weight, y), y

    def run(self, x=None, t=T, label=LABEL, source=None, params=None, key=KEY):
        x = self.x if x is None else x
        source = self.source if source is None else source
        params = self.params if params is None else params
        (_, y), gradients = jax.tree.map(np.asarray, self._call(params, t, x, label, source, key))
        return y, gradients

    def __call__(self, **kwargs):
        return self.run(**kwargs)[0]

    def gradients(self, **kwargs):
        return self.run(**kwargs)[1]


_BUILT = {}


@pytest.fixture
def build(generic):
    def cached(name, **fields):
        handle = (name, *sorted(fields.items()))
        if handle not in _BUILT:
            _BUILT[handle] = Built(name, generic, **fields)
        return _BUILT[handle]

    return cached


def distance(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


def replaced(a, value):
    """`a` with `value` for example 1."""
    a = a.copy()
    a[1] = value
    return a


def assert_only_example_1_changed(y, z):
    assert distance(y[1], z[1]) > 1e-3
    np.testing.assert_allclose(y[::2], z[::2], rtol=1e-5, atol=1e-6)


def test_every_registered_network_is_tested_here():
    entries = {n: registry.entry("network", n).meta for n in registry.names("network")}
    # official architectures have tests of their own, against their authors' outputs
    inputs = {n: meta["input"] for n, meta in entries.items() if not meta.get("official")}
    assert inputs.pop("tts") == "text"  # of another form: test_text_encoder.py
    assert inputs == {
        "mlp": "points",
        "unet": "image",
        "dit": "image",
        "token_transformer": "tokens",
    }
    assert set(inputs) == set(CASES)


@every_network
def test_zero_and_float32_at_initialisation(name):
    _, x, source, shape = CASES[name]
    network = make(name, dtype="bfloat16")
    key = jax.random.key(0, impl="rbg")  # compiles in a fraction of the time
    init = jax.jit(lambda key: network.init_with_output(key, x, T, label=LABEL, source=source))
    y, variables = init(key)
    np.testing.assert_array_equal(y, np.zeros(shape))
    assert y.dtype == jnp.float32 and set(variables) == {"params"}
    assert {a.dtype for a in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@every_network
def test_value(name, build):
    y = build(name)()
    assert y.shape == CASES[name][3] and y.dtype == jnp.float32
    assert np.isfinite(y).all() and y.std() > 0.01


@every_network
def test_layers_are_named_and_all_learn(name, build):
    for path, g in jax.tree_util.tree_leaves_with_path(build(name).gradients()[0]):
        path = jax.tree_util.keystr(path)
        assert not re.search(r"'[A-Z]\w*_\d+'", path), f"{path} has an automatic name"
        assert np.abs(g).max() > 1e-6, f"{path} has no effect"


@every_network
def test_examples_do_not_see_each_other(name, build):
    net = build(name)
    other = 5 - net.x[1] if name == "token_transformer" else -net.x[1]
    assert_only_example_1_changed(net(), net(x=replaced(net.x, other)))


@every_network
def test_time_changes_its_own_example(name, build):
    net = build(name)
    assert_only_example_1_changed(net(), net(t=replaced(T, T[1] + 0.01)))
    assert np.abs(net.gradients()[1]).min() > 1e-4


@every_network
def test_label_changes_its_own_example(name, build):
    net = build(name)
    assert_only_example_1_changed(net(), net(label=replaced(LABEL, 2)))
    assert_only_example_1_changed(net(), net(label=replaced(LABEL, CLASSES)))


@every_network
def test_label_out_of_range_is_nan(name, build):
    y = build(name)(label=np.array([0, CLASSES + 1, -1]))
    assert np.isfinite(y[0]).all() and np.isnan(y[1:]).all()


@every_network
def test_source_changes_its_own_example(name, build):
    net = build(name)
    if net.source is None:
        with pytest.raises(ValueError, match="source was given to a network built without one"):
            net.forward(net.params, T, net.x, LABEL, np.zeros((B, 6, 1), np.float32))
    else:
        assert_only_example_1_changed(net(), net(source=replaced(net.source, net.source[1] + 0.5)))


@every_network
def test_bfloat16_computes_the_same_function_more_coarsely(name, build):
    (y, g), (z, h) = build(name).run(), build(name, dtype="bfloat16").run()
    assert 1e-4 < np.linalg.norm(z - y) / np.linalg.norm(y) < 0.05
    for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(h)):
        assert b.dtype == jnp.float32
        assert np.linalg.norm(b - a) < 0.15 * np.linalg.norm(a) + 1e-3


@every_network
def test_vmap_over_parameters_states_and_times(name, build):
    # In evaluation, so without a key; the three members of the ensemble are: the batch, the batch
    # with its examples in reverse order, the batch with other parameters.
    net = build(name)

    def stack(*members):
        return jax.tree.map(lambda *leaves: np.stack(leaves), *members)

    half = jax.tree.map(lambda a: 0.5 * a, net.params)
    args = [(p, T, net.x, LABEL, net.source) for p in (net.params, net.params, half)]
    args[1] = args[1][:1] + jax.tree.map(lambda a: a[::-1], args[1][1:])
    y, reverse, other = jax.jit(jax.vmap(net.forward))(*map(stack, *args))
    np.testing.assert_allclose(reverse, y[::-1], rtol=1e-4, atol=1e-5)
    assert distance(y, other) > 1e-3
    assert distance(y, net()) > 1e-3  # dropout


@every_network
def test_forward_and_reverse_mode_agree(name, build):
    net = build(name)
    tangents = (
        jax.tree.map(lambda a: np.cos(100 * a), net.params),
        np.array([1, 2, 3], np.float32),
    )

    def f(params, t):
        return net.forward(params, t, net.x, LABEL, net.source, KEY)

    run = jax.jit(lambda *tangents: jax.jvp(f, (net.params, T), tangents))
    y, forward = run(*tangents)
    np.testing.assert_allclose(y, net(), rtol=1e-4, atol=1e-5)
    inner = sum(jax.tree.leaves(jax.tree.map(np.vdot, tangents, net.gradients())))
    assert np.vdot(net.weight, forward) == pytest.approx(inner, rel=1e-3)


@every_network
def test_dropout_draws_from_its_key(name, build):
    net = build(name)
    y = net(key=jax.random.key(1))
    assert distance(y, net()) > 1e-3
    np.testing.assert_array_equal(y, net(key=jax.random.key(1)))


@pytest.mark.parametrize("name", ["unet", "dit", "token_transformer"])
def test_remat_changes_neither_value_nor_gradient(name, build):
    plain, remat = build(name), build(name, remat=True)
    assert jax.tree.structure(plain.params) == jax.tree.structure(remat.params)
    (y, g), (z, h) = plain.run(), remat.run()
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(g), jax.tree.leaves(h)):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@every_network
def test_unconditional(name):
    _, x, _, shape = CASES[name]
    absent = dict(num_classes=None) | (
        {} if name == "token_transformer" else {"source_channels": 0}
    )
    y, variables = jax.eval_shape(make(name, **absent).init_with_output, jax.random.key(0), x, 0.5)
    assert y.shape == shape and set(variables["params"]["condition"]) == {"time_in", "time_out"}


@every_network
@pytest.mark.parametrize(
    "fields, match",
    [
        (dict(dtype="int32"), "dtype must be a floating dtype"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (dict(time_features=5), "even number, got 5"),
        (dict(width=0), "width must be a positive integer, got 0"),
        (dict(channels=1.5), "channels must be a positive integer, got 1.5"),
        (dict(heads=3), "must be divisible by heads = 3"),
    ],
)
def test_bad_fields_are_refused(name, fields, match):
    if set(fields) <= set(registry.get("network", name).__dataclass_fields__):
        _, x, source, _ = CASES[name]
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(
                lambda k: make(name, **fields).init(k, x, T, source=source), jax.random.key(0)
            )


@every_network
def test_inputs_are_checked(name):
    _, x, source, _ = CASES[name]
    for bad in ((x[0], T, LABEL), (x, T[:2], LABEL), (x, T, LABEL[:2])):
        with pytest.raises(ValueError, match=f"^{name}: .* must be .*, got shape"):
            make(name).init(jax.random.key(0), bad[0], bad[1], label=bad[2], source=source)
