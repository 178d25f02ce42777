"""Chains on tokens given by rates or matrices: goldens, special cases, semigroup, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax.processes import (
    Absorbing,
    GeometricSchedule,
    LinearSchedule,
    Uniform,
    ctmc,
    d3pm,
    mask_replace,
    scores,
)
from diffusion_jax.processes.ctmc import absorbing_rates, exponential, nearest_neighbour_rates

STORED = golden("discrete_chains")
K, T = 5, 8
LOGLINEAR = LinearSchedule(eps_end=1e-3)


def chain(name, dtype="float64"):
    clean = K - 1 if name == "absorbing" else K
    options = {"beta_min": 0.05, "beta_max": 0.6} if name == "gaussian" else {}
    return d3pm(clean, name, T, dtype=dtype, **options)


def softmax(logits):
    return np.exp(scores.log_softmax(np.asarray(logits, np.float64)))


def ring(size):
    """A walk that only goes round: complex eigenvalues."""
    return np.roll(np.eye(size), 1, axis=1) - np.eye(size)


def random_rates(size, seed=1):
    rates = np.random.default_rng(seed).exponential(size=(size, size)) ** 3
    np.fill_diagonal(rates, 0.0)
    return rates - np.diag(rates.sum(axis=1))


@pytest.mark.parametrize("name", ("absorbing", "uniform", "gaussian"))
def test_d3pm_is_the_papers(name):
    process = chain(name)
    np.testing.assert_allclose(process.steps, STORED[f"d3pm_{name}_Q"], rtol=0, atol=1e-14)
    np.testing.assert_allclose(process.cumulative[1:], STORED[f"d3pm_{name}_Qbar"], atol=1e-14)
    tokens, probs = np.arange(K), softmax(STORED[f"d3pm_{name}_logits"])
    for i, k in enumerate(STORED[f"d3pm_{name}_k"]):
        t, s = (k + 1) / T, k / T
        row = process.reverse_row(t, s)
        posterior = STORED[f"d3pm_{name}_posterior"][i]
        for x0 in range(process.vocab_size):
            one_hot = np.tile(np.eye(K)[x0], (K, 1))
            got = process.kernel.reverse(row, one_hot, tokens)
            possible = process.cumulative[k + 1][x0] > 0
            np.testing.assert_allclose(got[possible], posterior[possible, x0], rtol=0, atol=1e-12)
        if k:  # at k = 0 the stored p_theta is the softmax itself
            got = process.reverse_probs(probs, tokens, t, s)
            expected = STORED[f"d3pm_{name}_p_theta"][i]
            possible = np.isfinite(expected).all(axis=-1)
            np.testing.assert_allclose(got[possible], expected[possible], rtol=0, atol=1e-12)


def test_gaussian_chains_are_symmetric_and_local():
    steps = d3pm(7, "gaussian", 4, beta_min=0.01, beta_max=0.2, dtype="float64").steps
    np.testing.assert_allclose(steps, np.swapaxes(steps, 1, 2), atol=1e-15)
    np.testing.assert_allclose(steps.sum(axis=2), 1.0, atol=1e-14)
    assert (np.diff(steps[2, 0]) < 0).all() and (np.diff(steps[:, 3, 3]) < 0).all()


@pytest.mark.parametrize("name", ("absorbing", "uniform", "gaussian", "nearest_neighbour"))
def test_traced_steps_of_a_finite_chain_are_those_of_the_host(name):
    process = d3pm(4, name, 6, **({} if name in ("absorbing", "uniform") else {"beta_max": 0.3}))
    size, rng = process.num_states, np.random.default_rng(0)
    tokens = rng.integers(0, size, (3, 5)).astype(np.int32)
    probs = rng.dirichlet(np.ones(4), size=(3, 5)).astype(np.float32)
    k = np.array([1, 3, 6])

    @quick_jit
    def traced(t, s, tokens, probs):
        return process.reverse_probs(probs, tokens, t, s), process.likelihood(tokens, t)

    got, seen = traced(*(jnp.asarray(v, jnp.float32) for v in (k / 6, (k - 1) / 6)), tokens, probs)
    for i, n in enumerate(k):
        expected = process.reverse_probs(probs[i], tokens[i], n / 6, (n - 1) / 6)
        np.testing.assert_allclose(got[i], expected, atol=2e-6)
        expected = process.cumulative[n][:4, tokens[i]].T
        np.testing.assert_allclose(seen[i], expected, atol=1e-7)


def test_steps_that_skip_entries_are_products():
    process = chain("gaussian")
    np.testing.assert_allclose(process.matrix(1.0, 0.25), np.linalg.multi_dot(process.steps[2:]))
    np.testing.assert_allclose(
        process.cumulative[2] @ process.matrix(1.0, 0.25), process.cumulative[8], atol=1e-14
    )


def test_mask_and_replace_is_vq_diffusions():
    process = mask_replace(5, 8)
    stored = np.stack([STORED[f"d3pm_vq_{n}"] for n in ("at", "bt", "ct")], axis=1)
    np.testing.assert_allclose(process.steps, stored, rtol=0, atol=1e-15)
    stored = np.stack([STORED[f"d3pm_vq_{n}"] for n in ("att", "btt", "ctt")], axis=1)
    np.testing.assert_allclose(process.cumulative[1:], stored, rtol=0, atol=1e-15)
    xt, k = STORED["d3pm_cdcd_xt"], int(STORED["d3pm_cdcd_k"])
    t, s = (k + 1) / 8, k / 8
    loo = scores.leave_one_out(process, STORED["d3pm_cdcd_logp"], xt, t)
    got = process.reverse_probs(np.exp(loo), xt, t, s)
    # the authors' floors of 1e-30 show at 4e-12
    np.testing.assert_allclose(got, STORED["d3pm_cdcd_p_theta"], rtol=0, atol=1e-10)


def test_mask_and_replace_agrees_with_its_matrices():
    """The closed form against the chain of the same matrices, skipping steps and traced."""
    scalars = mask_replace(3, 4, keep_ends=(0.9, 0.05), mask_ends=(0.05, 0.8))
    steps = []
    for keep, replace, mask in scalars.steps:
        q = np.diag(np.append(np.full(3, keep), 1.0))
        q[:3, :3] += replace
        q[:3, 3] = mask
        steps.append(q)
    matrices = d3pm(3, np.array(steps), dtype="float64")
    rng = np.random.default_rng(0)
    probs, tokens = rng.dirichlet(np.ones(3), size=8), np.array([0, 1, 2, 3, 3, 2, 1, 0])
    for t, s in ((1.0, 0.25), (0.5, 0.0), (0.75, 0.5)):
        got = scalars.reverse_probs(probs, tokens, t, s)
        np.testing.assert_allclose(got, matrices.reverse_probs(probs, tokens, t, s), atol=1e-13)
    both = [
        quick_jit(
            lambda t, p=p: p.reverse_probs(
                probs.astype(np.float32)[None], tokens[None], t, t - 0.25
            )
        )(jnp.array([0.75]))
        for p in (scalars, matrices)
    ]
    np.testing.assert_allclose(both[0], both[1], atol=1e-6)
    np.testing.assert_allclose(
        both[0][0], scalars.reverse_probs(probs, tokens, 0.75, 0.5), atol=1e-6
    )


@pytest.mark.parametrize("t, s", [(0.9, 0.5), (1.0, 0.97), (0.2, 0.0), (0.6, None)])
def test_absorbing_and_uniform_are_special_cases(t, s):
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), size=6)
    for own, general, tokens in (
        (Absorbing(4, LOGLINEAR), ctmc(4, "absorbing", LOGLINEAR), np.array([4, 4, 4, 1, 2, 4])),
        (Uniform(4, LOGLINEAR), ctmc(4, "uniform", LOGLINEAR), np.array([0, 1, 2, 3, 0, 1])),
    ):
        rows = [p.kernel.reverse(p.reverse_row(t, s), probs, tokens) for p in (own, general)]
        np.testing.assert_allclose(rows[1], rows[0], rtol=0, atol=1e-10)
        logs, masked = np.log(probs), np.isin(tokens, 4) | (own.num_states == 4)
        width = own.vocab_size
        a, b = (p.log_score(logs, tokens, t)[masked][:, :width] for p in (own, general))
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-10)
        if s is not None:
            scored = np.exp(general.log_score(logs, tokens, t))
            a = own.kernel.analytic(own.analytic_row(t, s), scored[:, :width], tokens)
            b = general.kernel.analytic(general.analytic_row(t, s), scored, tokens)
            np.testing.assert_allclose(b[masked], a[masked], rtol=0, atol=1e-10)
    np.testing.assert_allclose(ctmc(4, "absorbing").prior_probs, [0, 0, 0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(ctmc(4, "uniform").prior_probs, 0.25, atol=1e-12)


@pytest.mark.parametrize(
    "rates", (random_rates(9), ring(9), nearest_neighbour_rates(9), absorbing_rates(8))
)
def test_traced_exponentials(rates):
    """A time an example, against SciPy's exponential: relative 5e-6 where probabilities exceed 1e-9."""
    size = len(rates)
    process = ctmc(8, rates, GeometricSchedule(1e-4, 20.0))
    times = np.linspace(0.0, 1.0, 9, dtype=np.float32)
    tokens = np.tile(np.arange(size, dtype=np.int32), (9, 1))
    got = np.asarray(quick_jit(lambda t: process.rows(tokens, t))(times), np.float64)
    sigma = [float(process.sigma_bar(jnp.float32(t))) for t in times]
    exact = np.stack([scipy.linalg.expm(v * rates) for v in sigma])
    np.testing.assert_allclose(got, exact, rtol=0, atol=5e-7)
    for v, expected in zip(sigma, exact):
        np.testing.assert_allclose(exponential(rates, v), expected, rtol=0, atol=1e-11)
    large = exact > 1e-9
    np.testing.assert_allclose(got[large], exact[large], rtol=5e-6)
    seen = quick_jit(lambda t: process.likelihood(tokens, t))(times)
    np.testing.assert_allclose(seen, np.swapaxes(exact, 1, 2)[..., :8], atol=5e-7)


