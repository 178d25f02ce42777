"""Block diffusion's bound and the likelihood of autoregressive models, against exact enumeration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from token_laws import L, V, index_of, network

from diffusion_jax.objectives import (
    block_cross_entropy,
    blockwise,
    exact_block_bound,
    next_token_cross_entropy,
    search_clip,
)
from diffusion_jax.objectives.block import block_sizes, by_count, by_time
from diffusion_jax.processes import Absorbing, CosineSchedule

PROCESS = Absorbing(V)
GOLDEN = golden("discrete_likelihood")
X0 = GOLDEN["x0"].astype(np.int32)


def lookup(name, dtype=np.float32):
    table = jnp.asarray(np.log(np.maximum(network(name), 1e-300)) + np.arange(L)[:, None], dtype)
    powers = jnp.asarray((V + 1) ** np.arange(L)[::-1])
    return lambda x, t: table[x @ powers]


@pytest.mark.parametrize("name", ["oracle", "model"])
@pytest.mark.parametrize("size", [1, 2, 3, L])
def test_bound_by_enumeration(name, size):
    expected = GOLDEN[f"block_{'full' if size == L else size}_{name}"]
    with jax.enable_x64(True):
        denoise = blockwise(lookup(name, np.float64), PROCESS, size)
        got = exact_block_bound(PROCESS, denoise, X0, block_size=size)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
    if name == "oracle":
        np.testing.assert_allclose(got, -GOLDEN["log_p"], rtol=0, atol=1e-9)


def test_likelihood_by_the_chain_rule():
    one = blockwise(lookup("model"), PROCESS, 1)
    hidden = jnp.full(X0.shape, V)
    predict = lambda x, t: one(hidden, t, clean=x)
    losses, aux = next_token_cross_entropy(PROCESS, predict, X0)
    np.testing.assert_allclose(losses, GOLDEN["block_1_model"], rtol=2e-5)
    np.testing.assert_allclose(aux["cross_entropy"], losses / L, rtol=1e-6)
    # of the last two given the others: what the full likelihood has more
    last = np.broadcast_to(np.arange(L) >= 3, X0.shape)
    answers, _ = next_token_cross_entropy(PROCESS, predict, X0, where=jnp.asarray(last))
    others, _ = next_token_cross_entropy(PROCESS, predict, X0, where=jnp.asarray(~last))
    np.testing.assert_allclose(answers + others, losses, rtol=2e-5)
    index = index_of(np.where(last, V, X0))
    first = -np.log(network("model")[index, 3, X0[:, 3]])
    assert (answers > first - 1e-5).all()


@pytest.mark.parametrize(
    "process, options",
    [
        (PROCESS, {}),
        (Absorbing(V, t_min=0.0), {"masking": "continuous"}),
        (Absorbing(V, CosineSchedule(), t_min=0.0), {"masking": "continuous"}),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_estimates_average_to_the_bound(process, options, size):
    tokens = np.repeat(X0[7:8], 500, axis=0)
    denoise = blockwise(lookup("model"), process, size)

    @jax.jit
    def one(key):
        made = block_cross_entropy(process, denoise, key, tokens, block_size=size, **options)
        return made[0].mean()

    means = np.array(jax.lax.map(one, jax.random.split(jax.random.key(1), 60)))
    error = means.std() / np.sqrt(len(means))
    expected = GOLDEN[f"block_{size}_model"][7]
    assert abs(means.mean() - expected) < 4 * error < 0.05 * expected


@pytest.mark.parametrize("masking", ["count", "continuous"])
def test_no_key_is_used_twice(masking):
    denoise = blockwise(lookup("model"), PROCESS, 2)
    options = {"block_size": 2, "masking": masking}
    with jax.debug_key_reuse(True):
        run = jax.jit(lambda key: block_cross_entropy(PROCESS, denoise, key, X0, **options)[0])
        assert np.isfinite(run(jax.random.key(0))).all()


def test_blocks_of_one_need_no_draws():
    denoise = blockwise(lookup("model"), PROCESS, 1)
    losses, aux = block_cross_entropy(PROCESS, denoise, jax.random.key(0), X0, block_size=1)
    np.testing.assert_allclose(losses, GOLDEN["block_1_model"], rtol=2e-5)
    assert (aux["masked"] == 1).all()


def test_every_block_has_its_count_and_weight():
    tokens, index = np.zeros((40, 8), np.int32), jnp.arange(40)
    drawn = by_count(PROCESS, jax.random.key(0), tokens, index, 40, 3)
    hit, weight = np.asarray(drawn.x == V), np.asarray(drawn.weight)
    sizes = block_sizes(8, 3)
    assert list(sizes) == [3, 3, 2]
    for b, (begin, n) in enumerate(zip((0, 3, 6), sizes)):
        count = hit[:, begin : begin + n].sum(axis=1)
        # one shift of an even grid: counts are as even as they can be
        assert abs(np.bincount(count, minlength=n + 1)[1:] - 40 / n).max() <= 1, b
        np.testing.assert_allclose(weight[:, begin : begin + n], np.tile(n / count, (n, 1)).T)
    # where the masks stand is even too, and blocks are independent
    np.testing.assert_allclose(hit.mean(axis=0)[:6], 2 / 3, atol=0.25)


def test_times_are_spread_over_blocks_and_batch_and_clipped():
    tokens, index = np.zeros((50, 6), np.int32), jnp.arange(50)
    drawn = by_time(PROCESS, jax.random.key(0), tokens, index, 50, 2, (0.3, 0.8))
    t = np.asarray(drawn.t)
    assert 0.3 <= t.min() and t.max() <= 0.8
    np.testing.assert_array_equal(t[:, ::2], t[:, 1::2])
    blocks = t[:, ::2]
    np.testing.assert_allclose(np.diff(np.sort(blocks, axis=0), axis=0), 0.5 / 50, rtol=1e-3)
    np.testing.assert_allclose(np.diff(np.sort(blocks, axis=1), axis=1), 0.5 / 3, rtol=1e-3)
    np.testing.assert_allclose(drawn.weight, 1 / t, rtol=1e-5)
    shard = by_time(PROCESS, jax.random.key(0), tokens[20:], index[20:], 50, 2, (0.3, 0.8))
    jax.tree.map(np.testing.assert_array_equal, shard, jax.tree.map(lambda v: v[20:], drawn))


def test_the_search_finds_the_rates_of_least_variance():
    """A network that knows nothing costs log V a mask: the variance of Binomial(n, r) / r falls in r."""
    flat = blockwise(lambda x, t: jnp.zeros((*x.shape, V)), PROCESS, 4)
    tokens = jnp.zeros((64, 8), int)
    found = search_clip(
        PROCESS, flat, jax.random.key(0), tokens, block_size=4, widths=(0.5,), step=0.25
    )
    assert found.clip == (0.5, 1.0)
    assert list(found.variances) == [(0.0, 0.5), (0.25, 0.75), (0.5, 1.0)]
    for (low, high), variance in list(found.variances.items())[1:]:
        r = np.linspace(low, high, 10_001)
        # two blocks of a mean that does not depend on r
        expected = 2 * np.log(V) ** 2 * np.mean(4 * (1 - r) / r)
        assert variance == pytest.approx(expected, rel=0.15)


def test_errors():
    denoise = blockwise(lookup("model"), PROCESS, 2)

    def fails(match, tokens=X0, size=2, **options):
        with pytest.raises(ValueError, match=match):
            block_cross_entropy(
                PROCESS, denoise, jax.random.key(0), tokens, block_size=size, **options
            )

    fails("block_size must be a positive int, got 0", size=0)
    fails("masking must be one of continuous, count; got 'kount'", masking="kount")
    fails("clip must be 0 <= low < high <= 1", masking="continuous", clip=(0.5, 0.2))
    fails(r"tokens must lie in 0..3; got 0..4", tokens=X0 + (X0 == 3))
    with pytest.raises(ValueError, match="too long to enumerate"):
        exact_block_bound(PROCESS, denoise, np.zeros((1, 20), int), block_size=13)
    with pytest.raises(ValueError, match="positive step"):
        search_clip(PROCESS, denoise, None, X0, block_size=2, step=0.0)
