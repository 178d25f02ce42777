"""Decoding from left to right: exact laws on the joint table, prompts, windows, calls that are not made."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from token_laws import CLEAN, MASKED, L, Lookup, P, V, counts_of, network, standard_scores

from diffusion_jax.processes import Absorbing, Uniform
from diffusion_jax.samplers import (
    block_decoding,
    build_sampler,
    confidence,
    left_to_right,
    sample,
    semi_autoregressive,
)

PROCESS = Absorbing(V)


def block_law(name, size):
    """The law of revealing one position of the first unfinished block at a time, in random order."""
    probs, law = network(name), MASKED.all(axis=1).astype(float)
    powers = (V + 1) ** np.arange(L)[::-1]
    for _ in range(L):
        following = np.zeros_like(law)
        for state in np.flatnonzero(law):
            hidden = np.flatnonzero(MASKED[state])
            hidden = hidden[hidden // size == hidden[0] // size]
            for i in hidden:
                rows = state + (np.arange(V) - V) * powers[i]
                following[rows] += law[state] * probs[state, i] / len(hidden)
        law = following
    assert law[~CLEAN].sum() == 0
    return law[CLEAN]


def test_left_to_right_has_the_law_of_the_chain_rule():
    counts = counts_of(left_to_right(PROCESS, L), "model", 1)
    assert abs(standard_scores(counts, golden("discrete_orders")["model_order_left"])) < 5
    assert standard_scores(counts, P) > 20


@pytest.mark.parametrize("size", [2, 3])
def test_blocks_one_position_a_call(size):
    sampler = block_decoding(PROCESS, length=L, block_size=size)
    assert sampler.nfe == L
    law = block_law("model", size)
    assert abs(standard_scores(counts_of(sampler, "model", size), law)) < 5
    assert standard_scores(counts_of(sampler, "model", size), block_law("model", 5)) > 20
    np.testing.assert_allclose(block_law("oracle", size), P.ravel(), atol=1e-12)


def test_the_chain_rule_is_blocks_of_one():
    np.testing.assert_allclose(
        block_law("model", 1), golden("discrete_orders")["model_order_left"], atol=1e-12
    )


def draw(sampler, x=300, seed=0, denoise=None):
    return np.asarray(sample(sampler, denoise or Lookup("model"), jax.random.key(seed), x))


@pytest.mark.parametrize("order", ["random", "confidence", "margin", "entropy", "sampled", "left"])
@pytest.mark.parametrize("steps", [2, L])
def test_one_block_is_plain_decoding(order, steps):
    """Bit for bit that of `confidence` on the whole sequence."""
    block = block_decoding(PROCESS, steps, length=L, block_size=L, order=order)
    plain = confidence(PROCESS, steps, length=L, order=order)
    np.testing.assert_array_equal(draw(block), draw(plain))


@pytest.mark.parametrize("n", [2, 8])
def test_one_block_of_ancestral_steps_is_ancestral_sampling(n):
    sampler = block_decoding(PROCESS, n, length=L, block_size=L, order="ancestral")
    assert sampler.nfe == n
    law = golden("discrete_sampler_law")["oracle_ancestral_linear"][(1, 2, 8).index(n)]
    assert abs(standard_scores(counts_of(sampler, "oracle", n), law)) < 5


def test_one_window_is_one_block():
    for order in ("ancestral", "confidence"):
        window = semi_autoregressive(PROCESS, 4, length=L, window=L, order=order)
        block = block_decoding(PROCESS, 4, length=L, block_size=L, order=order)
        np.testing.assert_array_equal(draw(window), draw(block))


def test_windows_move_on_by_the_stride():
    """The network sees a window at a time: it names a position by its place, and reads the first one."""
    seen = []

    def network(x, t):
        jax.debug.callback(lambda v: seen.append(np.array(v[0])), x)
        place = jnp.broadcast_to(jnp.arange(4), x.shape)
        first = jnp.where(x[:, :1] == 9, 0, x[:, :1])
        return 50.0 * jax.nn.one_hot((place + first) % 9, 9)

    sampler = semi_autoregressive(
        Absorbing(9), 9, length=8, window=4, stride=2, order="left", temperature=0.0
    )
    assert sampler.nfe == 2 * 2 + 3 and not sampler.stochastic
    tokens = sample(sampler, network, None, 2)
    jax.effects_barrier()
    # 0 1 2 3, then 2 + (2, 3), then 4 + (2, 3)
    np.testing.assert_array_equal(tokens, [[0, 1, 2, 3, 4, 5, 6, 7]] * 2)
    np.testing.assert_array_equal(seen[3], [2, 3, 9, 9])
    assert all(window.shape == (4,) for window in seen)


def test_more_text_than_the_model_is_long():
    """A window of the table: what is new follows the conditional of the last five tokens."""
    sampler = semi_autoregressive(PROCESS, length=L + 2, window=L, stride=1, order="random")
    prompt = np.tile([1, 0, 2, 3, 1], (20_000, 1)).astype(np.int32)
    tokens = draw(sampler, prompt, denoise=Lookup("oracle"))
    np.testing.assert_array_equal(tokens[:, :L], prompt)
    given = P[0, 2, 3, 1] / P[0, 2, 3, 1].sum()
    counts = np.bincount(tokens[:, L], minlength=V)
    assert abs(standard_scores(counts, given)) < 5
    second = tokens[tokens[:, L] == 2][:, L + 1]
    law = P[2, 3, 1, 2] / P[2, 3, 1, 2].sum()
    assert abs(standard_scores(np.bincount(second, minlength=V), law)) < 5


def test_a_prompt_of_any_length_stays_and_costs_no_call():
    calls = []

    def denoise(x, t):
        calls.append(np.array(x))
        return Lookup("model")(x, t)

    prompt = np.array([[1, 2, 0], [3, 0, 0]], np.int32)
    sampler = block_decoding(PROCESS, length=L, block_size=2)
    with jax.disable_jit():
        tokens = np.asarray(sample(sampler, denoise, jax.random.key(0), prompt))
    np.testing.assert_array_equal(tokens[:, :3], prompt)
    assert tokens.max() < V
    # the block 0, 1 is given; of 2, 3 one is open, which one of two steps reveals
    assert len(calls) == 2 and sampler.nfe == 5
    np.testing.assert_array_equal(calls[0], [[1, 2, 0, V, V], [3, 0, 0, V, V]])
    holes = np.array([[V, 1, V, 2, V]], np.int32)
    assert (draw(sampler, holes)[:, [1, 3]] == [1, 2]).all()


def test_steps_are_shared_by_the_blocks():
    def sizes(num_steps, **options):
        sampler = block_decoding(PROCESS, num_steps, length=10, block_size=4, **options)
        return np.bincount(sampler.xs["point"]["begin"])[[0, 4, 8]].tolist(), sampler.nfe

    assert sizes(None) == ([4, 4, 2], 10)
    assert sizes(3) == ([1, 1, 1], 3) == sizes(5)
    assert sizes(9) == ([3, 3, 2], 8)
    assert sizes(300) == ([4, 4, 2], 10)
    assert sizes(30, order="ancestral") == ([10, 10, 10], 30)
    assert build_sampler(PROCESS, "block_decoding", 8, length=10, block_size=4).nfe == 8


def test_errors():
    def fails(match, build, *args, **options):
        with pytest.raises(ValueError, match=match):
            build(PROCESS, *args, **options)

    fails("left_to_right needs the sequence length", left_to_right, None)
    fails("block_size must be a positive int, got None", block_decoding, length=4)
    fails("block_size must be a positive int, got 0", block_decoding, length=4, block_size=0)
    fails("num_steps = 1 is too few: 2 blocks", block_decoding, 1, length=4, block_size=2)
    fails(
        "order must be one of .*; got 'lest'; did you mean 'left'",
        block_decoding,
        length=4,
        block_size=2,
        order="lest",
    )
    fails("multiple of stride = 2", semi_autoregressive, length=7, window=4, stride=2)
    fails("at most the window", semi_autoregressive, length=8, window=4, stride=5)
    fails("window must be a positive int, got None", semi_autoregressive, length=8)
    fails("temperature must be 0 or positive", left_to_right, 4, temperature=-1.0)
    with pytest.raises(ValueError, match="needs an Absorbing process, got Uniform"):
        left_to_right(Uniform(V), 4)
    with pytest.raises(ValueError, match="a prompt of 6 tokens is longer than the length 5"):
        draw(left_to_right(PROCESS, 5), np.zeros((1, 6), np.int32))
    with pytest.raises(ValueError, match="logits of shape"):
        draw(left_to_right(PROCESS, 5), denoise=lambda x, t: jnp.zeros((*x.shape, V + 1)))
