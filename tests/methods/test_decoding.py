"""Autoregressive, block and DiDA models: what they see, with a cache and without, and what they refuse."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods
from diffusion_jax.data.source import Element
from diffusion_jax.data.text import text_spec
from diffusion_jax.methods import Context
from diffusion_jax.methods.decoding import Decoder
from diffusion_jax.networks import TokenTransformer
from diffusion_jax.processes import Absorbing, LinearSchedule, Uniform
from diffusion_jax.samplers import masked_ancestral, sample

V, L = 5, 7
SPEC = text_spec(L, tuple("abcde"))
LABELLED = dataclasses.replace(
    SPEC, elements={**SPEC.elements, "label": Element((), "int32")}, num_classes=4
)
RNG = np.random.default_rng(0)
TOKENS = jnp.asarray(RNG.integers(0, V, (3, L)), jnp.int32)
BATCH = {"tokens": TOKENS, "index": jnp.arange(3)}
# method, attention, block size
KINDS = (
    ("autoregressive", "causal", None),
    ("block_diffusion", "block", 3),
    ("dida", "causal", 3),
)
every_kind = pytest.mark.parametrize("name, attention, size", KINDS)


@pytest.fixture(autouse=True)
def quick_to_compile():
    """What runs a few times need not be fast."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def build(name, attention, size, spec=SPEC, process=None, classes=None, **options):
    net = TokenTransformer(
        vocab_size=V,
        width=16,
        depth=2,
        heads=2,
        time_conditioned=False,
        attention=attention,
        block_size=size,
        num_classes=classes,
    )
    method = getattr(methods, name)(process or Absorbing(V), net, spec, **options)
    batch = BATCH | ({"label": jnp.array([0, 1, 2])} if classes else {})
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch)
    rng = np.random.default_rng(1)
    draw = lambda v: jnp.asarray(0.4 * rng.standard_normal(v.shape), v.dtype)
    return method, jax.tree.map(draw, shapes)


@pytest.mark.parametrize("name, attention, size", (*KINDS, ("block_diffusion", "block", L)))
def test_logits_with_a_cache_are_those_without(name, attention, size):
    """Of every block, in its first call and in later ones, after decoding and after reading a prompt."""
    method, params = build(name, attention, size)
    denoise, size = method.denoiser(params, BATCH), size or 1
    full, step = quick_jit(lambda x: denoise(x, None)), quick_jit(denoise.at)
    start = quick_jit(denoise.start)
    cache, prompt = start(jnp.full_like(TOKENS, V)), start(TOKENS)
    half = np.where(RNG.random(TOKENS.shape) < 0.5, V, TOKENS)
    for begin in range(0, L, size):
        end = min(begin + size, L)
        x = np.where(np.arange(L) < begin, TOKENS, np.where(np.arange(L) < end, half, V))
        expected = np.asarray(full(x))[:, begin:end]
        for first in (True, False):
            point = {"begin": jnp.int32(begin), "first": jnp.asarray(first), "t": 0.0}
            logits, cache = step(x, point, cache)
            assert logits.shape == (3, size, V)
            np.testing.assert_allclose(logits[:, begin - end :], expected, rtol=0, atol=1e-5)
            logits, _ = step(x, point, prompt)
            np.testing.assert_allclose(logits[:, begin - end :], expected, rtol=0, atol=1e-5)
    # the cache matters: reading nothing gives other logits
    if size < L:
        empty = jax.tree.map(jnp.zeros_like, cache)
        assert np.abs(step(x, point, empty)[0] - logits).max() > 1e-3


@pytest.mark.parametrize(
    "name, attention, size, prompt", [(*kind, n) for kind, n in zip(KINDS, (0, 4, 4))]
)
def test_samples_with_a_cache_are_those_without(name, attention, size, prompt):
    method, params = build(name, attention, size)
    batch = BATCH | ({"prompt": TOKENS[:, :prompt]} if prompt else {})
    key, sampler = jax.random.key(3), method.default_sampler
    drawn = method.sample(params, key, batch)
    denoise = method.denoiser(params, BATCH)
    x = TOKENS[:, :prompt] if prompt else 3
    slow = sample(sampler, lambda x, t: denoise(x, t), jax.random.split(key)[1], x)
    np.testing.assert_array_equal(drawn, slow)
    np.testing.assert_array_equal(drawn[:, :prompt], TOKENS[:, :prompt])
    assert drawn.shape == (3, L) and drawn.max() < V and sampler.nfe == L


