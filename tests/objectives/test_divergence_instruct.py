"""Divergence distillation against exact enumeration over a joint table of 4^5 sequences."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax.objectives import divergence_instruct as di

V, L = 4, 5
P = golden("discrete_table")["p"]
STORED = golden("divergence_instruct")
SEQUENCES = np.indices((V,) * L).reshape(L, -1).T
SHOWN = [np.array(bits, bool) for bits in itertools.product((False, True), repeat=L)]


def factorised(logits):
    """Joint table of independent positions, logits `[L, V]`."""
    q = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("a,b,c,d,e->abcde", *q)


def marginal_ratio(q, p, shown):
    """log q / p of the shown tokens, for every sequence, by NumPy: `[V^L]`."""
    hidden = tuple(np.flatnonzero(~shown))
    a, b = (np.asarray(v).sum(axis=hidden, keepdims=True) for v in (q, p))
    return (np.log(np.broadcast_to(a, P.shape)) - np.log(np.broadcast_to(b, P.shape))).ravel()


def set_weight(shown):
    """Chance that exactly these positions are shown, t uniform and alpha = 1 - t."""
    m = int(shown.sum())
    return math.factorial(m) * math.factorial(L - m) / math.factorial(L + 1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_integral_kl_and_its_gradient():
    p, nu = np.array(P), np.array(STORED["nu"])  # copies: see `numerics.renewed`
    divergence = lambda nu: di.integral_kl(factorised(nu), jnp.asarray(p))
    value, slope = quick_jit(jax.value_and_grad(divergence))(jnp.asarray(nu))
    np.testing.assert_allclose(value, STORED["ikl"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(slope, STORED["ikl_grad"], rtol=0, atol=1e-9)


def test_reward_of_masked_states():
    states = np.stack(np.unravel_index(STORED["reward_states"], (V + 1,) * L), axis=1)
    q = factorised(jnp.asarray(STORED["nu"]))
    for state, reward in zip(states, STORED["reward"]):
        shown = state < V
        at = int((np.where(shown, state, 0) * V ** np.arange(L)[::-1]).sum())
        np.testing.assert_allclose(marginal_ratio(q, P, shown)[at], reward, rtol=0, atol=1e-9)


def test_the_policy_gradient_averages_to_the_gradient():
    """Over all sequences and all masks, with the exact log-odds -R as the advantage."""
    nu = jnp.asarray(STORED["nu"])
    q = np.asarray(factorised(nu))
    masks = jnp.full(SEQUENCES.shape, V)
    weights = [set_weight(shown) for shown in SHOWN]
    advantage = -sum(w * marginal_ratio(q, P, s) for w, s in zip(weights, SHOWN))

    def surrogate(nu):
        logits = jnp.broadcast_to(nu, (len(SEQUENCES), L, V))
        log_q = di.log_prob_of_reveals(logits, masks, SEQUENCES, V)
        return (q.ravel() * di.policy_loss(log_q, jnp.asarray(advantage))).sum()

    slope = quick_jit(jax.grad(surrogate))(nu)
    np.testing.assert_allclose(slope, STORED["ikl_grad"], rtol=0, atol=1e-9)


@pytest.mark.slow
def test_a_student_table_descends_to_the_exact_minimum():
    """Sampled policy gradients (one draw of tokens and mask an example) against exact descent."""
    teacher = jnp.asarray(P)
    exact = lambda nu: di.integral_kl(factorised(nu), teacher)
    optimizer = optax.adam(0.05)

    def run(slope, steps, rates):
        def one(carry, rate):
            (nu, state), i = carry, rate[1]
            updates, state = optimizer.update(slope(nu, i), state)
            return (nu + rate[0] * updates, state), None

        begin = jnp.asarray(STORED["nu"])
        scanned = (jnp.asarray(rates), jnp.arange(steps))
        return jax.lax.scan(one, (begin, optimizer.init(begin)), scanned)[0][0]

    least = exact(jax.jit(lambda: run(lambda nu, i: jax.grad(exact)(nu), 300, np.ones(300)))())
    tables = [tuple(np.flatnonzero(~s)) for s in SHOWN]
    chance = jnp.log(jnp.array([set_weight(s) for s in SHOWN]))

    def sampled(nu, i):
        tokens_key, set_key = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        logits = jnp.broadcast_to(nu, (256, L, V))
        tokens = jax.random.categorical(tokens_key, logits)
        which = jax.random.categorical(set_key, chance, shape=(256,))
        q = factorised(nu)
        ratio = jnp.stack(
            [
                jnp.broadcast_to(
                    jnp.log(q.sum(h, keepdims=True) / teacher.sum(h, keepdims=True)), P.shape
                )
                for h in tables
            ]
        )
        reward = -ratio[(which, *tokens.T)]
        advantage = reward - reward.mean()

        def loss(nu):
            log_q = di.log_prob_of_reveals(
                jnp.broadcast_to(nu, logits.shape), jnp.full(tokens.shape, V), tokens, V
            )
            return di.policy_loss(log_q, jax.lax.stop_gradient(advantage)).mean()

        return jax.grad(loss)(nu)

    rates = np.linspace(1.0, 0.0, 300)
    found = exact(jax.jit(lambda: run(sampled, 300, rates))())
    begin = STORED["ikl"]
    assert least < 0.5 * begin
    assert found - least < 0.02 * (begin - least)


def test_the_best_discriminator_has_the_log_odds_minus_r():
    """At -R the loss of both sides has no slope; with smoothing the log-odds are pulled together."""
    q = np.asarray(factorised(jnp.asarray(STORED["nu"]))).ravel()
    shown = np.array([True, False, True, False, False])
    minus_r = -marginal_ratio(q.reshape(P.shape), P, shown)
    masked = jnp.asarray(np.broadcast_to(~shown, (V**L, L)))

    def loss(odds, smoothing):
        spread = jnp.broadcast_to(odds[:, None], (V**L, L))
        real = di.critic_loss(spread, masked, True, smoothing)
        fake = di.critic_loss(spread, masked, False, smoothing)
        # states that show the same tokens share their odds: the slope is summed over them
        return (P.ravel() * real + q * fake).sum()

    hidden = tuple(np.flatnonzero(~shown))
    of_state = lambda slope: np.asarray(slope).reshape(P.shape).sum(axis=hidden)
    at_best = of_state(jax.grad(loss)(jnp.asarray(minus_r), 0.0))
    np.testing.assert_allclose(at_best, 0.0, atol=1e-12)
    assert np.abs(of_state(jax.grad(loss)(jnp.asarray(1.1 * minus_r), 0.0))).max() > 1e-4
    a, b = (np.asarray(v).reshape(P.shape).sum(axis=hidden) for v in (P, q))
    smoothed = np.log((0.9 * a + 0.1 * b) / (0.1 * a + 0.9 * b))
    smoothed = np.broadcast_to(np.expand_dims(smoothed, hidden), P.shape).ravel()
    np.testing.assert_allclose(
        of_state(jax.grad(loss)(jnp.asarray(smoothed), 0.1)), 0.0, atol=1e-12
    )
    reward = di.critic_reward(jnp.broadcast_to(minus_r[:, None], (V**L, L)), masked)
    np.testing.assert_allclose(reward, minus_r, atol=1e-12)


def test_group_advantages():
    rewards = jnp.asarray(STORED["grpo_rewards"])
    for ddof, name in ((0, "population"), (1, "sample")):
        expected = STORED[f"grpo_advantage_{name}_std"]
        np.testing.assert_allclose(di.group_advantages(rewards, ddof=ddof), expected, atol=1e-9)
    clipped = di.group_advantages(rewards, clip=0.5)
    assert np.abs(clipped).max() == 0.5
    np.testing.assert_array_equal(di.group_advantages(jnp.ones((2, 4))), np.zeros((2, 4)))


def test_divergence_and_entropy_of_tokens():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, L, V))
    masked = rng.random((3, L)) < 0.5
    masked[2] = False
    q, p = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (a, b))
    kl, entropy = (q * np.log(q / p)).sum(-1), -(q * np.log(q)).sum(-1)
    count = np.maximum(masked.sum(1), 1)
    args = jnp.asarray(a), jnp.asarray(b), jnp.asarray(masked)
    np.testing.assert_allclose(di.token_divergence(*args), (kl * masked).sum(1) / count, atol=1e-12)
    found = di.token_entropy(args[0], args[2])
    np.testing.assert_allclose(found, (entropy * masked).sum(1) / count, atol=1e-12)


def test_tables_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \(2, 2\) and \(2,\) do not fit"):
        di.integral_kl(jnp.ones((2, 2)), jnp.ones(2))
