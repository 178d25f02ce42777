"""ReMDM against exact enumeration and stored transitions; what it does to masks, prompts and calls."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from token_laws import (
    CLEAN,
    STATES,
    L,
    P,
    V,
    all_masked,
    counts_of,
    index_of,
    network,
    push,
    standard_scores,
)

from diffusion_jax.processes import Absorbing, CosineSchedule, GeometricSchedule
from diffusion_jax.samplers import masked_ancestral, remasking_probs, remdm, sample
from diffusion_jax.samplers.remasking import largest_sigma
from diffusion_jax.samplers.token_states import CountedCalls

STORED = golden("discrete_orders")
CASES = {
    "cap_0.05": {"strategy": "cap", "eta": 0.05},
    "cap_0.4": {"strategy": "cap", "eta": 0.4},
    "rescale_0.5": {"strategy": "rescale", "eta": 0.5},
}
KEY = jax.random.key(0)


@pytest.mark.parametrize("case", CASES)
def test_one_step_against_the_stored_transitions(case):
    steps = golden("discrete_steps")
    process = Absorbing(V)
    for t, s, sigma, expected in zip(
        steps["t"], steps["s"], STORED[f"remdm_{case}_sigma"], STORED[f"remdm_{case}"]
    ):
        sampler = remdm(process, grid=np.array([1.0, t, s, 0.0]), **CASES[case])
        found, reveal = sampler.xs["sigma"][1], sampler.xs["reveal"][1]
        np.testing.assert_allclose(found, sigma, rtol=0, atol=1e-12)
        probs = network("model")[index_of(steps["x_t"])]
        got = remasking_probs(process, probs, steps["x_t"], t, s, found)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(1.0 - got[steps["x_t"] == V][:, -1], reveal, rtol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_exact_law_of_the_generated_sequence(case):
    process = Absorbing(V)
    for n, expected in list(zip(STORED["remdm_steps"], STORED[f"oracle_remdm_{case}"]))[:2]:
        sampler, law = remdm(process, int(n), **CASES[case]), all_masked()
        times = np.append(sampler.times, 0.0)
        for (t, s), sigma in zip(itertools.pairwise(times), sampler.xs["sigma"]):
            law = push(law, remasking_probs(process, network("oracle"), STATES, t, s, sigma))
        np.testing.assert_allclose(law[CLEAN], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case, steps", [("cap_0.4", 8), ("rescale_0.5", 16)])
def test_drawn_law(case, steps):
    at = list(STORED["remdm_steps"]).index(steps)
    sampler = remdm(Absorbing(V), steps, length=L, **CASES[case])
    counts = counts_of(sampler, "oracle", seed=1)
    assert abs(standard_scores(counts, STORED[f"oracle_remdm_{case}"][at])) < 5
    assert standard_scores(counts, P) > 10


def lean(tokens, t):
    """Logits that depend on the neighbours."""
    place = jax.nn.one_hot(jnp.roll(tokens, 1, axis=1), 7) * 2.0
    return place + jnp.arange(7) * 0.3


@pytest.mark.parametrize("strategy", ("cap", "conf"))
def test_without_remasking_it_is_ancestral_sampling_bit_for_bit(strategy):
    process = Absorbing(7, CosineSchedule())
    first = masked_ancestral(process, 6, length=10, nucleus=0.8)
    second = remdm(process, 6, length=10, nucleus=0.8, strategy=strategy, eta=0.0)
    x, y = (sample(s, lean, KEY, 16, trajectory=True)[1] for s in (first, second))
    np.testing.assert_array_equal(x, y)


SCHEDULES = {
    "linear": "linear",
    "cosine": CosineSchedule(),
    "geometric": GeometricSchedule(1e-3, 9.0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", (*CASES.values(), {"strategy": "loop", "eta": 0.3}))
def test_every_token_is_clean_with_probability_alpha(schedule, options):
    """The chain of one position's mask, from the numbers that the steps run on."""
    process = Absorbing(7, SCHEDULES[schedule])
    xs = remdm(process, 20, **options).xs
    masked, worst = float(process.mask_rate(1.0)), 0.0
    for reveal, sigma, rate in zip(xs["reveal"], xs["sigma"], xs["next"]["mask_rate"]):
        masked = masked * (1.0 - reveal) + (1.0 - masked) * sigma
        assert 0.0 <= reveal <= 1.0 + 1e-12 and 0.0 <= sigma <= 1.0
        worst = max(worst, abs(masked - rate))
    assert worst < 1e-9 + abs(rate)  # the last step reveals what the schedule would leave
    assert xs["sigma"][:-1].max() > 0