def test_later_blocks_change_nothing_before():
    method, params = build("block_diffusion", "block", 3)
    denoise = quick_jit(lambda x: method.denoiser(params, BATCH)(x, None))
    before = denoise(TOKENS)
    for i in range(L):
        after = denoise(TOKENS.at[:, i].set((TOKENS[:, i] + 1) % V))
        begin = i // 3 * 3
        np.testing.assert_array_equal(after[:, :begin], before[:, :begin])
        assert np.abs(after - before)[:, begin:].max() > 1e-3


def test_blocks_of_one_are_autoregressive():
    """The bound of a block model is the chain rule of its own conditionals, without any draw."""
    method, params = build("block_diffusion", "block", 1)
    denoise = quick_jit(lambda x: jax.nn.log_softmax(method.denoiser(params, BATCH)(x, None)))
    expected = np.zeros(3)
    for i in range(L):
        log_probs = denoise(jnp.where(jnp.arange(L) < i, TOKENS, V))[:, i]
        expected -= np.take_along_axis(np.asarray(log_probs), np.asarray(TOKENS[:, i : i + 1]), 1)[
            :, 0
        ]
    bound = quick_jit(lambda key: method.bound(params, key, BATCH))
    for seed in (0, 1):
        got = bound(jax.random.key(seed))
        np.testing.assert_allclose(got, expected, rtol=2e-5)


def test_one_block_is_the_masked_model_of_full_attention():
    method, params = build("block_diffusion", "block", L)
    full = TokenTransformer(vocab_size=V, width=16, depth=2, heads=2, time_conditioned=False)
    plain = methods.masked(Absorbing(V), full, SPEC)
    x = jnp.where(TOKENS % 2 == 0, V, TOKENS)
    np.testing.assert_allclose(
        method.denoiser(params, BATCH)(x, None),
        plain.denoiser(params, BATCH)(x, 0.5),
        rtol=1e-5,
        atol=1e-6,
    )


def test_dida_keeps_the_autoregressive_model():
    """Its loss is the bound of its segments and the likelihood of the same parameters, read causally."""
    adapted, params = build("dida", "causal", 3, next_token=0.5)
    causal, same = build("autoregressive", "causal", None)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same)
    key = jax.random.key(0)
    plain, _ = build("dida", "causal", 3, next_token=0.0)
    likelihood, (loss, metrics), (without, _) = quick_jit(
        lambda: (
            causal.bound(params, key, BATCH),
            adapted.loss(params, key, BATCH, Context()),
            plain.loss(params, key, BATCH, Context()),
        )
    )()
    np.testing.assert_allclose(metrics["next_token"], likelihood.mean() / L, rtol=1e-5)
    np.testing.assert_allclose(loss, without + 0.5 * likelihood.mean() / L, rtol=1e-5)


def test_more_steps_than_tokens_are_not_made_and_fewer_are():
    method, params = build("dida", "causal", 3)
    assert method.build_sampler("block_decoding", 3).nfe == 3
    few = method.sample(params, jax.random.key(0), BATCH, method.build_sampler("block_decoding", 3))
    assert few.shape == (3, L) and few.max() < V


def test_a_cached_walk_makes_a_call_a_token_and_none_for_a_prompt():
    method, params = build("block_diffusion", "block", 3)
    denoise, widths = method.denoiser(params, BATCH), []

    class Counted(Decoder):
        def _read(self, cache, tokens, begin, limit):
            width = tokens.shape[1]
            jax.debug.callback(lambda: widths.append(width))  # where the call is made
            return super()._read(cache, tokens, begin, limit)

    counted = Counted(*(getattr(denoise, f) for f in Decoder.__dataclass_fields__))
    sampler = method.default_sampler

    def calls(x):
        widths.clear()
        sample(sampler, counted, jax.random.key(0), x, cache=counted.start(x))
        jax.effects_barrier()
        return collections.Counter(widths)

    # the first call of a block reads the one before it too; the last block has one token
    assert calls(sampler.prepare(1)) == {3: 5, 6: 2}
    # the prompt, two tokens of the second block, the last one
    assert calls(sampler.prepare(TOKENS[:1, :4])) == {L: 1, 6: 2, 3: 1}


