"""The masked bound: the authors' integrands, and exact likelihoods by enumeration."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import objectives, oracles
from diffusion_jax.processes import (
    Absorbing,
    CosineAlphaSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    PolynomialSchedule,
)

SCHEDULES = {
    "mdlm_nelbo": LinearSchedule(eps_end=1e-3),
    "lambda_dce": LinearSchedule(),
    "nelbo_md4_linear": LinearSchedule(1e-4, 1e-4),
    "nelbo_md4_cosine": CosineSchedule(1e-4, 1e-4),
    "nelbo_md4_poly3": PolynomialSchedule(3.0, 1e-4, 1e-4),
    "nelbo_geometric": GeometricSchedule(1e-4, 20.0),
    "nelbo_mdlm_cosine": CosineAlphaSchedule(eps_end=1e-3),
}

# A table of three tokens over three symbols that does not factorise.
V, L = 3, 3
TABLE = np.random.default_rng(3).gamma(0.6, size=(V,) * L) + 0.02
TABLE /= TABLE.sum()
SEQUENCES = np.array(list(itertools.product(range(V), repeat=L)))


def golden_losses():
    stored = golden("processes_discrete").items()
    return {k.removeprefix("loss_"): v for k, v in stored if k.startswith("loss_")}


@pytest.mark.parametrize("network", ["oracle", "model"])
def test_integrands_of_the_official_codes(network, x64):
    g = golden_losses()
    with np.errstate(divide="ignore"):
        logits = np.log(g["cond"]) if network == "oracle" else g["model_logits"]
    summed = objectives.masked_sum(jnp.asarray(logits), jnp.asarray(g["x0"]), g["mask"])
    exact = np.where(g["mask"], g[f"{network}_ce"], 0.0).sum(axis=1)
    np.testing.assert_allclose(summed, exact, atol=1e-9)
    for name, schedule in SCHEDULES.items():
        integrand = Absorbing(4, schedule).weight(g["t"]) * summed
        np.testing.assert_allclose(integrand, g[f"{network}_{name}"], atol=1e-9, rtol=1e-9)


def test_the_loss_of_given_masks_and_times(x64, monkeypatch):
    """The same numbers through the loss itself, with the goldens' masks in place of drawn ones."""
    g = golden_losses()
    x_t, times = jnp.asarray(g["x_t"]), jnp.asarray(g["t"])
    monkeypatch.setattr(Absorbing, "corrupt", lambda self, keys, tokens, t: x_t)
    seen = []

    def denoise(tokens, t):
        seen.append((tokens, t))
        return jnp.asarray(g["model_logits"])

    losses, aux = objectives.masked_cross_entropy(
        Absorbing(4, SCHEDULES["nelbo_md4_cosine"]),
        denoise,
        jax.random.key(0),
        jnp.asarray(g["x0"]),
        times=lambda process, key, index, total: (times, jnp.ones(8)),
    )
    np.testing.assert_allclose(losses, g["model_nelbo_md4_cosine"], atol=1e-9)
    count = g["mask"].sum(axis=1)
    np.testing.assert_allclose(aux["masked"], count / 5)
    mean = np.where(g["mask"], g["model_ce"], 0.0).sum(axis=1) / np.maximum(count, 1)
    np.testing.assert_allclose(aux["cross_entropy"], mean, atol=1e-9)
    assert len(seen) == 1 and (seen[0][0] == x_t).all() and (seen[0][1] == times).all()


def cross_entropy_of_each_mask():
    """Summed cross-entropy of the exact model, `[sequence, mask set]`, and the sets' sizes."""
    oracle = oracles.token_table(TABLE)
    masks = np.array(list(itertools.product([False, True], repeat=L)))
    tokens = np.where(masks[None], V, SEQUENCES[:, None])
    flat = jnp.asarray(tokens.reshape(-1, L))
    clean = jnp.asarray(np.repeat(SEQUENCES, len(masks), axis=0))
    summed = quick_jit(lambda x, c: objectives.masked_sum(oracle(x, 0.5), c, x == V))(flat, clean)
    return np.asarray(summed, float).reshape(len(SEQUENCES), -1), masks.sum(axis=1)


