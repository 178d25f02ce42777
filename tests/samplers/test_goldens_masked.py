"""Discrete processes and masked samplers against exact enumeration over a joint table of 4^5 sequences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from token_laws import (
    CLEAN,
    NUM,
    STATES,
    L,
    Lookup,
    P,
    V,
    conditionals,
    crooked,
    distance,
    draws,
    index_of,
    push,
    standard_scores,
)

from diffusion_jax.processes import (
    Absorbing,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    Uniform,
)
from diffusion_jax.samplers import first_hitting, masked_ancestral, sample

SCHEDULES = {
    "linear": LinearSchedule(),
    "loglinear": LinearSchedule(eps_end=1e-3),
    "cosine": CosineSchedule(),
    "geometric": GeometricSchedule(1e-4, 20.0),
}


def ancestral_law(process, network, num_steps):
    """Exact law of the ancestral sampler, `[V^L]`, by `reverse_probs` over all masked states."""
    sampler = masked_ancestral(process, num_steps)
    times = np.append(sampler.times, sampler.xs["next"]["t"][-1])
    law = (STATES == V).all(axis=1).astype(float)
    for t, s in itertools.pairwise(times):
        law = push(law, process.reverse_probs(network, STATES, t, s))
    assert law[~CLEAN].sum() < 1e-12
    return law[CLEAN]


def any_order_law(network):
    """Exact law of revealing one position at a time in a uniformly random order, `[V^L]`."""
    law = (STATES == V).all(axis=1).astype(float)
    for left in range(L, 0, -1):
        following = np.zeros_like(law)
        for position in range(L):
            at = (STATES[:, position] == V) & (law > 0)
            base = index_of(STATES[at]) - V * (V + 1) ** (L - 1 - position)
            for v in range(V):
                np.add.at(
                    following,
                    base + v * (V + 1) ** (L - 1 - position),
                    law[at] * network[at, position, v] / left,
                )
        law = following
    return law[CLEAN]


@pytest.mark.parametrize("network", ("oracle", "model"))
def test_one_reverse_step_of_the_absorbing_process(network):
    stored = golden("discrete_steps")
    tokens = stored["x_t"]
    probs = np.exp(stored["model_logp"])
    if network == "oracle":
        probs = conditionals()[index_of(tokens)]
    for name, expected in zip(stored["names"], stored[f"{network}_ancestral"]):
        process = Absorbing(V, SCHEDULES[str(name)])
        for t, s, row in zip(stored["t"], stored["s"], expected):
            got = process.reverse_probs(probs, tokens, t, s)
            np.testing.assert_allclose(got, row, rtol=0, atol=1e-12)


def test_one_reverse_step_of_the_uniform_process():
    stored = golden("discrete_uniform")
    tokens = np.stack(np.unravel_index(stored["x_t_index"], (V,) * L), axis=1)
    process = Uniform(V, GeometricSchedule(1e-3, 10.0))

    def time_of(sigma):  # sigma_bar is geometric in t
        return np.log(sigma / 1e-3) / np.log(10.0 / 1e-3)

    for k, (sigma, sigma_s) in enumerate(zip(stored["sigma"], stored["sigma_s"])):
        t, s = time_of(sigma), time_of(sigma_s)
        np.testing.assert_allclose(process.schedule.sigma_bar(t), sigma, rtol=1e-9)
        loo = process.reverse_probs(stored["posterior_leave_one_out"][k], tokens, t, s)
        expected = stored["reverse_plugin_leave_one_out"][k]
        np.testing.assert_allclose(loo, expected, rtol=0, atol=1e-10)
        # the trap: the full posterior in its place gives the stored wrong numbers, far away
        full = process.reverse_probs(stored["posterior_full"][k], tokens, t, s)
        wrong = stored["reverse_plugin_full_WRONG"][k]
        np.testing.assert_allclose(full, wrong, rtol=0, atol=1e-10)
        assert np.abs(full - expected).max() > 1e-3


def test_law_of_the_uniform_process_with_leave_one_out_posteriors():
    """Ancestral steps from the uniform prior: total variation as stored, first order in the steps."""
    stored = golden("discrete_uniform")
    process, states = Uniform(V), np.indices((V,) * L).reshape(L, -1).T

    def leave_one_out(t):
        keep = (1 - t) * np.eye(V) + t / V
        out = np.empty((V**L, L, V))
        for i in range(L):
            joint = P
            for axis in range(L):
                if axis != i:
                    joint = np.moveaxis(np.tensordot(keep, joint, (1, axis)), 0, axis)
            joint = np.moveaxis(joint, i, -1)[tuple(np.delete(states, i, axis=1).T)]
            out[:, i] = joint / joint.sum(-1, keepdims=True)
        return out

    for n, expected in zip(stored["law_steps"][:4], stored["law_udlm_loo_tv"]):
        law, times = np.full(V**L, V**-L), np.linspace(1.0, 0.0, n + 1)
        for t, s in itertools.pairwise(times):
            law = push(law, process.reverse_probs(leave_one_out(t), states, t, s))
        np.testing.assert_allclose(distance(law, P), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_exact_law_of_ancestral_sampling(schedule):
    stored = golden("discrete_sampler_law")
    process = Absorbing(V, SCHEDULES[schedule])
    laws = dict(zip((1, 2, 8), stored[f"oracle_ancestral_{schedule}"]))
    for n, tv in zip(stored["steps"], stored[f"oracle_ancestral_{schedule}_tv"]):
        if n not in (1, 2, 5, 8, 32):
            continue
        law = ancestral_law(process, conditionals(), int(n))
        np.testing.assert_allclose(law.sum(), 1.0, atol=1e-12)
        np.testing.assert_allclose(distance(law, P), tv, rtol=0, atol=1e-10)
        if n in laws:
            np.testing.assert_allclose(law, laws[n], rtol=0, atol=1e-12)


def test_ancestral_sampling_is_of_first_order():
    process = Absorbing(V)
    tv = [distance(ancestral_law(process, conditionals(), n), P) for n in (16, 32, 64)]
    ratios = np.array(tv[:-1]) / tv[1:]
    np.testing.assert_allclose(ratios, 2.0, atol=0.05)


def test_any_order_law_of_the_exact_network_is_the_data():
    assert distance(any_order_law(conditionals()), P) < 1e-12
    assert distance(any_order_law(crooked()), P) > 0.1


@pytest.mark.parametrize("n", (1, 2, 8))
def test_drawn_law_of_masked_ancestral(n):
    """Pearson's statistic of 40,000 draws within 5 deviations of what the enumerated law predicts."""
    stored = golden("discrete_sampler_law")
    sampler = masked_ancestral(Absorbing(V), n, length=L)
    counts = draws(sampler, conditionals(), seed=n)
    law = stored["oracle_ancestral_linear"][(1, 2, 8).index(n)]
    assert abs(standard_scores(counts, law)) < 5
    assert standard_scores(counts, P) > 20  # and it is not the data: n steps are not exact


