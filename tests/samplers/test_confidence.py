"""Orders of decoding against exact enumeration, and what they do with prompts, blocks and revisions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from token_laws import (
    CLEAN,
    MASKED,
    STATES,
    L,
    P,
    V,
    all_masked,
    counts_of,
    distance,
    index_of,
    network,
    standard_scores,
)

from diffusion_jax.processes import Absorbing, CosineSchedule
from diffusion_jax.samplers import confidence, llada, maskgit, sample, top_k_margin
from diffusion_jax.samplers.confidence import order_scores, select, token_log_probs
from diffusion_jax.samplers.token_states import CountedCalls

STORED = golden("discrete_orders")
NAMES = {"confidence": "maxprob"}  # what the stored laws call it
KEY = jax.random.key(0)


def state_law(name, order):
    """Exact law of one position a step where the state decides which: `[V^L]`."""
    probs, law = network(name), all_masked()
    scores = order_scores(order, np.log(np.maximum(probs, 1e-300)))
    chosen = select(scores, MASKED, np.ones(len(STATES), int)).argmax(axis=1)
    rows = np.arange(len(STATES))
    for _ in range(L):
        here = rows[law > 0]
        following = np.zeros_like(law)
        for v in range(V):
            after = STATES[here].copy()
            after[np.arange(len(here)), chosen[here]] = v
            np.add.at(following, index_of(after), law[here] * probs[here, chosen[here], v])
        law = following
    return law[CLEAN]


def sampled_law(name):
    """Exact law where every masked position is drawn and the likeliest draw stays: `[V^L]`."""
    probs, law = network(name), all_masked()
    for _ in range(L):
        following = np.zeros_like(law)
        for row in np.flatnonzero(law):
            hidden = np.flatnonzero(MASKED[row])
            draws = np.array(list(itertools.product(range(V), repeat=len(hidden))))
            x = np.tile(STATES[row], (len(draws), 1))
            x[:, hidden] = draws
            logits = np.log(np.maximum(probs[row], 1e-300))[None]
            scores = token_log_probs(np.broadcast_to(logits, (len(draws), L, V)), x).round(10)
            chosen = select(scores, np.tile(MASKED[row], (len(draws), 1)), np.ones(len(draws), int))
            weight = np.prod(probs[row, hidden, draws], axis=1)
            after = np.where(chosen, x, STATES[row])
            np.add.at(following, index_of(after), law[row] * weight)
        law = following
    return law[CLEAN]


@pytest.mark.parametrize("order", ("left", "confidence", "margin", "entropy"))
def test_exact_law_of_an_order_that_the_state_decides(order):
    """With the exact network it is the data; with another it is as stored."""
    assert distance(state_law("oracle", order), P) < 1e-12
    expected = STORED[f"model_order_{NAMES.get(order, order)}"]
    np.testing.assert_allclose(state_law("model", order), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ("oracle", "model"))
def test_exact_law_of_the_sampled_order(name):
    law = sampled_law(name)
    # equal probabilities (the data are a Markov chain) were told apart by rounding in the stored law
    atol = 2e-6 if name == "oracle" else 1e-12
    np.testing.assert_allclose(law, STORED[f"{name}_order_sampled"], rtol=0, atol=atol)
    if name == "oracle":
        assert distance(law, P) == pytest.approx(0.6445, abs=1e-4)


@pytest.mark.parametrize(
    "order, name",
    [
        ("random", "model"),
        ("left", "model"),
        ("confidence", "model"),
        ("margin", "model"),
        ("entropy", "model"),
        ("entropy", "oracle"),
        ("sampled", "oracle"),
    ],
)
def test_drawn_law_of_an_order(order, name):
    """Pearson's statistic of the draws within 5 deviations of the stored law."""
    kind = NAMES.get(order, order)
    law = P if (name, order) == ("oracle", "entropy") else STORED[f"{name}_order_{kind}"]
    counts = counts_of(confidence(Absorbing(V), length=L, order=order), name, seed=1)
    assert abs(standard_scores(counts, law)) < 5
    other = STORED["model_order_left" if order != "left" else "model_order_random"]
    assert standard_scores(counts, other) > 20


