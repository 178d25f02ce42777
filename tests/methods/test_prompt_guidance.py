"""`prompt_guidance` of the masked method: a batch's prompt is what guidance hides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import guidance, methods, samplers
from diffusion_jax.data.descriptions import descriptions, people_of
from diffusion_jax.networks import TokenTransformer
from diffusion_jax.processes import Absorbing

DATA = descriptions(people=4)
V = DATA.spec.vocab_size
PROCESS = Absorbing(V)
PROMPT = jnp.asarray(people_of(4)[0].queries("name_first", "description")[0])
BATCH = {"index": jnp.arange(4), "prompt": PROMPT}


def build(**options):
    module = TokenTransformer(V, width=16, depth=1, heads=1, time_conditioned=False)
    return methods.masked(PROCESS, module, DATA.spec, label_dropout=0.0, nfe=4, **options)


@pytest.fixture(scope="module")
def params():
    shapes = jax.eval_shape(build().init, jax.random.key(0), DATA.spec.zeros(2))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda v: jnp.asarray(0.3 * rng.standard_normal(v.shape), v.dtype), shapes)


def test_the_denoiser_is_the_transform_of_the_plain_one(params):
    plain = build().denoiser(params, BATCH)
    got = build(prompt_guidance=0.8).denoiser(params, BATCH)(PROMPT, 0.5)
    hidden = jnp.where(PROMPT != V, V, PROMPT)
    told, free = plain(PROMPT, 0.5), plain(hidden, 0.5)
    np.testing.assert_allclose(got, told + 0.8 * (told - free), rtol=1e-4, atol=1e-4)


def test_samples_are_those_of_the_transform(params):
    method = build(prompt_guidance=4.0)
    key = jax.random.key(3)
    drawn = method.sample(params, key, BATCH)
    denoise = guidance.guide_prompt(build().denoiser(params, BATCH), PROMPT != V, V, 4.0)
    walk_key = jax.random.split(key)[1]
    same = samplers.sample(method.default_sampler, denoise, walk_key, PROMPT)
    np.testing.assert_array_equal(drawn, same)
    np.testing.assert_array_equal(jnp.where(PROMPT != V, drawn, V), PROMPT)
    assert not np.array_equal(drawn, build().sample(params, key, BATCH))


def test_without_a_prompt_or_with_weight_zero_nothing_changes(params):
    key, free = jax.random.key(1), {"index": jnp.arange(4)}
    guided, plain = build(prompt_guidance=0.8), build()
    np.testing.assert_array_equal(guided.sample(params, key, free), plain.sample(params, key, free))
    rows = build(prompt_guidance=0.0).denoiser(params, BATCH)(PROMPT, 0.5)
    np.testing.assert_array_equal(rows, plain.denoiser(params, BATCH)(PROMPT, 0.5))


def test_a_samples_prompt_does_not_touch_its_neighbours(params):
    method, key = build(prompt_guidance=0.8), jax.random.key(2)
    alone = method.sample(params, key, {k: v[2:] for k, v in BATCH.items()})
    np.testing.assert_array_equal(method.sample(params, key, BATCH)[2:], alone)
