"""Parallel first-hitting and its second order, against exact enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from token_laws import (
    CLEAN,
    STATES,
    Lookup,
    P,
    V,
    conditionals,
    crooked,
    distance,
    draws,
    index_of,
    standard_scores,
)

from diffusion_jax.processes import Absorbing, CosineSchedule
from diffusion_jax.samplers import CountedCalls, build_sampler, first_hitting, sample

L = 5
X = STATES[CLEAN]


def parallel_law(network, sizes, weights=None, floor=0.1):
    """Exact law of revealing groups of these sizes in a random order, `[V^L]`; second derivation of (3).

    `weights[k]` is w_k, None for the plain law.
    """
    weights = np.zeros(len(sizes)) if weights is None else weights
    cuts = np.cumsum((0, *sizes))
    groupings = {
        tuple(tuple(sorted(order[a:b])) for a, b in itertools.pairwise(cuts))
        for order in itertools.permutations(range(L))
    }
    total = np.zeros(len(X))
    for groups in groupings:
        law, state, before = np.ones(len(X)), np.full_like(X, V), None
        for w, group in zip(weights, groups):
            here = index_of(state)
            for i in group:
                probs = network[here, i]
                if w:
                    probs = np.maximum(probs + w * (probs - network[before, i]), floor * probs)
                    probs = probs / probs.sum(axis=1, keepdims=True)
                law = law * probs[np.arange(len(X)), X[:, i]]
            before, state = here, np.where(np.isin(np.arange(L), group), X, state)
        total += law
    return total / len(groupings)


def compensating(sizes):
    """w_k from the pairs: those of one call are made up for in the next, the last's in the last."""
    pairs = [m * (m - 1) / 2 for m in sizes]
    owed = [0.0, *pairs[:-1]]
    owed[-1] += pairs[-1] if len(sizes) > 1 else 0.0
    return [0.0] + [owed[k] / (sizes[k - 1] * sizes[k]) for k in range(1, len(sizes))]


def divergence(law):
    return (P.ravel() * np.log(P.ravel() / law)).sum()


PARALLEL = ("2s", "last_big", "first_big", "all")


@pytest.mark.parametrize("name", PARALLEL)
def test_drawn_law_of_parallel_decoding(name):
    """Against the stored law of these sizes, and not that of others."""
    stored = golden("discrete_sampler_law")
    sizes, law = stored[f"oracle_parallel_{name}_sizes"], stored[f"oracle_parallel_{name}"]
    assert distance(law, P) == pytest.approx(stored[f"oracle_parallel_{name}_tv"], abs=1e-12)
    np.testing.assert_allclose(parallel_law(conditionals(), sizes), law, rtol=0, atol=1e-12)
    sampler = first_hitting(Absorbing(V), L, sizes=sizes)
    assert sampler.nfe == len(sizes)
    counts = draws(sampler, conditionals(), seed=3)
    assert abs(standard_scores(counts, law)) < 5
    assert standard_scores(counts, P) > 20


def test_even_sizes_are_the_default():
    stored = golden("discrete_sampler_law")
    law = stored["oracle_parallel_2s"]  # 2, 2, 1
    counts = draws(first_hitting(Absorbing(V), L, 3), conditionals(), seed=4)
    assert abs(standard_scores(counts, law)) < 5
    one = draws(first_hitting(Absorbing(V), L, 1), conditionals(), seed=4)
    assert abs(standard_scores(one, stored["oracle_parallel_all"])) < 5


@pytest.mark.parametrize("sizes", ((2, 2, 1), (3, 2), (2, 1, 1, 1), (1, 1, 3), (1, 1, 1, 2)))
def test_second_order_is_nearer_to_the_exact_law(sizes):
    """Enumerated, both divergences, every split: the same calls, at least a third off the distance."""
    plain = parallel_law(conditionals(), sizes)
    bent = parallel_law(conditionals(), sizes, compensating(sizes))
    assert bent.sum() == pytest.approx(1.0, abs=1e-9)
    assert distance(bent, P) < 0.67 * distance(plain, P)
    assert divergence(bent) < 0.6 * divergence(plain)
    if sizes == (2, 2, 1):
        assert distance(plain, P) == pytest.approx(0.1107, abs=1e-4)
        assert distance(bent, P) == pytest.approx(0.0507, abs=1e-4)
        assert divergence(plain) == pytest.approx(0.0457, abs=1e-4)
        assert divergence(bent) == pytest.approx(0.0151, abs=2e-4)


def test_second_order_matches_the_pairs_of_weak_dependence():
    """The derivation: as dependence shrinks by 2, the plain error does so, that of second order by 4."""
    rng, found = np.random.default_rng(0), {"plain": [], "bent": []}
    coupling = rng.normal(size=(L, L, V, V))
    for strength in (0.1, 0.05):
        energy = sum(
            strength * coupling[i, j][X[:, i], X[:, j]] for i in range(L) for j in range(i)
        )
        probs = (np.exp(energy) / np.exp(energy).sum()).reshape((V,) * L)
        sums = probs
        for axis in range(L):
            sums = np.concatenate([sums, sums.sum(axis=axis, keepdims=True)], axis=axis)
        network = np.empty((len(STATES), L, V))
        for i in range(L):
            joint = np.moveaxis(sums, i, -1)[..., :V][tuple(np.delete(STATES, i, axis=1).T)]
            network[:, i] = joint / joint.sum(axis=-1, keepdims=True)
        for name, weights in (("plain", None), ("bent", compensating((2, 2, 1)))):
            found[name].append(distance(parallel_law(network, (2, 2, 1), weights), probs))
    assert found["plain"][0] / found["plain"][1] == pytest.approx(2.0, abs=0.25)
    assert found["bent"][0] / found["bent"][1] > 3.2
    assert found["bent"][1] < 0.15 * found["plain"][1]