@pytest.mark.parametrize("sizes", ("2s", "last_big", "first_big"))
def test_drawn_law_of_several_positions_a_step(sizes):
    """Positions in random order, with the counts of each step given."""
    schedule = tuple(int(n) for n in STORED[f"oracle_parallel_{sizes}_sizes"])
    sampler = confidence(Absorbing(V), length=L, order="random", schedule=schedule)
    assert sampler.nfe == len(schedule)
    counts = counts_of(sampler, "oracle", seed=2)
    assert abs(standard_scores(counts, STORED[f"oracle_parallel_{sizes}"])) < 5
    assert standard_scores(counts, P) > 20


def test_annealed_noise_turns_the_order_into_a_random_one():
    """Large noise on the sampled tokens' scores: any-order sampling, exact for the exact network."""
    sampler = confidence(Absorbing(V), length=L, order="sampled", choice_temperature=1e6)
    assert abs(standard_scores(counts_of(sampler, "oracle", seed=3), P)) < 5


def names_position(tokens, t):
    """A network that is sure: position i holds token i mod 7, the surer the further right."""
    place = jnp.arange(tokens.shape[1])
    return jnp.broadcast_to(
        jax.nn.one_hot(place % 7, 7) * (1.0 + 0.1 * place)[:, None], (*tokens.shape, 7)
    )


def masks_left(sampler, tokens, denoise=names_position):
    """Masks of each sequence before the first and after each step, `[steps + 1, B]`."""
    _, path = sample(sampler, denoise, KEY, tokens, trajectory=True)
    return (np.asarray(path) == 7).sum(axis=2)


def with_masks(*numbers, length=12):
    """Sequences with these numbers of masks, at their ends."""
    place = np.arange(length)
    return jnp.asarray(np.stack([np.where(place < length - n, place % 7, 7) for n in numbers]))


NUMBERS = (12, 7, 3, 1, 0)