def test_matrices_compose_and_forget():
    process = ctmc(5, random_rates(5), GeometricSchedule(1e-3, 30.0))
    np.testing.assert_allclose(
        process.matrix(0.4) @ process.matrix(0.7, 0.4), process.matrix(0.7), atol=1e-13
    )
    np.testing.assert_allclose(process.matrix(1.0), np.tile(process.prior_probs, (5, 1)), atol=1e-9)
    np.testing.assert_allclose(process.prior_probs @ process.rates, 0.0, atol=1e-12)


@pytest.mark.parametrize(
    "process",
    [
        ctmc(4, random_rates(4), GeometricSchedule(1e-2, 2.0)),
        d3pm(4, "gaussian", 6, beta_max=0.3),
        mask_replace(4, 6),
    ],
)
def test_corruption_follows_the_marginal(process):
    num = 4000
    tokens = jnp.tile(jnp.arange(4), (num, 1))
    keys = jax.random.split(jax.random.key(0), num)
    t = jnp.full(num, 0.5)
    xt = np.asarray(quick_jit(process.corrupt)(keys, tokens, t))
    every = np.arange(process.num_states)
    exact = process.likelihood(every, 0.5)  # [S, V]
    counts = np.stack([np.bincount(xt[:, v], minlength=len(every)) for v in range(4)], axis=1)
    error = 4.5 * np.sqrt(exact * (1 - exact) / num) + 1e-4
    assert (np.abs(counts / num - exact) < error).all()
    prior = np.asarray(process.prior(jax.random.key(1), (5, 400)))
    assert prior.shape == (5, 400) and prior.min() >= 0 and prior.max() < process.num_states


