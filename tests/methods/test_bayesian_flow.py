"""Bayesian flows of tokens and of discretised images (continuous ones are in test_methods.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods
from diffusion_jax.data import digits, digits_tokens
from diffusion_jax.methods import Context
from diffusion_jax.networks import DiT, TokenTransformer
from diffusion_jax.processes import VP, ContinuousBFN, DiscreteBFN

PROCESS = DiscreteBFN(17, beta1=2.0)
BINNED = ContinuousBFN(1e-3)


def transformer():
    return TokenTransformer(vocab_size=17, width=16, depth=1, heads=1, num_classes=10)


def random_params(method, batch):
    leaves, tree = jax.tree.flatten(jax.eval_shape(method.init, jax.random.key(0), batch))
    rng = np.random.default_rng(0)
    return tree.unflatten(
        [jnp.asarray(0.1 * rng.standard_normal(v.shape), v.dtype) for v in leaves]
    )


@functools.cache
def case(kind):
    if kind == "tokens":
        data = digits_tokens("train")
        method = methods.bayesian_flow(PROCESS, transformer(), data.spec, nfe=4)
    else:
        data = digits("train")
        module = DiT(patch_size=4, width=16, depth=1, heads=1, num_classes=10, out_channels=2)
        method = methods.bayesian_flow(BINNED, module, data.spec, bins=17, nfe=4)
    batch = data.take(np.arange(8)) | {"index": np.arange(8, dtype=np.int32)}
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    return method, batch, random_params(method, batch)


def part(batch, *rows):
    return {k: v[jnp.array(rows)] for k, v in batch.items()}


@pytest.mark.parametrize("kind", ("tokens", "bins"))
def test_loss_bound_and_shards(kind):
    method, batch, params = case(kind)
    context = Context(batch_size=8)
    loss = quick_jit(lambda key, b: method.loss(params, key, b, context)[0])
    key = jax.random.key(1)
    halves = [loss(key, part(batch, *r)) for r in ((0, 2, 4, 6), (1, 3, 5, 7))]
    others = [loss(key, part(batch, *r)) for r in ((0, 1, 2, 3), (4, 5, 6, 7))]
    np.testing.assert_allclose(sum(halves), sum(others), rtol=1e-5)
    assert halves[0] != halves[1] and np.isfinite(halves[0])
    bound = quick_jit(lambda key: method.bound(params, key, batch))(key)
    assert bound.shape == (8,) and np.isfinite(bound).all()


def test_a_network_that_knows_nothing_costs_what_enumeration_says():
    """Uniform predictions: the walk costs beta1 (K - 1) / 2 nats a token, the last step log K."""
    method, batch, params = case("tokens")
    nothing = jax.tree.map(jnp.zeros_like, params)
    run = quick_jit(lambda key: method.loss(nothing, key, batch, Context(train=False))[0])
    values = np.array([run(jax.random.key(i)) for i in range(40)])
    # K beta1 s ((1 - 1/K)^2 + (K - 1) / K^2), and the mean of s is 1/2
    assert values.mean() == pytest.approx(2.0 * 16 / 2, abs=4 * float(values.std()) / 6)
    bound = quick_jit(lambda key: method.bound(nothing, key, batch))
    nats = np.mean([np.asarray(bound(jax.random.key(i))) for i in range(40)])
    assert nats / 64 == pytest.approx(16.0 + np.log(17), rel=0.05)


def test_tokens_are_sampled_and_chunks_do_not_matter():
    method, batch, params = case("tokens")
    free = {k: v for k, v in batch.items() if k != "tokens"}
    sample = quick_jit(method.sample)
    whole = np.asarray(sample(params, jax.random.key(5), free))
    assert whole.shape == (8, 64) and whole.dtype == np.int32
    assert whole.min() >= 0 and whole.max() < 17 and len(np.unique(whole, axis=0)) == 8
    some = np.asarray(sample(params, jax.random.key(5), part(free, 3, 6)))
    assert (some == whole[[3, 6]]).mean() > 0.98  # modes may tie in the last bit
    x, path = jax.eval_shape(
        lambda key: method.sample(
            params, key, free, method.build_sampler("bfn", 6), trajectory=True
        ),
        jax.random.key(0),
    )
    assert x.shape == (8, 64) and path.shape == (7, 8, 64) and path.dtype == np.int32


def test_the_denoiser_gives_probabilities_and_guidance_mixes_their_logarithms():
    method, batch, params = case("tokens")
    z = 3.0 * jax.random.normal(jax.random.key(0), (8, 64, 17))
    told = quick_jit(lambda b: method.denoiser(params, b)(z, 0.4))(batch)
    assert told.shape == z.shape and (told >= 0).all()
    np.testing.assert_allclose(told.sum(-1), 1.0, atol=1e-5)
    apply = quick_jit(transformer().apply)
    logits = apply({"params": params}, jax.nn.softmax(z), jnp.full(8, 0.4), label=batch["label"])
    np.testing.assert_allclose(told, jax.nn.softmax(logits), rtol=1e-4, atol=1e-6)
    unlabelled = {**batch, "label": jnp.full(8, 10)}
    untold = quick_jit(lambda b: method.denoiser(params, b)(z, 0.4))(unlabelled)
    spec = digits_tokens("train").spec
    guided = methods.bayesian_flow(PROCESS, transformer(), spec, guidance=2.0, nfe=4)
    got = quick_jit(lambda b: guided.denoiser(params, b)(z, 0.4))(batch)
    expected = told**2 / untold
    np.testing.assert_allclose(
        got, expected / expected.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6
    )


@pytest.mark.slow
def test_discretised_images_are_judged_on_bin_centres_and_shown_on_the_grey_levels():
    method, batch, params = case("bins")
    levels = np.arange(17) / 8 - 1.0
    inside = (16 / 17) * levels
    np.testing.assert_allclose(inside, (2 * np.arange(17) + 1) / 17 - 1, atol=1e-12)
    x = method.denoiser(params, batch)(jnp.asarray(inside[-1] * np.ones((8, 8, 8, 1))), 0.0)
    assert np.abs(x).max() <= 16 / 17 + 1e-6
    free = {k: v for k, v in batch.items() if k != "image"}
    drawn = np.asarray(quick_jit(method.sample)(params, jax.random.key(0), free))
    assert drawn.shape == (8, 8, 8, 1) and np.abs(drawn).max() <= 1.0 + 1e-5


def test_what_does_not_fit_is_refused():
    tokens, images = digits_tokens("train").spec, digits("train").spec
    flow, module = methods.bayesian_flow, transformer()
    for build, message in (
        (lambda: flow(VP(), module, tokens), "tokens needs a DiscreteBFN process, got VP"),
        (lambda: flow(PROCESS, module, images), "image needs a ContinuousBFN process, got Disc"),
        (lambda: flow(DiscreteBFN(5), module, tokens), "vocab_size 5, the data has 17"),
        (lambda: flow(PROCESS, module, tokens, bins=4), "bins must be an int of at least 2"),
        (lambda: flow(BINNED, module, images, bins=1), "for images; got 1"),
        (lambda: flow(BINNED, module, images, sampler="bfn"), "not for a gaussian process"),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_density_of_continuous_data_has_no_bound():
    data = digits("train").spec
    assert methods.bayesian_flow(BINNED, DiT(patch_size=4), data).bound is None
    assert case("bins")[0].bound is not None and case("tokens")[0].bound is not None
