"""Exact laws over a joint table of 4^5 sequences, networks on it, and draws to compare with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from golden_files import golden

from diffusion_jax.samplers import sample

V, L = 4, 5
P = golden("discrete_table")["p"]
STATES = np.indices((V + 1,) * L).reshape(L, -1).T  # all masked states, mask id V
MASKED = STATES == V
CLEAN = ~MASKED.any(axis=1)


@functools.cache
def conditionals():
    """p(x0_i = v | unmasked tokens) for every masked state, `[(V+1)^L, L, V]`, by summing the table."""
    # sums[x] = total mass of the sequences that agree with the masked state x
    sums = P
    for axis in range(L):
        sums = np.concatenate([sums, sums.sum(axis=axis, keepdims=True)], axis=axis)
    out = np.empty((len(STATES), L, V))
    for i in range(L):
        moved = np.moveaxis(sums, i, -1)[..., :V]
        rest = np.delete(STATES, i, axis=1)
        joint = moved[tuple(rest.T)]
        out[:, i] = joint / joint.sum(axis=-1, keepdims=True)
    shown = np.eye(V)[np.minimum(STATES, V - 1)]
    return np.where((STATES < V)[..., None], shown, out)


@functools.cache
def crooked():
    """A network that is no model of any joint: the exact conditionals, bent by a fixed pattern."""
    pattern = np.sin(1.7 * np.arange(len(STATES) * L * V)).reshape(-1, L, V)
    bent = conditionals() * np.exp(1.2 * pattern)
    return bent / bent.sum(axis=-1, keepdims=True)


@functools.cache
def network(name):
    """p(x0_i = v | unmasked tokens) of "oracle" or "model", `[(V+1)^L, L, V]`; one-hot where unmasked."""
    if name == "oracle":
        return conditionals()
    probs = np.eye(V)[np.minimum(STATES, V - 1)]
    probs[MASKED] = np.exp(golden("discrete_orders")["model_masked_logp"])
    return probs


def all_masked():
    """The law of the state without a token."""
    return MASKED.all(axis=1).astype(float)


def index_of(states):
    """Row of each state `[..., L]` in `STATES`."""
    return np.asarray(states) @ (V + 1) ** np.arange(L)[::-1]


def push(law, transition):
    """One step of a chain whose positions move independently given the state: `[S]`, `[S, L, V+1]`."""
    here = law > 0
    head = np.einsum("s,si,sj->sij", law[here], transition[here, 0], transition[here, 1])
    tail = np.einsum("si,sj,sk->sijk", *(transition[here, i] for i in (2, 3, 4)))
    # not by `@`: threaded BLAS crawls where the cores are busy
    return np.einsum("sij,sklm->ijklm", head, tail).reshape(-1)


def distance(a, b):
    """Total variation."""
    return 0.5 * np.abs(np.ravel(a) - np.ravel(b)).sum()


class Lookup:
    """Logits of a table over masked states, or of a `network`, with an arbitrary shift at each position."""

    def __init__(self, probs):
        probs = network(probs) if isinstance(probs, str) else probs
        logits = np.maximum(np.log(np.maximum(probs, 1e-300)), -60.0)
        self.table = jnp.asarray(logits + np.arange(L)[:, None], jnp.float32)
        self.powers = jnp.asarray((V + 1) ** np.arange(L)[::-1])

    def __call__(self, tokens, t):
        return self.table[tokens @ self.powers]


NUM = 40_000


def draws(sampler, table, seed, num=NUM):
    """How often each clean sequence is drawn, `[V^L]`; `table` as `Lookup` takes it."""
    tokens = np.asarray(sample(sampler, Lookup(table), jax.random.key(seed), num))
    assert tokens.shape == (num, L) and tokens.min() >= 0 and tokens.max() < V
    return np.bincount(tokens @ V ** np.arange(L)[::-1], minlength=V**L)


counts_of = draws


def standard_scores(counts, law):
    """Pearson's statistic in units of its deviation; cells expecting fewer than 5 are one cell."""
    expected = np.ravel(law) * counts.sum()
    small = expected < 5
    counts = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    kept = expected > 0
    assert counts[~kept].sum() == 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)
