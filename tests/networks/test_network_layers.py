import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks.features import rotary_angles
from diffusion_jax.networks.layers import (
    AttentionBlock,
    Condition,
    GroupNorm,
    LayerNorm,
    Lookup,
    OutputDense,
    ResidualBlock,
    SelfAttention,
    TransformerBlock,
    TransformerStack,
)


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def apply(layer, params, *args, **kwargs):
    y = jax.jit(lambda p: layer.apply({"params": p}, *args, **kwargs))(params)
    return jax.tree.map(np.asarray, y)


def init(layer, *args):
    run = jax.jit(lambda key: layer.init_with_output(key, *args))
    return jax.tree.map(np.asarray, run(jax.random.key(0, impl="rbg")))


def attention_by_hand(params, x, heads, turn=None):
    """Multi-head attention in float64, one head at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    width = x.shape[-1]
    n = width // heads
    qkv = np.einsum("blc,cd->bld", x, p["qkv"]["kernel"]) + p["qkv"]["bias"]
    out = np.zeros_like(x)
    for head in range(heads):
        q, k, v = (qkv[..., i * width + head * n : i * width + (head + 1) * n] for i in range(3))
        if turn is not None:
            q, k = turn(q), turn(k)
        scores = np.einsum("bqn,bkn->bqk", q, k) / np.sqrt(n)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[..., head * n : (head + 1) * n] = np.einsum("bqk,bkn->bqn", weights, v)
    return np.einsum("blc,cd->bld", out, p["out"]["kernel"]) + p["out"]["bias"]


@pytest.mark.parametrize("heads", [1, 3])
def test_attention_matches_einsum_softmax(heads, generic):
    x = normal((2, 5, 12))
    layer = SelfAttention(heads)
    params = generic(layer, x, scale=0.5)
    expected = attention_by_hand(params, x, heads)
    np.testing.assert_allclose(apply(layer, params, x), expected, atol=2e-5)
    half = apply(SelfAttention(heads, dtype=jnp.bfloat16), params, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(half, np.float64), expected, atol=0.04 * np.abs(expected).max()
    )


def test_attention_turns_queries_and_keys(generic):
    x, heads, n = normal((2, 5, 12)), 2, 6
    layer = SelfAttention(heads)
    params = generic(layer, x, scale=0.5)

    def turn(q):
        z = q[..., : n // 2] + 1j * q[..., n // 2 :]
        z = z * np.exp(1j * np.arange(5)[:, None] * 10_000.0 ** (-np.arange(3) / 3))
        return np.concatenate([z.real, z.imag], -1)

    got = apply(layer, params, x, rotary_angles(5, n))
    np.testing.assert_allclose(got, attention_by_hand(params, x, heads, turn), atol=2e-5)


def test_attention_softmax_is_float32_in_half_precision(generic):
    # 512 equal scores: a softmax in bfloat16 sums weights of 1/512 with a visible error.
    x = np.ones((1, 512, 8), jnp.bfloat16)
    layer = SelfAttention(2, dtype=jnp.bfloat16)
    params = generic(layer, x)
    many, one = (apply(layer, params, y)[0, 0] for y in (x, x[:, :1]))
    np.testing.assert_allclose(many.astype(np.float32), one.astype(np.float32), rtol=1e-2)


@pytest.mark.parametrize(
    "channels, groups", [(3, 1), (8, 2), (24, 6), (44, 11), (128, 32), (136, 17), (256, 32)]
)
def test_group_norm_normalises_its_groups(channels, groups):
    x = 3.0 + 2.0 * normal((2, 3, 4, channels))
    y, _ = init(GroupNorm(), x)
    g = np.asarray(x, np.float64).reshape(2, 12, groups, -1)
    expected = (g - g.mean((1, 3), keepdims=True)) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-6)
    np.testing.assert_allclose(y, expected.reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("norm", [GroupNorm(dtype=jnp.bfloat16), LayerNorm(dtype=jnp.bfloat16)])
def test_norm_statistics_are_float32(norm):
    # With a mean of 300 standard deviations E[x^2] - E[x]^2 or bfloat16 sums would lose the signal.
    x = 300.0 + normal((1, 4, 64))
    y, variables = init(norm, x)
    assert y.dtype == jnp.bfloat16
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(variables))
    axes = (1, 2) if isinstance(norm, GroupNorm) else (2,)
    g = np.asarray(x, np.float64).reshape(1, 4, 16, 4) if len(axes) == 2 else np.asarray(x)
    axes = (1, 3) if len(axes) == 2 else (2,)
    expected = (g - g.mean(axes, keepdims=True)) / g.std(axes, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected.reshape(x.shape), atol=0.02)


def test_lookup_outside_the_table_is_nan():
    layer = Lookup(3, 4, 1.0)
    index = np.array([[0, 2], [3, -1]])
    y, variables = init(layer, index)
    np.testing.assert_array_equal(y[0], variables["params"]["table"][[0, 2]])
    assert np.isnan(y[1]).all()


def test_lookup_mean_of_one_hot_is_the_row():
    layer = Lookup(4, 5, 1.0)
    table, variables = init(layer, np.arange(4))
    for width in (3, 4):
        got = layer.apply(variables, np.eye(width, dtype=np.float32), method="mean")
        np.testing.assert_allclose(got, table[:width], rtol=1e-6)


def test_output_is_not_rounded_to_the_compute_dtype(generic):
    x = normal((3, 7))
    layer = OutputDense(5, jnp.bfloat16)
    y, _ = init(layer, x)
    np.testing.assert_array_equal(y, np.zeros((3, 5)))
    params = generic(layer, x)
    y = layer.apply({"params": params}, x)  # not jitted: XLA may skip a rounding between two steps
    assert y.dtype == jnp.float32
    operands = [np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (x, params["kernel"])]
    np.testing.assert_allclose(
        y, operands[0] @ operands[1] + np.asarray(params["bias"]), rtol=1e-5, atol=1e-6
    )
    assert (y != y.astype(jnp.bfloat16).astype(np.float32)).any()


def test_condition_is_the_sum_of_time_and_label(generic):
    t, label = np.array([0.2, 0.7], np.float32), np.array([1, 3])
    layer = Condition(6, num_classes=3, time_features=8)
    params = generic(layer, t, label)
    assert params["label"]["table"].shape == (4, 6)
    both = apply(layer, params, t, label)
    time = apply(layer, params, t, None)
    np.testing.assert_allclose(both, time + params["label"]["table"][label], rtol=1e-5)
    assert apply(layer, params, None, None) is None


@pytest.mark.parametrize("conditioned", [True, False])
def test_transformer_block_starts_as_identity(conditioned, generic):
    x = normal((2, 4, 8))
    condition = normal((2, 8), 1) if conditioned else None
    layer = TransformerBlock(2)
    y, _ = init(layer, x, condition, None, False)
    np.testing.assert_array_equal(y, x)
    params = generic(layer, x, condition, None, False)
    y = apply(layer, params, x, condition, None, False)
    assert np.abs(y - x).max() > 1e-2


@pytest.mark.parametrize("conditioned", [True, False])
def test_stack_is_its_blocks_one_after_the_other(conditioned, generic):
    x = normal((2, 4, 8))
    condition = normal((2, 8), 1) if conditioned else None
    angles = rotary_angles(4, 4)
    stack = TransformerStack(3, heads=2)
    params = generic(stack, x, condition, angles, False)
    run = jax.jit(
        lambda p, y: TransformerBlock(2).apply({"params": p}, y, condition, angles, False)
    )
    y = x
    for i in range(3):
        y = run(jax.tree.map(lambda a, i=i: a[i], params["block"]), y)
    got = apply(stack, params, x, condition, angles, False)
    np.testing.assert_allclose(got, y, rtol=1e-5, atol=1e-5)


def test_stack_draws_each_block_afresh():
    x, condition = normal((2, 4, 8)), normal((2, 8), 1)
    _, variables = init(TransformerStack(3, heads=2), x, condition, None, False)
    kernel = variables["params"]["block"]["mlp_in"]["kernel"]
    assert kernel.shape == (3, 8, 32)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1
    # lecun_normal: the variance of an element is 1 / inputs, not 1 / (depth * inputs).
    assert float(kernel.var()) == pytest.approx(1 / 8, rel=0.2)


@pytest.mark.parametrize("remat", [False, True])
def test_stack_draws_dropout_afresh_in_each_block(remat, generic):
    # Two blocks with equal parameters that add their dropped-out input: equal masks would leave
    # every element multiplied by 0 or 2 twice, and never once.
    x = np.ones((1, 8, 8), np.float32)
    stack = TransformerStack(2, heads=1, dropout=0.5, remat=remat)
    params = jax.tree.map(np.zeros_like, generic(stack, x, None, None, False))
    params["block"]["attention"]["out"]["bias"] += 1.0
    rngs = {"dropout": jax.random.key(0)}
    with jax.debug_key_reuse(True):
        y = apply(stack, params, x, None, None, True, rngs=rngs)
    np.testing.assert_array_equal(np.unique(y), [1.0, 3.0, 5.0])


@pytest.mark.parametrize("resample, side", [(None, 4), ("down", 2), ("up", 8)])
def test_residual_block_starts_as_resampling(resample, side, generic):
    x, condition = normal((2, 4, 4, 8)), normal((2, 6), 1)
    layer = ResidualBlock(8, resample)
    y, _ = init(layer, x, condition, False)
    pixels = np.asarray(x)
    if resample == "down":
        pixels = (pixels[:, ::2] + pixels[:, 1::2])[:, :, ::2] / 4
        pixels += (np.asarray(x)[:, ::2] + np.asarray(x)[:, 1::2])[:, :, 1::2] / 4
    elif resample == "up":
        pixels = pixels.repeat(2, 1).repeat(2, 2)
    np.testing.assert_allclose(y, pixels, atol=1e-6)
    y = apply(layer, generic(layer, x, condition, False), x, condition, False)
    assert y.shape == (2, side, side, 8)
    assert np.abs(y - pixels).max() > 1e-2


def test_residual_block_projects_when_the_width_changes():
    x, condition = normal((2, 4, 4, 6)), normal((2, 6), 1)
    y, variables = init(ResidualBlock(10), x, condition, False)
    skip = jax.tree.map(np.asarray, variables["params"]["skip"])
    np.testing.assert_allclose(
        y, np.einsum("bhwc,cd->bhwd", x, skip["kernel"]) + skip["bias"], atol=1e-5
    )


def test_attention_block_ignores_where_pixels_are(generic):
    x = normal((2, 3, 4, 8))
    layer = AttentionBlock(2)
    params = generic(layer, x)
    order = np.random.default_rng(0).permutation(12)

    def shuffle(a):
        return a.reshape(2, 12, 8)[:, order].reshape(a.shape)

    y = apply(layer, params, x)
    np.testing.assert_allclose(apply(layer, params, shuffle(x)), shuffle(y), atol=1e-5)
    assert np.abs(y - x).max() > 1e-2