# Posteriors, leave-one-out posteriors, scores


def states():
    return np.stack(np.unravel_index(STORED["uniform_x_t_index"], (4,) * 5), axis=1)


def time_of(sigma):
    return np.log(sigma / 1e-3) / np.log(1e4)


GEOMETRIC = Uniform(4, GeometricSchedule(1e-3, 10.0))


@pytest.mark.parametrize("k", range(4))
def test_posteriors_scores_and_reverse_steps_of_the_uniform_chain(k):
    """Bayes' rule both ways, the concrete score, and three equal reverse steps."""
    t, s, tokens = (
        time_of(STORED["uniform_sigma"][k]),
        time_of(STORED["uniform_sigma_s"][k]),
        states(),
    )
    loo, full = (STORED[f"uniform_posterior_{n}"][k] for n in ("leave_one_out", "full"))
    ratio = STORED["uniform_score"][k]
    close = lambda got, expected: np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    with np.errstate(divide="ignore"):
        log_loo, log_full = np.log(loo), np.log(full)
    close(np.exp(scores.leave_one_out(GEOMETRIC, log_full, tokens, t)), loo)
    close(np.exp(scores.posterior(GEOMETRIC, log_loo, tokens, t)), full)
    close(np.exp(scores.concrete_score(GEOMETRIC, log_loo, tokens, t)), ratio)
    close(np.exp(scores.concrete_score(GEOMETRIC, log_full, tokens, t, "posterior")), ratio)
    close(np.exp(scores.conditional(GEOMETRIC, np.log(ratio), tokens, t)), loo)
    close(GEOMETRIC.reverse_probs(loo, tokens, t, s), STORED["uniform_reverse_mixture_full"][k])
    got = GEOMETRIC.kernel.analytic(GEOMETRIC.analytic_row(t, s), ratio, tokens)
    close(got, STORED["uniform_reverse_sedd_analytic"][k])
    general = ctmc(4, "uniform", GEOMETRIC.schedule)
    got = general.kernel.analytic(general.analytic_row(t, s), ratio, tokens)
    close(got, STORED["uniform_reverse_sedd_analytic"][k])