def test_drawn_law_of_masked_ancestral_on_another_schedule_and_network():
    process = Absorbing(V, CosineSchedule())
    law = ancestral_law(process, crooked(), 3)
    counts = draws(masked_ancestral(process, 3, length=L), crooked(), seed=11)
    assert abs(standard_scores(counts, law)) < 5
    assert standard_scores(counts, ancestral_law(Absorbing(V), crooked(), 3)) > 20


@pytest.mark.parametrize("network", ("oracle", "crooked"))
def test_drawn_law_of_first_hitting(network):
    """Exact for the true conditionals; for any network, the law of a uniformly random order."""
    table = conditionals() if network == "oracle" else crooked()
    counts = draws(first_hitting(Absorbing(V), L), table, seed=5)
    assert abs(standard_scores(counts, any_order_law(table))) < 5
    if network == "oracle":
        assert abs(standard_scores(counts, P)) < 5


def test_temperature_sharpens_each_conditional():
    cold = crooked() ** (1 / 0.5)
    cold = np.where(CLEAN[:, None, None], crooked(), cold / cold.sum(-1, keepdims=True))
    sampler = first_hitting(Absorbing(V), L, temperature=0.5)
    assert abs(standard_scores(draws(sampler, crooked(), seed=6), any_order_law(cold))) < 5


def test_infilling_follows_the_conditional_law():
    """Given tokens stay; the rest follows p(rest | given), for both samplers' limits."""
    prompt = np.tile([V, 1, V, 3, V], (NUM, 1))
    exact = P[:, 1, :, 3, :] / P[:, 1, :, 3, :].sum()
    out = sample(first_hitting(Absorbing(V), L), Lookup(conditionals()), jax.random.key(3), prompt)
    out = np.asarray(out)
    assert (out[:, 1] == 1).all() and (out[:, 3] == 3).all()
    counts = np.bincount(out[:, [0, 2, 4]] @ [16, 4, 1], minlength=64)
    assert abs(standard_scores(counts, exact)) < 5


def test_no_mask_is_left_over():
    """Not where the schedule's ends are pulled in, and not where sampling stops early."""
    network = Lookup(conditionals())
    for schedule in ("linear", "loglinear", "geometric"):
        for t_end in (0.0, 0.3):
            sampler = masked_ancestral(Absorbing(V, SCHEDULES[schedule]), 4, length=L, t_end=t_end)
            assert np.asarray(sample(sampler, network, jax.random.key(2), 500)).max() < V


@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_hitting_times_of_first_hitting(schedule):
    """The k-th reveal happens at mask rate Beta(L - k + 1, k), whatever the schedule."""
    stored, num = golden("discrete_nfe"), 20_000
    process = Absorbing(V, SCHEDULES[schedule])
    seen = []

    def keep(state, info):
        jax.debug.callback(lambda *v: seen.append(v), info.step, state.mask_rate)
        return state

    sampler = first_hitting(process, L)
    sample(sampler, lambda x, t: jnp.zeros((num, L, V)), jax.random.key(0), num, hook=keep)
    jax.effects_barrier()
    rates = np.stack([rate for _, rate in sorted(seen, key=lambda v: int(v[0]))])
    assert rates.shape == (L, num) and (np.diff(rates, axis=0) <= 0).all()
    for k, (mean, var) in enumerate(
        zip(stored["hitting_lambda_mean"], stored["hitting_lambda_var"])
    ):
        assert abs(rates[k].mean() - mean) < 4 * np.sqrt(var / num)
        a, b = (
            L - k,
            k + 1,
        )  # fourth moment of a beta law about its mean, for the error of the variance
        excess = 6 * ((a - b) ** 2 * (a + b + 1) - a * b * (a + b + 2))
        excess /= a * b * (a + b + 2) * (a + b + 3)
        assert abs(rates[k].var() - var) < 4 * var * np.sqrt((excess + 2) / num)