def quadrature(count):
    """Nodes and weights on [0, 1] that crowd at both ends."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    u, w = 0.5 * (nodes + 1.0), 0.5 * weights
    return u**2 * (3.0 - 2.0 * u), w * 6.0 * u * (1.0 - u)


def expected(schedule, summed, sizes, low=0.0):
    """The integral over t in [low, 1] of w(t) E[sum over masked positions], by enumeration of masks."""
    process = Absorbing(V, schedule)
    u, w = quadrature(400)
    t = low + (1.0 - low) * u
    rate = process.mask_rate(t)[:, None]
    chance = rate**sizes * (1.0 - rate) ** (L - sizes)  # of each mask set
    integrand = process.weight(t)[:, None] * (chance @ summed.T)
    return (1.0 - low) * w @ integrand


@pytest.mark.parametrize(
    "schedule",
    [LinearSchedule(), CosineSchedule(), CosineAlphaSchedule(), PolynomialSchedule(2.0)],
    ids=lambda s: type(s).__name__,
)
def test_the_bound_of_the_exact_model_is_the_likelihood_of_every_sequence(schedule):
    bound = expected(schedule, *cross_entropy_of_each_mask())
    np.testing.assert_allclose(bound, -np.log(TABLE[tuple(SEQUENCES.T)]), rtol=3e-6)


@pytest.mark.parametrize("times", ["uniform", "independent"])
def test_the_loss_is_an_unbiased_estimate_of_the_bound(times):
    process = Absorbing(V, CosineSchedule(), t_min=0.01)
    each = 600
    tokens = jnp.asarray(np.tile(SEQUENCES, (each, 1)), jnp.int32)
    oracle = oracles.token_table(TABLE)
    losses, aux = quick_jit(
        lambda key, tokens: objectives.masked_cross_entropy(
            process, oracle, key, tokens, times=times
        )
    )(jax.random.key(0), tokens)
    assert losses.dtype == jnp.float32 and losses.shape == (each * 27,)
    assert float(aux["t"].min()) >= 0.01
    exact = expected(CosineSchedule(), *cross_entropy_of_each_mask(), low=0.01)
    # all sequences together, and each alone
    values = np.asarray(losses, float).reshape(each, 27)
    error = values.std() / np.sqrt(values.size)
    assert values.mean() == pytest.approx(exact.mean(), abs=4 * error)
    errors = values.std(axis=0) / np.sqrt(each)
    assert (np.abs(values.mean(axis=0) - exact) < 4.5 * errors).all()


def test_no_gradient_at_the_exact_model():
    process = Absorbing(V, t_min=0.02)
    oracle = oracles.token_table(TABLE)
    # sequences in the proportions of the table
    rows = np.random.default_rng(0).choice(27, 8192, p=TABLE.ravel())
    tokens = jnp.asarray(SEQUENCES[rows], jnp.int32)

    def losses(theta, key, tokens):
        def denoise(x, t):
            logits = jnp.maximum(oracle(x, t), -30.0)
            return logits + theta[0] * jnp.arange(V) + theta[1] * jnp.array([1.0, 0.0, -2.0]) * t[0]

        return objectives.masked_cross_entropy(process, denoise, key, tokens)[0]

    slopes = np.asarray(quick_jit(jax.jacfwd(losses))(jnp.zeros(2), jax.random.key(1), tokens))
    error = slopes.std(axis=0) / np.sqrt(len(slopes))
    assert (np.abs(slopes.mean(axis=0)) < 4 * error).all() and (error > 0).all()


def test_halves_of_a_batch_have_the_losses_of_the_whole():
    tokens = jnp.asarray(SEQUENCES[:8], jnp.int32)
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((V + 1, V)), jnp.float32)

    @quick_jit
    def losses(tokens, index):
        return objectives.masked_cross_entropy(
            Absorbing(V), lambda x, t: logits[x], jax.random.key(2), tokens, index=index, total=8
        )[0]

    index = jnp.arange(8)
    whole = losses(tokens, index)
    halves = [losses(tokens[s], index[s]) for s in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, rtol=1e-6)
    assert len(np.unique(whole)) > 4


def test_masked_sum_by_hand():
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]]]))
    tokens = jnp.array([[0, 1, 1]])
    masked = jnp.array([[True, False, True]])
    got = objectives.masked_sum(
        logits + 3.0, tokens, masked
    )  # a shift of the logits changes nothing
    np.testing.assert_allclose(got, [-np.log(0.5) - np.log(0.8)], rtol=1e-6)
    low = objectives.masked_sum(logits.astype(jnp.bfloat16), tokens, masked)
    assert low.dtype == jnp.float32
    nothing = objectives.masked_sum(logits, tokens, jnp.zeros((1, 3), bool))
    np.testing.assert_array_equal(nothing, [0.0])


def test_impossible_tokens_leave_the_gradient_finite():
    """An oracle gives -inf to what cannot be; positions that are not masked must not leak it."""
    tokens, masked = jnp.array([[0, 1]]), jnp.array([[True, False]])

    def loss(shift):
        logits = jnp.array([[[0.0, 0.3], [0.0, -jnp.inf]]]) + shift
        return objectives.masked_sum(logits, tokens, masked).sum()

    value, slope = quick_jit(jax.value_and_grad(loss))(jnp.array([0.1, 0.2]))
    assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize(
    "tokens, denoise, words",
    [
        ([[0, 3]], None, r"tokens must lie in 0..2; got 0..3"),
        ([[0.0, 1.0]], None, r"integer array \[B, L\]"),
        ([0, 1], None, r"integer array \[B, L\]"),
        ([[0, 1]], lambda x, t: jnp.zeros((1, 3, 3)), r"logits of shape \(1, 3, 3\) do not fit"),
    ],
)
def test_errors(tokens, denoise, words):
    with pytest.raises(ValueError, match=words):
        objectives.masked_cross_entropy(
            Absorbing(3), denoise or (lambda x, t: x), jax.random.key(0), jnp.asarray(tokens)
        )
