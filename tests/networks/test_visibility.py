"""Causal, block-causal and two-stream attention of the token transformer, by what changes its logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import TokenTransformer
from diffusion_jax.networks.visibility import block_limits, streams, up_to

V, L = 5, 7
RNG = np.random.default_rng(0)
X = RNG.integers(0, V + 1, (2, L))
CLEAN = RNG.integers(0, V, (2, L))
SMALL = dict(vocab_size=V, width=16, depth=2, heads=2, time_conditioned=False, max_length=L + 1)


def built(generic, **fields):
    net = TokenTransformer(**SMALL | fields)
    params = generic(net, X, None)
    call = jax.jit(lambda *args, **kw: net.apply({"params": params}, *args, None, **kw))
    return net, lambda *args, **kw: jax.tree.map(np.asarray, call(*args, **kw))


def changes(call, x):
    """Bool [L, outputs]: which outputs change with the token at a position; the others keep their bits."""
    y = call(x)
    found = []
    for i in range(L):
        z = call(np.where(np.arange(L) == i, (x + 1) % V, x))
        found.append(np.abs(z - y).max(axis=(0, 2)) > 0)
        assert (np.abs(z - y).max(axis=2)[:, found[-1]] > 1e-4).all()
    return np.array(found)


POSITION = np.arange(L)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_causal_logits_know_earlier_tokens_alone(positions, generic):
    _, net = built(generic, attention="causal", positions=positions)
    np.testing.assert_array_equal(changes(net, CLEAN), POSITION[:, None] < POSITION)


@pytest.mark.parametrize("size", [1, 3, L])
def test_block_logits_know_their_block_and_earlier_ones(size, generic):
    _, net = built(generic, attention="block", block_size=size)
    block = POSITION // size
    np.testing.assert_array_equal(changes(net, CLEAN), block[:, None] <= block)


def test_one_block_is_full_attention(generic):
    _, block = built(generic, attention="block", block_size=L)
    _, full = built(generic)
    np.testing.assert_allclose(block(X), full(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3, L])
def test_a_noisy_block_sees_itself_and_earlier_clean_blocks(size, generic):
    _, net = built(generic, attention="block", block_size=size)
    block = POSITION // size
    noisy = changes(lambda x: net(x, clean=CLEAN), X)
    np.testing.assert_array_equal(noisy, block[:, None] == block)
    clean = changes(lambda c: net(X, clean=c), CLEAN)
    np.testing.assert_array_equal(clean, block[:, None] < block)
    assert net(X, clean=CLEAN).shape == (2, L, V)


@pytest.mark.parametrize("size", [1, 3, L])
@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_noisy_segment_beside_a_causal_sequence(size, positions, generic):
    """Noisy tokens reach their own segment alone; clean ones later segments and the causal logits."""
    _, net = built(generic, attention="causal", block_size=size, positions=positions)
    segment = POSITION // size
    noisy = changes(lambda x: net(x, clean=CLEAN), X)
    assert not noisy[:, L:].any()
    np.testing.assert_array_equal(noisy[:, :L], segment[:, None] == segment)
    clean = changes(lambda c: net(X, clean=c), CLEAN)
    np.testing.assert_array_equal(clean[:, :L], segment[:, None] < segment)
    np.testing.assert_array_equal(clean[:, L:], POSITION[:, None] < POSITION)
    # the autoregressive model is still there, bit for bit where the sums are the same
    np.testing.assert_allclose(net(X, clean=CLEAN)[:, L:], net(CLEAN), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [2, 3])
def test_a_block_in_the_single_sequence_is_the_block_of_the_two_streams(size, generic):
    _, net = built(generic, attention="block", block_size=size)
    both = net(X, clean=CLEAN)
    for begin in range(0, L, size):
        one = net(np.where(POSITION < begin, CLEAN, X))
        own = slice(begin, begin + size)
        np.testing.assert_allclose(one[:, own], both[:, own], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "fields", [dict(attention="causal"), dict(attention="block", block_size=3)]
)
def test_read_in_pieces_the_logits_are_the_same(fields, generic):
    """Slots read one window after the other against the cache."""
    net, call = built(generic, **fields)
    slots = np.arange(L)
    causal = fields["attention"] == "causal"
    x = np.concatenate([np.full((2, 1), V), X[:, :-1]], axis=1) if causal else X
    limit = slots if causal else np.minimum(slots // 3 * 3 + 2, L - 1)
    cache, found = net.init_cache(2, L), []
    for begin, end in ((0, 3), (3, 6), (6, 7)):
        piece = slice(begin, end)
        y, cache = call(x[:, piece], cache=cache, begin=begin, limit=limit[piece])
        found.append(y)
    np.testing.assert_allclose(np.concatenate(found, axis=1), call(X), rtol=1e-5, atol=1e-6)
    assert cache.key.shape == (2, 2, L, 2, 8) and np.abs(cache.value).min(axis=(0, 1, 3, 4)).all()


def test_masks_by_hand():
    slots = jnp.arange(4)
    np.testing.assert_array_equal(block_limits(slots, 2), [1, 1, 3, 3])
    np.testing.assert_array_equal(up_to(jnp.array([0, 2]), 4), [[1, 0, 0, 0], [1, 1, 1, 0]])
    # two tokens, segments of one: noisy | clean
    got = streams(jnp.arange(2), jnp.array([0, 1]), jnp.arange(2))
    expected = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(got, expected)


def test_errors():
    def fails(match, *args, made=None, **fields):
        with pytest.raises(ValueError, match=match):
            net = TokenTransformer(**SMALL | fields)
            made(net) if made else net.init(jax.random.key(0), X, None, *args)

    fails("attention must be one of .*; got 'casual'; did you mean 'causal'", attention="casual")
    fails("needs time_conditioned=False", attention="causal", time_conditioned=True)
    fails("block_size must be a positive integer, got None", attention="block")
    init = lambda **kw: lambda net: net.init(jax.random.key(0), X, None, **kw)
    fails("need attention 'causal' or 'block'", made=init(clean=CLEAN))
    fails("block_size is missing", made=init(clean=CLEAN), attention="causal")
    fails("clean must be integers", made=init(clean=X[:1]), attention="causal", block_size=2)
    fails(
        "8 slots exceed max_length = 7",
        made=init(clean=CLEAN),
        attention="causal",
        block_size=2,
        positions="learned",
        max_length=7,
    )
    fails("attention 'full' cannot be cached", made=lambda net: net.init_cache(2, L))
    cache = TokenTransformer(**SMALL, attention="causal").init_cache(2, L)
    fails("a cache needs limit", made=init(cache=cache), attention="causal")
    fails(
        "reads integer tokens",
        made=lambda net: net.init(jax.random.key(0), jnp.zeros((2, L, V)), None),
        attention="causal",
    )
