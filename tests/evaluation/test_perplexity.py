"""Monte Carlo likelihoods against exact ones, orders against the chain rule, texts as tokens."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit
from token_laws import network

from diffusion_jax import evaluation, oracles
from diffusion_jax.data.codecs import Codec
from diffusion_jax.evaluation import mask_sets, perplexity
from diffusion_jax.processes import Absorbing

V, L = 3, 3
TABLE = np.random.default_rng(3).gamma(0.6, size=(V,) * L) + 0.02
TABLE /= TABLE.sum()
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))
P = Absorbing(V)
# a network whose conditionals do not come from one joint law
WRONG = jnp.asarray(np.random.default_rng(0).standard_normal(((V + 1) ** L, L, V)), jnp.float32)


def wrong(x, t):
    return WRONG[x @ (V + 1) ** jnp.arange(L)[::-1]]


def exact(denoise):
    return mask_sets.cross_entropies(P, denoise, SEQUENCES)


def test_left_to_right_is_the_chain_rule(x64):
    """`block_1` of the goldens, for the oracle and for the crooked network."""
    g = golden("discrete_likelihood")
    for name in ("oracle", "model"):
        table = jnp.asarray(np.log(np.maximum(network(name), 1e-300)))
        denoise = lambda x, t, table=table: table[x @ 5 ** jnp.arange(5)[::-1]]
        tokens = jnp.asarray(g["x0"])
        found = quick_jit(evaluation.order_nats, static_argnums=(0, 1))(
            Absorbing(4), denoise, tokens
        )
        np.testing.assert_allclose(found.sum(axis=1), g[f"block_1_{name}"], atol=1e-11)
        if name == "oracle":
            np.testing.assert_allclose(found.sum(axis=1), -g["log_p"], atol=1e-11)


def test_the_mean_over_all_orders_is_the_bound():
    tokens = jnp.asarray(SEQUENCES, jnp.int32)
    run = quick_jit(lambda order: evaluation.order_nats(P, wrong, tokens, order))
    each = []
    for order in itertools.permutations(range(L)):
        found = run(jnp.broadcast_to(jnp.array(order), tokens.shape))
        # the first position of the order is predicted from nothing
        alone = -jax.nn.log_softmax(WRONG[-1])[order[0], tokens[:, order[0]]]
        np.testing.assert_allclose(found[:, order[0]], alone, rtol=1e-5)
        each.append(found.sum(axis=1))
    bound = mask_sets.weighted_bound(exact(wrong), mask_sets.any_order_weights(L))
    np.testing.assert_allclose(np.mean(each, axis=0), bound, rtol=1e-5)
    drawn = quick_jit(lambda key: evaluation.any_order_nats(P, wrong, key, tokens, orders=200))(
        jax.random.key(0)
    )
    errors = drawn.std(axis=0) / np.sqrt(200)
    assert drawn.shape == (200, 27) and (np.abs(drawn.mean(axis=0) - bound) < 4 * errors).all()
    # every order, and differently for different sequences
    assert len(np.unique(drawn[:, 5].round(4))) == 6


def test_answers_given_prompts():
    """Left to right, in random orders and as a bound: all equal for the oracle, whatever is given."""
    tokens, oracle = jnp.asarray(SEQUENCES, jnp.int32), oracles.token_table(TABLE)
    where = np.zeros((27, L), bool)
    where[:9, 1], where[9:18, ::2] = True, True
    where[18:] = True
    truth = []
    for x0, free in zip(SEQUENCES, where):
        given = TABLE.sum(axis=tuple(np.flatnonzero(free)), keepdims=True)
        given = np.broadcast_to(given, TABLE.shape)
        truth.append(-np.log(TABLE[tuple(x0)] / given[tuple(x0)]))

    @quick_jit
    def all_three(key):
        chain = evaluation.order_nats(P, oracle, tokens, where=where)
        orders = evaluation.any_order_nats(P, oracle, key, tokens, orders=2, where=where)
        return (
            chain,
            orders,
            evaluation.count_bound(P, oracle, key, tokens, draws=600, where=jnp.asarray(where)),
        )

    chain, orders, draws = all_three(jax.random.key(0))
    assert (np.asarray(chain)[~where] == 0).all()
    np.testing.assert_allclose(chain.sum(axis=1), truth, rtol=1e-4)
    np.testing.assert_allclose(orders, np.broadcast_to(truth, (2, 27)), rtol=1e-4)
    draws = np.asarray(draws)
    errors = np.maximum(draws.std(axis=0) / np.sqrt(600), 1e-5)
    assert (np.abs(draws.mean(axis=0) - np.array(truth)) < 4 * errors).all()


def test_draws_of_a_sequence_have_every_count_equally_often():
    seen = []

    def denoise(x, t):
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), (x == V).sum(axis=1))
        return jnp.zeros((*x.shape, V))

    tokens = jnp.asarray(SEQUENCES[:4], jnp.int32)
    evaluation.count_bound(P, denoise, jax.random.key(0), tokens, draws=12)
    jax.effects_barrier()
    counts = np.array(seen)
    assert counts.shape == (12, 4)
    for column in counts.T:
        np.testing.assert_array_equal(np.bincount(column), [0, 4, 4, 4])


def test_even_counts_beat_independent_ones():
    tokens = jnp.asarray(SEQUENCES, jnp.int32)
    run = quick_jit(
        lambda key: evaluation.count_bound(P, wrong, key, tokens, draws=12).mean(axis=0)
    )
    means = np.array([run(jax.random.key(i)) for i in range(150)])
    alone = mask_sets.count_variance(exact(wrong)).mean() / 12
    assert means.var(axis=0).mean() < 0.9 * alone


def test_a_method_s_bound_is_repeated_on_a_data_set():
    def bound(params, key, batch):
        noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch["index"])
        return params * batch["tokens"].sum(axis=1) + noise

    data = {"tokens": np.ones((50, 4), np.int32), "index": np.arange(50, dtype=np.int32)}
    nats = evaluation.estimate_bound(bound, 2.0, jax.random.key(0), data, draws=6, batch_size=20)
    assert nats.shape == (6, 50) and len(np.unique(nats)) == 300
    found = evaluation.summarise(nats, 200)
    assert found.nats_per_token == pytest.approx(nats.sum() / 6 / 200)
    assert found.bits_per_token == pytest.approx(found.nats_per_token / np.log(2))
    assert found.perplexity == pytest.approx(np.exp(found.nats_per_token))
    spread = nats.sum(axis=1).std(ddof=1) / 200 / np.sqrt(6)
    assert found.standard_error == pytest.approx(spread) and found.tokens == 200
    assert evaluation.summarise(nats[:1], 200).standard_error is None
    assert evaluation.summarise(np.full((2, 1), 1e5), 1).perplexity == np.inf


SPEC = Codec(tuple(" abcdefghijklmnopqrstuvwxyz")).spec(4)


def test_a_text_becomes_windows_of_the_model_s_tokens(tmp_path):
    path = tmp_path / "some.txt"
    path.write_text("the cat sat")
    found = evaluation.read_text_set(SPEC, "some", path)
    assert SPEC.decode(found.tokens) == ["the ", "cat "]
    assert (found.name, found.left_over, found.changed) == ("some", 3, 0)
    path.write_text("The 3 Cats!")
    cleaned = evaluation.read_text_set(SPEC, "some", path, clean="text8")
    assert "".join(SPEC.decode(cleaned.tokens)) == "the three ca"[:12]
    dropped = evaluation.read_text_set(SPEC, "some", path, unknown="drop")
    assert SPEC.decode(dropped.tokens) == ["he  "] and dropped.changed == 4
    mapped = evaluation.read_text_set(SPEC, "some", path, unknown="x")
    assert SPEC.decode(mapped.tokens) == ["xhe ", "x xa"] and mapped.changed == 4
    raw = evaluation.read_text_set(Codec().spec(4), "some", path)
    assert Codec().spec(4).decode(raw.tokens) == ["The ", "3 Ca"]


@pytest.mark.parametrize(
    "text, options, words",
    [
        (
            "Cats.",
            {},
            "text 'some': character 'C' at position 0 .* clean='text8' or unknown='drop'",
        ),
        ("cat", {}, "text 'some' has 3 tokens, fewer than one window of 4"),
        ("cats", {"clean": "text9"}, "clean must be one of text8; got 'text9'; did you mean"),
        ("cats", {"unknown": "?"}, "unknown must be one of error, drop"),
        (b"\xff\xfe cats", {}, "is not UTF-8"),
    ],
)
def test_texts_that_do_not_fit(text, options, words, tmp_path):
    path = tmp_path / "some.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        evaluation.read_text_set(SPEC, "some", path, **options)


def test_other_errors(tmp_path):
    pixels = dataclasses.replace(SPEC, show=None)
    with pytest.raises(ValueError, match="spell no text"):
        evaluation.read_text_set(pixels, "some", tmp_path / "none.txt")
    with pytest.raises(ValueError, match="is not a file"):
        evaluation.read_text_set(SPEC, "some", tmp_path / "none.txt")
    data = {"index": np.arange(2)}
    with pytest.raises(ValueError, match="draws must be positive, got 0"):
        evaluation.estimate_bound(lambda *_: 0, None, jax.random.key(0), data, draws=0)
    with pytest.raises(ValueError, match="draws must be positive, got 0"):
        evaluation.count_bound(P, wrong, jax.random.key(0), jnp.zeros((1, L), int), draws=0)
    with pytest.raises(ValueError, match=r"where must have shape \(1, 3\), got \(3,\)"):
        evaluation.order_nats(P, wrong, jnp.zeros((1, L), int), where=np.ones(3, bool))
    with pytest.raises(ValueError, match="no likelihood bound"):
        perplexity.score_sets(type("Method", (), {"bound": None}), None, {})
