"""ReDiff: both stages of training, and drafts that the model repairs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.methods import Context
from diffusion_jax.networks import TokenTransformer
from diffusion_jax.processes import Absorbing
from diffusion_jax.samplers import confidence, sample

V, L = 7, 12
SPEC = DataSpec(kind="tokens", elements={"tokens": Element((L,), "int32")}, vocab_size=V)


WORDS = np.random.default_rng(5).integers(0, V, (12, L), np.int32)


def some_words(rng, count):
    """Sequences out of a short list: what is left of one tells the rest."""
    return WORDS[rng.integers(0, len(WORDS), count)]


def tiny(width=16, depth=1):
    return TokenTransformer(
        vocab_size=V,
        width=width,
        depth=depth,
        heads=2,
        positions="learned",
        max_length=L,
        time_conditioned=False,
    )


def batch_of(tokens):
    return {"tokens": jnp.asarray(tokens), "index": jnp.arange(len(tokens), dtype=jnp.int32)}


def build(module=None, **options):
    module = module or tiny()
    return methods.refine(Absorbing(V), module, SPEC, label_dropout=0.0, nfe=4, **options)


def test_without_replacement_the_loss_is_that_of_a_masked_model_bit_for_bit():
    plain = methods.masked(
        Absorbing(V),
        tiny(),
        SPEC,
        objective="lambda",
        objective_options={"eps": 1e-3},
        label_dropout=0.0,
    )
    same = build(replace=0.0, parts=(1.0, 0.0, 0.0), average="sum")
    batch = batch_of(some_words(np.random.default_rng(0), 8))
    key = jax.random.key(0)
    params = jax.tree.map(lambda v: v + 0.1, plain.init(key, batch))
    context = Context(batch_size=8)
    losses = [quick_jit(m.loss)(params, key, batch, context)[0] for m in (plain, same)]
    np.testing.assert_array_equal(*losses)


@pytest.mark.slow
def test_stage_2_corrects_drafts_of_the_averaged_model():
    """Its loss is that of stage 1 and the cross-entropy where a draft is wrong."""
    first, second = build(), build(stage=2, draft_steps=1, draft_rate=0.5)
    batch = batch_of(some_words(np.random.default_rng(0), 16))
    key = jax.random.key(0)
    params = first.init(key, batch)
    averaged = jax.tree.map(jnp.zeros_like, params)  # knows nothing: half of the tokens at random
    run = lambda m, ema: quick_jit(m.loss)(params, key, batch, Context(batch_size=16, ema=ema))
    one, _ = run(first, None)
    two, metrics = run(second, averaged)
    np.testing.assert_allclose(two, one + metrics["correction"], rtol=1e-5)
    assert metrics["wrong"] == pytest.approx(0.5 * (1 - 1 / V), abs=0.15)
    assert metrics["correction"] == pytest.approx(np.log(V), rel=0.01)  # the network is new


@pytest.mark.parametrize(
    "options, words",
    [
        ({"stage": 3}, "stage must be one of 1, 2; got 3"),
        ({"draft_rate": 0.0}, r"draft_rate must lie in \(0, 1\], got 0.0"),
        ({"rehearsal": -1.0}, "rehearsal must be 0 or positive, got -1.0"),
        ({"replace": -0.1}, r"replace must lie in \[0, 1\], got -0.1"),
        ({"answers_only": True}, "answers_only needs data with a 'prompt'"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        build(**options)


@pytest.mark.slow
def test_substitutions_are_repaired():
    """Trained on errors, the model finds and mends most of them, and leaves the rest alone."""
    method, rng = (
        build(tiny(32), objective="count", weighted=False, replace=0.2),
        np.random.default_rng(0),
    )
    batch = batch_of(some_words(rng, 64))
    params = method.init(jax.random.key(0), batch)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 250))

    @jax.jit
    def update(params, state, key, tokens):
        loss = lambda p: method.loss(p, key, batch_of(tokens), Context(batch_size=64))[0]
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(250):
        tokens = some_words(rng, 64)
        params, state = update(params, state, jax.random.key(step), tokens)
    clean = some_words(rng, 400)
    drafts = clean.copy()
    for row in drafts:
        places = rng.permutation(L)[:2]
        row[places] = (row[places] + rng.integers(1, V, 2)) % V
    wrong = drafts != clean
    denoise = method.denoiser(params, batch_of(drafts))
    mend = confidence(Absorbing(V), 2, temperature=0.0, revise=1.0, revise_given=True)
    mended = np.asarray(sample(mend, denoise, None, jnp.asarray(drafts)))
    assert (mended == clean)[wrong].mean() > 0.5
    assert (mended == clean)[~wrong].mean() > 0.95
    # a prompt is not a draft: without the option nothing that was given changes
    kept = confidence(Absorbing(V), 2, temperature=0.0, revise=1.0)
    np.testing.assert_array_equal(sample(kept, denoise, None, jnp.asarray(drafts)), drafts)