@pytest.mark.parametrize("network", ("oracle", "crooked"))
@pytest.mark.parametrize("sizes", ((2, 2, 1), (1, 1, 3)))
def test_drawn_law_of_second_order(network, sizes):
    table = conditionals() if network == "oracle" else crooked()
    law = parallel_law(table, sizes, compensating(sizes))
    counts = draws(first_hitting(Absorbing(V), L, sizes=sizes, order=2), table, seed=8)
    assert abs(standard_scores(counts, law)) < 5
    assert standard_scores(counts, parallel_law(table, sizes)) > 10


def test_second_order_with_a_call_a_token_is_the_exact_sampler():
    process, key, table = Absorbing(V), jax.random.key(2), Lookup(crooked())
    exact = sample(first_hitting(process, L), table, key, 500)
    np.testing.assert_array_equal(
        sample(first_hitting(process, L, order=2), table, key, 500), exact
    )
    prompt = np.tile([V, 1, V, 3, V], (500, 1))  # 3 masks in 3 calls
    exact = sample(first_hitting(process, L), table, key, prompt)
    np.testing.assert_array_equal(
        sample(first_hitting(process, L, 3, order=2), table, key, prompt), exact
    )


def test_a_prompt_spreads_its_masks_over_the_calls():
    """3 masks in 2 calls are 2 and 1, whatever the length; the others of the batch have their own."""
    prompt = np.array([[V, 1, V, 3, V], [V] * L, [0, 1, 2, 3, V], [0, 1, 2, 3, 0]])
    _, path = sample(
        first_hitting(Absorbing(V), L, 2),
        Lookup(conditionals()),
        jax.random.key(0),
        prompt,
        trajectory=True,
    )
    left = (np.asarray(path) == V).sum(axis=2)
    np.testing.assert_array_equal(left, [[3, 5, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0]])
    given = prompt < V
    assert (np.asarray(path)[:, given] == prompt[given]).all()


def test_calls_are_those_that_some_sequence_needs():
    prompt = np.array([[V, 1, V, 3, V], [0, 1, V, 3, V]])
    for sampler, expected in (
        (first_hitting(Absorbing(V), L), 3),
        (first_hitting(Absorbing(V), L, 2), 2),
        (first_hitting(Absorbing(V), L, sizes=(1, 1, 3)), 3),
    ):
        counted = CountedCalls(Lookup(conditionals()))
        sample(sampler, counted, jax.random.key(0), prompt)
        assert counted.calls == expected
    counted = CountedCalls(Lookup(conditionals()))
    sample(first_hitting(Absorbing(V), L), counted, jax.random.key(0), np.zeros((2, L), int))
    assert counted.calls == 0


def test_every_order_of_reveals_is_equally_likely():
    """Over the 3! orders of three masks among five positions, on any schedule."""
    prompt = np.tile([V, 1, V, 3, V], (6000, 1))
    _, path = sample(
        first_hitting(Absorbing(V, CosineSchedule()), L),
        lambda x, t: jnp.zeros((*x.shape, V)),
        jax.random.key(0),
        prompt,
        trajectory=True,
    )
    when = (np.asarray(path) == V).sum(axis=0)[:, [0, 2, 4]]
    counts = np.unique(when @ [100, 10, 1], return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000.0) ** 2 / 1000.0).sum() < 20.5  # 0.1 % of chi-square with 5 degrees


def test_asked_for_by_calls():
    sampler = build_sampler(Absorbing(V), "first_hitting", 3, length=L)
    assert sampler.nfe == 3 and len(sampler.times) == 3
    assert build_sampler(Absorbing(V), "first_hitting", length=L).nfe == L


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"num_steps": 6}, "5 positions are revealed in at most 5 calls, not 6"),
        ({"num_steps": 0}, "num_steps must be a positive int, got 0"),
        ({"num_steps": 2.5}, "num_steps must be a positive int, got 2.5"),
        ({"order": 3}, "order must be one of 1, 2; got 3"),
        ({"sizes": (2, 2)}, r"sizes \[2, 2\] do not reveal 5 positions"),
        ({"sizes": (2, 3), "num_steps": 3}, r"sizes \[2, 3\] do not reveal 5 positions in 3 calls"),
        ({"sizes": (5, 0)}, r"sizes must be positive ints, got \[5, 0\]"),
    ),
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        first_hitting(Absorbing(V), L, **options)


def test_temperature_zero_follows_the_most_probable_token():
    """Every token is the argmax of what the network said when it was revealed; one call a token."""
    seen = []

    def network(tokens, t):
        logits = Lookup(crooked())(tokens, t)
        jax.debug.callback(lambda *v: seen.append([np.asarray(x) for x in v]), tokens, logits)
        return logits

    sample(first_hitting(Absorbing(V), L, temperature=0.0), network, jax.random.key(1), 20)
    jax.effects_barrier()
    seen.sort(key=lambda v: -(v[0] == V).sum())
    for (before, logits), (after, _) in itertools.pairwise(seen):
        new = (before == V) & (after < V)
        assert new.sum() == 20
        np.testing.assert_array_equal(after[new], logits.argmax(axis=-1)[new])
