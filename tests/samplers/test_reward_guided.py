"""Reward-guided ancestral sampling: what it is without a reward's say, what it does with it, what it costs."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.processes import Absorbing, Uniform
from diffusion_jax.samplers import masked_ancestral, reward_calls, reward_guided, sample

V, L = 5, 6
CALLS = collections.Counter()


def bent(tokens, t):
    near = jax.nn.one_hot(jnp.roll(tokens, 1, axis=1), V)
    return 1.5 * near + 0.3 * jnp.arange(V)


def weights_of(x):
    return x if jnp.issubdtype(x.dtype, jnp.floating) else jax.nn.one_hot(x, V + 1)


def likes_zeros(x, t):
    """Every masked position likes it that the others show the token 0; `t [B]`."""
    jax.debug.callback(lambda: CALLS.update(reward=1))
    share = weights_of(x)[..., 0].mean(axis=1, keepdims=True)
    return 40.0 * share * jnp.ones(x.shape[:2]) + 0.0 * t[:, None]


@pytest.mark.parametrize("steps", (1, 5))
def test_without_strength_and_choice_it_is_the_ancestral_sampler_bit_for_bit(steps):
    process, key = Absorbing(V), jax.random.key(0)
    plain = masked_ancestral(process, steps, length=L, temperature=0.7)
    free = {"reward": likes_zeros, "strength": 0.0, "candidates": 1}
    ours = reward_guided(process, steps, length=L, temperature=0.7, **free)
    np.testing.assert_array_equal(sample(ours, bent, key, 64), sample(plain, bent, key, 64))
    assert reward_calls(ours) == (0, 0)


@pytest.mark.parametrize("options", ({"strength": 4.0, "candidates": 1}, {"strength": 0.0}))
def test_the_reward_is_raised_by_slopes_and_by_choice(options):
    process, key = Absorbing(V), jax.random.key(1)
    plain = sample(masked_ancestral(process, 6, length=L), bent, key, 400)
    switch = 1.0 if options["strength"] else 0.0
    sampler = reward_guided(process, 6, reward=likes_zeros, length=L, switch=switch, **options)
    ours = sample(sampler, bent, key, 400)
    share = [np.mean(np.asarray(x) == 0) for x in (plain, ours)]
    assert share[1] > share[0] + 0.02 and ours.min() >= 0 and ours.max() < V


def test_the_slope_is_that_of_the_expected_next_state():
    """Of a reward linear in the state it can be written down."""
    process = Absorbing(V)
    values = np.arange(V + 1) * 0.1

    def linear(x, t):
        return weights_of(x) @ jnp.asarray(values)

    sampler = reward_guided(process, 4, reward=linear, length=L, strength=1.0, limit=10.0)
    tokens = jnp.array([[V, 1, V, 2, V, V], [V, V, 3, 3, 3, 0]])
    state = sampler.init(lambda: jax.random.split(jax.random.key(0), 2), sampler.start, tokens)
    inputs = jax.tree.map(lambda v: jnp.asarray(v)[1], sampler.xs)
    logits = bent(tokens, 0.5)
    masked = tokens == V
    got = sampler.step._slope(state, logits, masked, inputs)
    p = np.asarray(jax.nn.softmax(logits))
    expected = (1 / 3) * p * values[:V] / np.asarray(masked).sum(1)[:, None, None]
    np.testing.assert_allclose(got, expected * np.asarray(masked)[..., None], rtol=1e-5)


def test_calls_of_the_reward_are_counted():
    sampler = reward_guided(
        Absorbing(V), 4, reward=likes_zeros, length=L, strength=(1.0, 2.0), candidates=3
    )
    assert sampler.nfe == 4 and reward_calls(sampler) == (2, 6)
    np.testing.assert_allclose(sampler.xs["strength"], [1.0, 2.0, 0, 0])
    before = CALLS["reward"]
    sample(sampler, bent, jax.random.key(0), 2).block_until_ready()
    jax.effects_barrier()
    assert CALLS["reward"] - before == 2 + 6
    with pytest.raises(ValueError, match="'masked_ancestral' has no reward"):
        reward_calls(masked_ancestral(Absorbing(V), 2))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"reward": 3}, "reward must be callable"),
        ({"candidates": 0}, "candidates must be an int of at least 1, got 0"),
        ({"switch": 1.5}, r"switch must lie in \[0, 1\], got 1.5"),
        ({"strength": -1.0}, "strength must not be negative"),
        ({"process": Uniform(V)}, "needs an Absorbing process"),
    ],
)
def test_what_does_not_fit(options, words):
    given = {"process": Absorbing(V), "num_steps": 4, "reward": likes_zeros, **options}
    with pytest.raises(ValueError, match=words):
        reward_guided(**given)