def test_absorbing_scores_are_conditionals_times_a_scalar():
    process, rng = Absorbing(4, LOGLINEAR), np.random.default_rng(0)
    logits, tokens = rng.normal(size=(3, 5, 4)), np.full((3, 5), 4)
    t = np.array([0.1, 0.5, 0.9])
    log_score = scores.concrete_score(process, logits, tokens, t)
    sigma = process.sigma_bar(t)[:, None, None]
    expected = softmax(logits) * np.exp(-sigma) / (1.0 - np.exp(-sigma))
    np.testing.assert_allclose(np.exp(log_score), expected, rtol=1e-12)
    np.testing.assert_allclose(
        scores.conditional(process, log_score + 0.3, tokens, t),
        scores.log_softmax(logits),
        rtol=1e-9,
    )


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ctmc(3, np.eye(3)), r"row 0 of rates sums to 1, rows must sum to 0"),
        (lambda: ctmc(3, random_rates(3).T), "the columns do: transpose it"),
        (lambda: ctmc(2, [[1.0, -1.0], [1.0, -1.0]]), r"rates\[0, 1\] = -1: rates between states"),
        (lambda: ctmc(3, np.zeros((3, 3))), "rates are all 0"),
        (lambda: ctmc(3, np.zeros((3, 2))), r"square matrix \[S, S\], got shape \(3, 2\)"),
        (lambda: ctmc(9, random_rates(4)), "rates have 4 states for vocab_size = 9"),
        (
            lambda: ctmc(4, scipy.linalg.block_diag(ring(2), ring(2))),
            "more than one stationary law",
        ),
        (lambda: ctmc(3, "unifrom"), "did you mean 'uniform'"),
        (lambda: ctmc(3, prior=[0.5, 0.5]), "prior must be 3 probabilities"),
        (lambda: d3pm(3, "gauss"), "did you mean 'gaussian'"),
        (lambda: d3pm(3, "uniform", 0), "num_steps = 0 must be a positive int"),
        (lambda: d3pm(3, np.ones((2, 3, 3))), "rows of transition matrices must be probabilities"),
        (lambda: d3pm(5, np.eye(3)[None]), "matrices have 3 states for vocab_size = 5"),
        (lambda: mask_replace(3, 4, keep_ends=(0.1, 0.9)), "keep must fall"),
        (lambda: mask_replace(3, 4, keep_ends=(0.9, 0.5)), "sum at most 1"),
        (lambda: mask_replace(1, 4), "vocab_size = 1 must be an int of at least 2"),
        (
            lambda: scores.leave_one_out(
                GEOMETRIC, np.zeros((1, 4)), np.zeros(1, int), 0.5, "full"
            ),
            "parameterization must be one of leave_one_out, posterior; got 'full'",
        ),
        (
            lambda: ctmc(3, 40.0 * ring(3)).analytic_row(0.99, 0.0),
            "float64 cannot: take more steps",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