@pytest.mark.parametrize("name, attention, size", KINDS[1:2])
def test_guidance_mixes_log_probabilities(name, attention, size):
    guided, params = build(name, attention, size, LABELLED, classes=4, guidance=3.0)
    plain, _ = build(name, attention, size, LABELLED, classes=4)
    batch = BATCH | {"label": jnp.array([0, 1, 2])}
    null = batch | {"label": jnp.full(3, 4)}
    x = jnp.where(jnp.arange(L) < 3, TOKENS, V)
    run = quick_jit(lambda method_batch: plain.denoiser(params, method_batch)(x, None))
    given, free = (jax.nn.log_softmax(run(b), axis=-1) for b in (batch, null))
    expected = free + 3.0 * (given - free)
    got = quick_jit(lambda: guided.denoiser(params, batch)(x, None))()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert jax.eval_shape(guided.sample, params, jax.random.key(0), batch).shape == (3, L)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: build("autoregressive", "block", 3),
            "needs a network with attention='causal', got",
        ),
        (
            lambda: build("block_diffusion", "causal", 3),
            "needs a network with attention='block', got",
        ),
        (lambda: build("dida", "causal", None), "DiDA needs a network with a block_size"),
        (
            lambda: build("block_diffusion", "block", 3, block_size=4),
            "of block_size 4 has a network of block_size 3",
        ),
        (
            lambda: build("autoregressive", "causal", None, process=Uniform(V)),
            "an autoregressive model needs an Absorbing process, got Uniform",
        ),
        (
            lambda: build("dida", "causal", 3, process=Absorbing(V + 1)),
            "the process has vocab_size 6, the data has 5",
        ),
        (
            lambda: build("dida", "causal", 3, process=Absorbing(V, LinearSchedule(0.0, 0.1))),
            "masks only 0.9 of the tokens at t = 1",
        ),
        (lambda: build("dida", "causal", 3, next_token=-1.0), "next_token must be 0 or positive"),
        (
            lambda: build("block_diffusion", "block", 3, objective="kount"),
            "objective must be one of continuous, count; got 'kount'",
        ),
        (
            lambda: build("autoregressive", "causal", None, answers_only=True),
            "answers_only needs data with a 'prompt'",
        ),
        (
            lambda: build("autoregressive", "causal", None)[0].build_sampler("first_hitting"),
            "sampler of this model must be one of left_to_right; got 'first_hitting'",
        ),
        (
            lambda: build("dida", "causal", 3)[0].build_sampler("block_decoding", block_size=2),
            "the model has block_size = 3, the sampler was asked for 2",
        ),
    ],
)
def test_parts_that_do_not_fit(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@every_kind
def test_texts_longer_than_the_data(name, attention, size):
    """As long as the network has positions: any number of blocks, whole or not."""
    method, params = build(name, attention, size)
    chosen = method.default_sampler.name

    def shape(length):
        sampler = method.build_sampler(chosen, length=length)
        assert sampler.nfe == length
        draw = lambda key: method.sample(params, key, BATCH, sampler)
        return jax.eval_shape(draw, jax.random.key(0)).shape

    assert shape(11) == (3, 11)
    with pytest.raises(ValueError, match="sequence length 1030 exceeds max_length = 1024"):
        shape(1030)


def test_samples_that_cannot_be():
    method, params = build("autoregressive", "causal", None)
    long = BATCH | {"prompt": jnp.zeros((3, L + 1), jnp.int32)}
    with pytest.raises(ValueError, match="a prompt of 8 tokens is longer than the length 7"):
        method.sample(params, jax.random.key(0), long)
    with pytest.raises(ValueError, match="'masked_ancestral' does not decode from left to right"):
        sampler = masked_ancestral(Absorbing(V), 4, length=L)
        method.sample(params, jax.random.key(0), BATCH, sampler)