@pytest.mark.parametrize("steps", (1, 2, 5, 12))
def test_uniform_counts_of_sequences_with_different_numbers_of_masks(steps):
    """n // S each, one more in the first n % S steps (LLaDA), whatever stands beside a sequence."""
    sampler = confidence(Absorbing(7), steps, length=12)
    left = masks_left(sampler, with_masks(*NUMBERS))
    for n, seen in zip(NUMBERS, left.T):
        expected = [n // steps + (k < n % steps) for k in range(steps)]
        np.testing.assert_array_equal(-np.diff(seen), expected)


@pytest.mark.parametrize("steps", (1, 3, 4, 12))
def test_cosine_counts(steps):
    """Those of MaskGIT: floor(n cos(pi/2 k/S)) masks after step k, one revealed and one left at least."""
    sampler = confidence(Absorbing(7), steps, length=12, schedule="cosine")
    left = masks_left(sampler, with_masks(*NUMBERS))
    for n, seen in zip(NUMBERS, left.T):
        expected = [n]
        for k in range(1, steps + 1):
            kept = max(1, min(expected[-1] - 1, math.floor(n * math.cos(math.pi / 2 * k / steps))))
            expected.append(min(kept, n) if k < steps else 0)
        np.testing.assert_array_equal(seen, expected)


def test_a_sequence_does_not_depend_on_those_beside_it():
    """Positions are chosen sequence by sequence: not over the flattened batch."""
    sampler = confidence(Absorbing(7), 4, length=12, order="sampled")
    tokens = with_masks(12, 5, 9)
    bent = lambda x, t: jnp.sin(jnp.arange(84.0).reshape(12, 7) * (1.0 + x[..., None]))
    together = sample(sampler, bent, KEY, tokens)
    for row in range(3):
        alone = sample(sampler, bent, KEY, tokens[row : row + 1], index=jnp.array([row]))
        np.testing.assert_array_equal(alone[0], together[row])


def test_equal_scores_go_from_left_to_right():
    flat = lambda x, t: jnp.zeros((*x.shape, 7))
    for order in ("margin", "entropy", "sampled"):
        sampler = confidence(Absorbing(7), 12, length=12, order=order)
        _, path = sample(sampler, flat, KEY, with_masks(12), trajectory=True)
        hidden = np.asarray(path)[:, 0] == 7
        np.testing.assert_array_equal(hidden, np.arange(12) >= np.arange(13)[:, None])


def test_blocks_are_filled_one_after_the_other():
    """Runs of masked positions; the network alone would begin at the right end."""
    sampler = confidence(Absorbing(7), 6, length=12, block_length=4)
    tokens = with_masks(12, 9, 4)
    _, path = sample(sampler, names_position, KEY, tokens, trajectory=True)
    hidden = np.asarray(path) == 7
    first = lambda row, step: hidden[step, row]
    for row, n in enumerate((12, 9, 4)):
        start = 12 - n
        for step in range(6):
            block = step // 2
            begin, end = start + 4 * block, min(start + 4 * block + 4, 12)
            if begin >= 12:
                np.testing.assert_array_equal(first(row, step + 1), first(row, step))
                continue
            assert not first(row, step)[:begin].any() and first(row, step)[end:].all()
            revealed = np.flatnonzero(first(row, step) & ~first(row, step + 1))
            size = end - begin
            assert len(revealed) == [-(-size // 2), size // 2][step % 2]
            if step % 2 == 0:
                assert revealed.max() == end - 1  # the surest of the block
    assert not hidden[-1].any()


def test_threshold_reveals_whatever_is_sure_and_then_calls_no_more():
    place = np.arange(12)
    sharp = np.where(place < 9, 9.0, 0.5)  # nine positions are sure, three are not

    def denoise(tokens, t):
        logits = jax.nn.one_hot(place % 7, 7) * sharp[:, None]
        return jnp.broadcast_to(logits, (*tokens.shape, 7))

    counted = CountedCalls(denoise)
    sampler = confidence(Absorbing(7), length=12, threshold=0.9, temperature=0.0)
    assert not sampler.stochastic and sampler.nfe == 12
    x, path = sample(sampler, counted, None, with_masks(12, 5), trajectory=True)
    left = (np.asarray(path) == 7).sum(axis=2)
    np.testing.assert_array_equal(left[:5, 0], [12, 3, 2, 1, 0])
    np.testing.assert_array_equal(left[:4, 1], [5, 3, 2, 1])
    assert counted.calls == 4 and (np.asarray(x) == place % 7).all()


def test_at_temperature_0_the_sampled_token_is_the_likeliest():
    bent = lambda x, t: jnp.sin(jnp.arange(84.0).reshape(12, 7) * (1.0 + x[..., None]))
    tokens = with_masks(12, 5, 9)
    cold = confidence(Absorbing(7), 5, length=12, temperature=0.0)
    expected, path = sample(cold, bent, None, tokens, trajectory=True)
    found, other = sample(llada(Absorbing(7), 5, length=12), bent, None, tokens, trajectory=True)
    np.testing.assert_array_equal(path, other)
    np.testing.assert_array_equal(expected, found)


def test_presets():
    process = Absorbing(7)
    made = maskgit(process, length=12)
    assert made.nfe == 8 and made.name == "maskgit" and made.stochastic
    np.testing.assert_allclose(made.xs["noise"], 4.5 * (1 - np.arange(1, 9) / 8))
    assert made.step.schedule == "cosine" and made.step.order == "sampled"
    assert llada(process, length=12, temperature=0.5).stochastic
    assert top_k_margin(process, length=12).step.order == "margin"
    assert confidence(process, 40, length=12).nfe == 12  # a step without a reveal does nothing


# Revision (ReDiff)


def wrong_at_first(tokens, t):
    """Says 0 everywhere while most is masked, and the position's own token later: at every position."""
    early = (tokens == 7).sum(axis=1) > 6
    right = jax.nn.one_hot(jnp.arange(tokens.shape[1]) % 7, 7) * 9.0
    wrong = jax.nn.one_hot(jnp.zeros(tokens.shape[1], int), 7) * 9.0
    return jnp.where(early[:, None, None], wrong, right)


def test_revision_overwrites_what_was_revealed_and_never_the_prompt():
    prompt = np.full((2, 12), 7)
    prompt[1, :3] = [5, 5, 5]
    right = np.where(prompt == 7, np.arange(12) % 7, prompt)
    made = lambda **kw: confidence(Absorbing(7), 4, length=12, temperature=0.0, **kw)
    run = lambda sampler: np.asarray(sample(sampler, wrong_at_first, None, jnp.asarray(prompt)))
    plain, revised = run(made()), run(made(revise=1.0))
    assert (plain != right).any(axis=1).all()
    np.testing.assert_array_equal(revised, right)
    np.testing.assert_array_equal(run(made(revise=1.0, revise_start=4)), plain)
    # a quarter of what has been revealed is not all of it, but some
    some = (run(made(revise=0.25)) != right).sum()
    assert 0 < some < (plain != right).sum()
    # steps beyond the last mask go on revising
    assert (
        made(revise=1.0).nfe == 4 and confidence(Absorbing(7), 20, length=12, revise=0.5).nfe == 20
    )


def test_no_revision_is_plain_decoding_bit_for_bit():
    bent = lambda x, t: jnp.sin(jnp.arange(84.0).reshape(12, 7) * (1.0 + x[..., None]))
    options = {"length": 12, "block_length": 6, "temperature": 0.7, "order": "sampled"}
    first, second = (
        sample(made, bent, KEY, with_masks(12, 5), trajectory=True)[1]
        for made in (
            llada(Absorbing(7), 6, **options),
            confidence(Absorbing(7), 6, revise=1.0, revise_start=6, **options),
        )
    )
    np.testing.assert_array_equal(first, second)


def test_the_network_is_told_the_time_of_the_masks_it_sees():
    process = Absorbing(7, CosineSchedule())
    seen = []

    def denoise(tokens, t):
        jax.debug.callback(lambda *v: seen.append(v), (tokens == 7).sum(axis=1), t)
        return jnp.zeros((*tokens.shape, 7))

    sample(confidence(process, 4, length=12), denoise, KEY, with_masks(12, 6))
    jax.effects_barrier()
    assert len(seen) == 4
    for masks, t in seen:
        np.testing.assert_allclose(process.mask_rate(t), masks / 12, rtol=1e-5)


PROCESS = Absorbing(7)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"order": "marginal"}, "order must be one of .*; got 'marginal'; did you mean 'margin'"),
        ({"schedule": "linear"}, "schedule must be one of uniform, cosine; got 'linear'"),
        ({"schedule": (2, -1)}, "schedule must be a name or counts of at least 0"),
        ({"schedule": (2, 2), "num_steps": 3}, "schedule has 2 counts, num_steps is 3"),
        ({"threshold": 1.5}, r"threshold must lie in \(0, 1\) or be None, got 1.5"),
        ({"choice_temperature": -1.0}, "choice_temperature must be 0 or positive, got -1"),
        (
            {"choice_temperature": 1.0, "order": "left"},
            "choice_temperature needs order confidence or",
        ),
        ({"revise": 2}, r"revise is a share in \[0, 1\]"),
        ({"revise_start": -1}, "revise_start must be an int of at least 0, got -1"),
        ({"block_length": 0}, "block_length must be a positive int or None, got 0"),
        ({"block_length": 3, "num_steps": 3}, "num_steps = 3 is too few for 4 blocks of 3 in 12"),
        ({"num_steps": 0}, "num_steps must be a positive int, got 0"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"length": None}, "num_steps is by default the sequence length: pass length"),
        (
            {"length": None, "num_steps": 4, "block_length": 2},
            "block_length needs the sequence length",
        ),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ValueError, match=words):
        confidence(PROCESS, **{"length": 12, **options})
