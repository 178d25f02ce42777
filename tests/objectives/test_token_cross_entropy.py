"""Cross-entropy in pieces: the same numbers and slopes as in one go, in bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.methods.base import Network
from diffusion_jax.networks import TokenTransformer
from diffusion_jax.objectives import (
    chunked_cross_entropy,
    cross_entropy,
    token_cross_entropy,
)

B, L, C, V = 3, 10, 8, 37


def problem(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    targets = jnp.asarray(rng.integers(0, V, (B, L)))
    return {"kernel": draw(C, V), "bias": draw(V)}, draw(B, L, C), targets, draw(B, L)


def head(params):
    return lambda h: h @ params["kernel"] + params["bias"]


def test_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1]]])) + 7.0
    found = cross_entropy(logits, jnp.array([[0, 1]]))
    np.testing.assert_allclose(found, -np.log([[0.5, 0.1]]), rtol=1e-5)
    low = cross_entropy(logits.astype(jnp.bfloat16), jnp.array([[0, 1]]))
    assert low.dtype == jnp.float32


@pytest.mark.parametrize("elements", [1, B * V * 3, B * V * 4, B * V * L, 10**9])
def test_pieces_equal_the_whole(elements, x64):
    """Values and slopes, for pieces of 1, 3 and 4 (which do not divide 10), 10 and all positions."""
    params, hidden, targets, weights = problem(jnp.float64)

    def loss(params, hidden, cut):
        if cut:
            found = chunked_cross_entropy(head(params), hidden, targets, elements=elements)
        else:
            found = cross_entropy(head(params)(hidden), targets)
        return (weights * found).sum(), found

    both = quick_jit(
        lambda p, h: [jax.value_and_grad(loss, (0, 1), has_aux=True)(p, h, c) for c in (1, 0)]
    )
    cut, whole = both(params, hidden)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), cut, whole)


def test_float32_is_equal_to_rounding():
    params, hidden, targets, _ = problem()
    found = chunked_cross_entropy(head(params), hidden, targets, elements=B * V)
    whole = cross_entropy(head(params)(hidden), targets)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, whole, rtol=2e-6, atol=2e-6)


def bound_network(vocab_size=V, **options):
    fields = {"width": 16, "depth": 1, "heads": 1, "time_conditioned": False} | options
    module = TokenTransformer(vocab_size, **fields)
    spec = DataSpec("tokens", {"tokens": Element((L,), "int32")}, vocab_size=vocab_size)
    return Network.of(module, spec)


@pytest.mark.parametrize("train", [False, True])
def test_a_bound_network_gives_the_cross_entropy_of_its_logits(train):
    net = bound_network(dropout=0.3, dtype=jnp.bfloat16)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, V + 1, (B, L)))
    batch = {"tokens": tokens, "index": jnp.arange(B)}
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), tokens, batch))
    params = jax.tree.map(lambda v: 0.3 * jnp.ones(v.shape, v.dtype), shapes)
    params["output"]["kernel"] = jnp.asarray(np.random.default_rng(1).normal(size=(16, V)))
    params["tokens"]["table"] = jnp.asarray(np.random.default_rng(2).normal(size=(V + 1, 16)))

    @quick_jit
    def both(params):
        bound = net.bind(params, batch, train, jax.random.key(1))
        targets = jnp.minimum(tokens, V - 1)
        own = token_cross_entropy(bound, tokens, {"t": 0.5}, targets)
        return own, cross_entropy(bound(tokens, 0.5), targets)

    own, plain = both(params)
    np.testing.assert_allclose(own, plain, rtol=1e-5, atol=1e-5)
    assert plain.std() > 0.1


def test_memory_at_a_large_vocabulary():
    """What XLA needs beside arguments and results: pieces of 16 in place of 128 positions."""
    batch, length, width, vocab = 2, 128, 32, 50_257
    shape = jax.ShapeDtypeStruct
    params = {"kernel": shape((width, vocab), jnp.float32), "bias": shape((vocab,), jnp.float32)}
    hidden = shape((batch, length, width), jnp.float32)
    targets = jnp.zeros((batch, length), jnp.int32)

    def temporary(elements):
        def loss(params, hidden):
            return chunked_cross_entropy(head(params), hidden, targets, elements=elements).mean()

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, hidden).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole, pieces = temporary(10**9), temporary(16 * batch * vocab)
    logits = 4 * batch * length * vocab
    assert whole > 0.95 * logits
    # logits and their slopes of a piece, and slopes of the parameters while they are summed
    assert pieces < 2.5 * logits / 8 + 3 * 4 * width * vocab
    assert pieces < 0.3 * whole


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda p, h, y: cross_entropy(h, y[:, 1:]), r"logits of shape \(3, 10, 8\) do not fit"),
        (
            lambda p, h, y: chunked_cross_entropy(head(p), h, y[1:]),
            r"hidden states of shape \(3, 10, 8\) do not fit tokens of shape \(2, 10\)",
        ),
        (
            lambda p, h, y: chunked_cross_entropy(head(p), h, y, elements=0),
            "elements must be positive, got 0",
        ),
    ],
)
def test_errors(make, words):
    params, hidden, targets, _ = problem()
    with pytest.raises(ValueError, match=words):
        make(params, hidden, targets)
