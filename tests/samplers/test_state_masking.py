"""Sampling with token-dependent schedules: exact laws on the golden table, and draws that follow them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit
from token_laws import CLEAN, MASKED, STATES, L, P, V, all_masked, distance, network, push

from diffusion_jax.processes import VP, Absorbing, PolynomialSchedule, StateMasking, Uniform
from diffusion_jax.samplers import build_sampler, masked_ancestral, sample, state_masked_ancestral

POWERS = np.array([0.6, 1.0, 1.7, 3.0])
PROCESS = StateMasking(V, POWERS)


def posterior(t, powers=POWERS):
    """E[x0 | z_t] in every masked state `[S, L, V]`: a mask speaks for the tokens masked early."""
    rates = (1 - PROCESS.eps) * t**powers
    weighted = P.copy()
    sums = weighted
    for axis in range(L):  # the mask's row: the mass of all tokens, each times its mask rate
        shape = [1] * L
        shape[axis] = V
        masked = (sums * rates.reshape(shape)).sum(axis=axis, keepdims=True)
        sums = np.concatenate([sums, masked], axis=axis)
    found = np.eye(V)[np.minimum(STATES, V - 1)]
    for i in range(L):
        joint = np.moveaxis(sums, i, -1)[..., :V][tuple(np.delete(STATES, i, axis=1).T)] * rates
        found[MASKED[:, i], i] = (joint / joint.sum(axis=-1, keepdims=True))[MASKED[:, i]]
    return found


def law_of(num_steps, powers=POWERS, mu=posterior):
    """The exact law of the sampler, by pushing the chain through its steps."""
    times = np.linspace(1.0, 0.0, num_steps + 1)
    law = all_masked()
    for t, s in itertools.pairwise(times):
        stay = np.exp(StateMasking(V, powers).log_stay(t, s)) if s > 0 else np.zeros(V)
        probs = mu(t)
        transition = np.zeros((len(STATES), L, V + 1))
        transition[..., :V] = np.where(MASKED[..., None], probs * (1 - stay), probs)
        transition[..., V] = np.where(MASKED, (probs * stay).sum(axis=-1), 0.0)
        law = push(law, transition)
    assert law[~CLEAN].max() < 1e-12
    return law[CLEAN]


class Lookup:
    """Posteriors at the sampler's times as a denoiser."""

    def __init__(self, times, powers=POWERS):
        self.times = jnp.asarray(times, jnp.float32)
        tables = np.stack([posterior(t, powers) for t in times])
        self.tables = jnp.asarray(np.log(np.maximum(tables, 1e-30)), jnp.float32)

    def __call__(self, x, t):
        which = jnp.argmin(jnp.abs(self.times - jnp.asarray(t)))
        return self.tables[which, x @ (V + 1) ** jnp.arange(L)[::-1]]


def scores(counts, law):
    """Standard normal for draws from `law`, if its cells are many."""
    expected = counts.sum() * law
    many = expected > 1
    rest = lambda v: np.append(v[many], v[~many].sum())
    counts, expected = rest(counts), rest(expected)
    degrees = len(counts) - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


def drawn(process, steps, denoise, num=40_000, **options):
    sampler = state_masked_ancestral(process, steps, length=L, **options)
    x = np.asarray(sample(sampler, denoise, jax.random.key(1), num))
    assert x.min() >= 0 and x.max() < V
    return np.bincount(x @ V ** np.arange(L)[::-1], minlength=V**L)


def test_the_law_converges_to_the_data():
    """First order; with a posterior that ignores the time it does not converge."""
    steps = [4, 8, 16, 32]
    errors = [distance(law_of(n), P) for n in steps]
    slopes = np.diff(np.log(errors)) / np.log(2)
    assert errors[-1] < 0.03 and (np.abs(slopes + 1) < 0.25).all(), (errors, slopes)
    blind = network("oracle")
    assert distance(law_of(32, mu=lambda t: blind), P) > 0.1