def test_masks_of_each_step_are_binomial():
    num, length = 4000, 6
    sampler = remdm(Absorbing(7), 5, length=length, strategy="rescale", eta=0.7)
    _, path = sample(sampler, lean, KEY, num, trajectory=True)
    left = (np.asarray(path) == 7).sum(axis=2)[1:-1]
    for masks, rate in zip(left, sampler.xs["next"]["mask_rate"]):
        mean, var = length * rate, length * rate * (1 - rate)
        assert abs(masks.mean() - mean) < 4 * np.sqrt(var / num)
        fourth = var * (1 + (3 * length - 6) * rate * (1 - rate))  # about the mean
        assert abs(masks.var() - var) < 4 * np.sqrt((fourth - var**2) / num)
    returned = (np.asarray(path)[1:-1] != 7) & (np.asarray(path)[2:] == 7)
    assert returned.any()


def test_doubtful_tokens_are_masked_first():
    """Strategy "conf": sigma is shared out by softmax(-psi), psi as the token was drawn."""
    num = 20_000
    likely = jnp.log(jnp.array([[0.95, 0.05], [0.5, 0.5]]))
    denoise = lambda x, t: jnp.broadcast_to(likely, (*x.shape, 2))
    grid = np.array([1.0, 0.4, 0.3, 0.0])
    sampler = remdm(Absorbing(2), grid=grid, length=2, strategy="conf", temperature=0.0)
    _, path = sample(sampler, denoise, KEY, num, trajectory=True)
    first, second = np.asarray(path)[1:3]
    both = (first != 2).all(axis=1)
    assert both.mean() == pytest.approx(0.36, abs=0.02)
    weights = np.exp(-np.array([0.95, 0.5]))
    expected = largest_sigma(Absorbing(2), 0.4, 0.3) * weights / weights.sum()
    found = (second[both] == 2).mean(axis=0)
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / both.sum()))
    assert expected[1] > 1.4 * expected[0]
    one = (first == 2).sum(axis=1) == 1  # alone it takes all of sigma
    alone = second[one][(first[one] != 2)] == 2
    assert alone.mean() == pytest.approx(0.5, abs=0.03)


def test_the_loop_rises_holds_and_rises():
    sampler = remdm(Absorbing(7), 20, strategy="loop")
    alpha = 1.0 - np.append(sampler.xs["point"]["mask_rate"], 0.0)
    clock = np.linspace(1.0, 0.0, 21)
    held = (clock <= 0.55) & (clock >= 0.05)
    np.testing.assert_allclose(alpha[held], 0.9)
    np.testing.assert_allclose(alpha[clock >= 0.55], 0.9 * (1 - clock[clock >= 0.55]) / 0.45)
    np.testing.assert_allclose(sampler.xs["sigma"][held[:-1] & held[1:]], 0.02)
    np.testing.assert_allclose(sampler.xs["sigma"][~held[:-1]], 0.0)


def test_a_prompt_stays():
    prompt = np.full((400, 6), 7)
    prompt[:, :2] = [3, 5]
    sampler = remdm(Absorbing(7), 12, strategy="rescale", eta=0.9)
    x, path = sample(sampler, lean, KEY, jnp.asarray(prompt), trajectory=True)
    assert (np.asarray(path)[:, :, :2] == [3, 5]).all() and np.asarray(x).max() < 7


def test_no_call_where_nothing_is_revealed():
    counted = CountedCalls(lean)
    sampler = remdm(Absorbing(7), 30, length=2, eta=0.05)
    x, path = sample(sampler, counted, KEY, 1, trajectory=True)
    path = np.asarray(path)[:, 0]
    revealing = ((path[:-1] == 7) & (path[1:] != 7)).any(axis=1)
    assert counted.calls == revealing.sum() < 30 and np.asarray(x).max() < 7


@pytest.mark.parametrize(
    "options, words",
    [
        ({"strategy": "confidence"}, "strategy must be one of .*; got 'confidence'"),
        ({"strategy": "rescale"}, "strategy 'rescale' needs eta"),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\], got 1.5"),
        ({"strategy": "loop", "t_on": 0.01}, "need 0 < t_off < t_on < 1"),
        ({"strategy": "loop", "alpha_on": 1.0}, r"alpha_on must lie in \(0, 1\), got 1.0"),
        ({"strategy": "loop", "t_end": 0.1}, "t_off = 0.05 and t_on = 0.55 must lie within"),
        (
            {"strategy": "loop", "t_start": 0.7, "alpha_on": 0.2},
            "alpha_on = 0.2 is outside of alpha",
        ),
        ({"top_p": 0.9}, "must be one of temperature, nucleus, top_k"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        remdm(Absorbing(7), 10, **options)
