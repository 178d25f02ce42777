import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import TokenTransformer

KEY = jax.random.key(0)
V, L = 5, 7
X = np.random.default_rng(0).integers(0, V + 1, (2, L))
SMALL = dict(vocab_size=V, width=16, depth=2, heads=2, time_features=8)


def built(generic, x=X, **fields):
    net = TokenTransformer(**SMALL | fields)
    params = generic(net, x, 0.5)
    call = jax.jit(lambda *args, **kw: net.apply({"params": params}, *args, **kw))
    return lambda *args, **kw: np.asarray(call(*args, **kw)), params


@pytest.mark.parametrize("positions, equivariant", [("none", 1), ("rotary", 0), ("learned", 0)])
def test_only_positions_break_permutation_equivariance(positions, equivariant, generic):
    net, _ = built(generic, positions=positions)
    order = np.random.default_rng(1).permutation(L)
    y = net(X, 0.5)[:, order]
    z = net(X[:, order], 0.5)
    assert (np.abs(y - z).max() < 1e-4) == bool(equivariant)


def test_attention_looks_both_ways(generic):
    net, _ = built(generic)
    y = net(X, 0.5)
    for i in range(L):
        z = net(np.where(np.arange(L) == i, (X + 1) % V, X), 0.5)
        assert np.abs(y - z).max(-1).min() > 1e-4


def test_learned_positions_serve_shorter_sequences(generic):
    net, params = built(generic, positions="learned", max_length=L)
    assert params["positions"].shape == (L, 16)
    assert net(X[:, :1], 0.5).shape == (2, 1, V)


def test_axial_positions_are_those_of_row_plus_column():
    shape = {"max_length": 6, "time_conditioned": False}
    axial = TokenTransformer(**SMALL, **shape, positions="axial", columns=2)
    learned = TokenTransformer(**SMALL, **shape, positions="learned")
    x = X[:, :5]
    params = axial.init(KEY, x, None)["params"]
    params = jax.tree.map(lambda v: v + 0.1, params)  # the last layer begins at zero
    rest = {k: v for k, v in params.items() if k not in ("rows", "columns")}
    assert params["rows"].shape == (3, 16) and params["columns"].shape == (2, 16)
    table = (params["rows"][:, None] + params["columns"][None]).reshape(6, 16)
    y = axial.apply({"params": params}, x, None)
    z = learned.apply({"params": {**rest, "positions": table}}, x, None)
    np.testing.assert_allclose(y, z, atol=1e-6)
    with pytest.raises(AssertionError):  # which place is which does matter
        z = learned.apply({"params": {**rest, "positions": table[::-1]}}, x, None)
        np.testing.assert_allclose(y, z, atol=1e-6)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_without_time(num_classes, generic):
    net, params = built(generic, time_conditioned=False, num_classes=num_classes)
    y = net(X, None)
    np.testing.assert_array_equal(y, net(X, 0.3))
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert not any("time" in name for name in names)
    # Without any condition nothing modulates: the norms carry their own scale and shift.
    assert any("modulation" in name for name in names) == bool(num_classes)
    assert any("attention_norm" in name for name in names) != bool(num_classes)
    if num_classes:
        z = net(X, None, label=np.array([0, 1]))
        assert np.abs(z - y).max() > 1e-3


def test_token_weights_extend_tokens(generic):
    net, _ = built(generic, positions="learned")
    y = net(X, 0.5)
    z = net(np.eye(V + 1, dtype=np.float32)[X], 0.5)
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-5)
    clean = np.minimum(X, V - 1)
    np.testing.assert_allclose(
        net(np.eye(V, dtype=np.float32)[clean], 0.5),
        net(clean, 0.5),
        rtol=1e-4,
        atol=1e-5,
    )


def test_token_out_of_range_is_nan(generic):
    net, _ = built(generic)
    for bad in (V + 1, -1):
        x = X.copy()
        x[1, 2] = bad
        y = net(x, 0.5)
        assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()


def test_bfloat16_logits_are_not_rounded(generic):
    y = built(generic, dtype="bfloat16")[0](X, 0.5)
    assert y.dtype == jnp.float32
    assert float((y != y.astype(jnp.bfloat16).astype(np.float32)).mean()) > 0.9


def test_errors():
    def fails(match, x=X, **fields):
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(TokenTransformer(**SMALL | fields).init, KEY, x, 0.5)

    fails(
        "positions must be one of .*; got 'rotatory'; did you mean 'rotary'", positions="rotatory"
    )
    fails("'axial' and columns go together, got 'axial' and None", positions="axial")
    fails("'axial' and columns go together, got 'rotary' and 3", columns=3)
    fails("max_length", positions="axial", columns=5, max_length=7)
    fails("sequence length 7 exceeds max_length = 6", max_length=6)
    fails("last axis of 5 or 6, got shape", x=jnp.zeros((2, L, 4)))
    fails("even width, got 5", width=10)