def test_equal_powers_are_masked_diffusion():
    """The same posterior at every time, and the law of the ancestral sampler with alpha = 1 - t^2."""
    np.testing.assert_allclose(posterior(0.3, np.full(V, 2.0)), network("oracle"), atol=1e-12)
    process = Absorbing(V, PolynomialSchedule(2.0))
    sampler = masked_ancestral(process, 3, length=L)
    times = sampler.times.tolist() + [0.0]
    np.testing.assert_allclose(times, np.linspace(1, 0, 4))
    law = law_of(3, np.full(V, 2.0), lambda t: network("oracle"))
    table = jnp.asarray(np.log(np.maximum(network("oracle"), 1e-30)), jnp.float32)
    denoise = lambda x, t: table[x @ (V + 1) ** jnp.arange(L)[::-1]]
    for made in (process, StateMasking(V, 2.0)):
        assert abs(scores(drawn(made, 3, denoise), law)) < 5


@pytest.mark.parametrize("steps", [1, 4])
def test_draws_follow_the_law(steps):
    denoise = Lookup(np.linspace(1, 0, steps + 1)[:-1])
    counts = drawn(PROCESS, steps, denoise)
    assert abs(scores(counts, law_of(steps))) < 5
    if steps == 4:
        assert scores(counts, law_of(4, np.ones(V), lambda t: network("oracle"))) > 20


def test_temperature_acts_on_the_network_s_law():
    """At 0 with one step, every position takes its most probable token."""
    found = drawn(PROCESS, 1, Lookup([1.0]), num=100, temperature=0.0)
    best = posterior(1.0)[-1].argmax(axis=-1) @ V ** np.arange(L)[::-1]
    assert found[best] == 100


def test_learnt_powers_are_leaves():
    """One program for all powers; gradients and vectors of powers pass through."""
    traces = []

    def denoise(x, t):
        traces.append(1)
        return jnp.zeros((*x.shape, V))

    first = state_masked_ancestral(StateMasking(V, np.ones(V)), 2, length=L)
    second = state_masked_ancestral(StateMasking(V, POWERS), 2, length=L)
    outs = [np.asarray(sample(s, denoise, jax.random.key(0), 50)) for s in (first, second)]
    assert len(traces) == 1 and (outs[0] != outs[1]).any()


def test_the_forward_process():
    tokens = jnp.tile(jnp.arange(V), (4000, 1))
    keys = jax.random.split(jax.random.key(0), 4000)
    t = jnp.where(jnp.arange(4000) < 2000, 0.3, 0.8)
    x = np.asarray(quick_jit(PROCESS.corrupt)(keys, tokens, t))
    for rows, time in ((slice(0, 2000), 0.3), (slice(2000, None), 0.8)):
        exact = (1 - 1e-4) * time**POWERS
        found = (x[rows] == V).mean(axis=0)
        assert (np.abs(found - exact) < 4 * np.sqrt(exact * (1 - exact) / 2000)).all()
        assert ((x[rows] == V) | (x[rows] == np.arange(V))).all()
    np.testing.assert_allclose(PROCESS.alphas(np.arange(V)[None], 0.3)[0], 1 - exact_rate(0.3))
    np.testing.assert_allclose(
        np.exp(PROCESS.log_stay(0.8, 0.3)), exact_rate(0.3) / exact_rate(0.8)
    )
    assert (PROCESS.log_stay(0.5, 0.0) == -np.inf).all()
    assert (PROCESS.prior(jax.random.key(0), (2, 3)) == V).all()


def exact_rate(t):
    return (1 - 1e-4) * t**POWERS


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: StateMasking(4, [1.0, 2.0]), r"a number or 4 of them, got shape \(2,\)"),
        (lambda: StateMasking(4, -1.0), "powers must be positive, got -1.0"),
        (lambda: StateMasking(4, eps=0.2), r"eps = 0.2 must lie in \[0, 0.01\]"),
        (
            lambda: state_masked_ancestral(Uniform(4)),
            "StateMasking or Absorbing process, got Uniform",
        ),
        (
            lambda: build_sampler(StateMasking(4), "masked_ancestral", 4),
            "needs an Absorbing process",
        ),
        (lambda: build_sampler(VP(), "state_masked_ancestral", 4), "not for a gaussian process"),
        (
            lambda: build_sampler(StateMasking(4), "discrete_ancestral", 4),
            "its sampler is state_masked_ancestral",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
