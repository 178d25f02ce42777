"""Score entropy and the continuous-time bounds made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax.objectives.masked import masked_cross_entropy
from diffusion_jax.objectives.score_entropy import (
    denoising_score_entropy,
    leave_one_out_bound,
    prior_kl,
    score_entropy,
)
from diffusion_jax.processes import (
    Absorbing,
    GeometricSchedule,
    LinearSchedule,
    Uniform,
    ctmc,
    scores,
)

STORED = golden("discrete_chains")
P = golden("discrete_table")["p"]
V, L = 4, 5
MASKED = Absorbing(V, LinearSchedule(eps_end=1e-3))


def finite(log_probs):
    return np.where(np.isfinite(log_probs), log_probs, -1e3)


def test_absorbing_scores_that_are_not_normalised():
    x0, xt, t = (STORED[f"losses_{n}"] for n in ("x0", "x_t", "t"))
    log_probs = finite(STORED["losses_model_logp"]) + STORED["losses_score_offset"][..., None]
    log_score = log_probs + scores.score_scalar(MASKED, t)[:, None, None]
    got = MASKED.rate(t)[:, None] * score_entropy(MASKED, log_score, x0, xt, t)
    expected = STORED["losses_sedd_dse_unnormalised_per_token"]
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-11)
    # in float32 without the cancellation of its written form
    low = score_entropy(MASKED, log_score.astype(np.float32), x0, xt, t)
    np.testing.assert_allclose(MASKED.rate(t)[:, None] * low, expected, rtol=2e-5, atol=2e-5)


def test_normalised_scores_give_the_masked_integrand():
    """RADD's DSE = MDLM's integrand, by the golden and by the library's own masked loss."""
    x0, xt, t = (STORED[f"losses_{n}"] for n in ("x0", "x_t", "t"))
    log_score = scores.concrete_score(MASKED, finite(STORED["losses_model_logp"]), xt, t)
    got = (MASKED.rate(t)[:, None] * score_entropy(MASKED, log_score, x0, xt, t)).sum(axis=1)
    np.testing.assert_allclose(got, STORED["losses_model_dse"], rtol=1e-12)
    np.testing.assert_allclose(got, STORED["losses_model_mdlm_nelbo"], rtol=1e-12)


@pytest.mark.parametrize("k", range(4))
def test_uniform_scores(k):
    process = Uniform(V, GeometricSchedule(1e-3, 10.0))
    t = np.log(STORED["uniform_sigma"][k] / 1e-3) / np.log(1e4)
    states = np.stack(np.unravel_index(STORED["uniform_x_t_index"], (V,) * L), axis=1)
    pattern = 0.2 * np.sin(np.arange(V)) * (np.arange(V) != states[..., None])
    log_score = np.log(STORED["uniform_score"][k]) + pattern
    for x0, expected in zip(STORED["uniform_x0"], STORED["uniform_dse_perturbed_score"][k]):
        tokens = np.broadcast_to(x0, states.shape)
        for chain in (process, ctmc(V, "uniform", process.schedule)):
            got = score_entropy(chain, log_score, tokens, states, t)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


def test_udlms_bound():
    tokens, xt, t, logp = (STORED[f"uniform_udlm_{n}"] for n in ("x0", "xt", "t", "logp"))
    process = Uniform(V)

    def loss(log_probs, parameterization="leave_one_out"):
        log_score = scores.concrete_score(process, log_probs, xt, t, parameterization)
        return process.rate(t)[:, None] * score_entropy(process, log_score, tokens, xt, t)

    expected = STORED["uniform_udlm_loss_per_token"]
    np.testing.assert_allclose(loss(logp), expected, rtol=0, atol=1e-12)
    full = scores.posterior(process, logp, xt, t)
    np.testing.assert_allclose(loss(full, "posterior"), expected, rtol=0, atol=1e-12)
    assert np.abs(loss(full) - expected).max() > 0.1  # the wrong reading is another loss


def test_likelihood_is_the_integral_of_the_score_entropy():
    """-log p(x0), from exact scores: the integral of sigma' E[DSE], and the prior's term."""
    process = Uniform(V, GeometricSchedule(1e-8, 12.0))
    states = np.indices((V,) * L).reshape(L, -1).T
    nodes, weights = np.polynomial.legendre.leggauss(48)
    total = np.zeros(6)
    for node, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights):
        keep = process.alpha(node) * np.eye(V) + process.mask_rate(node) / V
        law = P
        for axis in range(L):
            law = np.moveaxis(np.tensordot(keep, law, (1, axis)), 0, axis)
        log_score = np.empty((len(states), L, V))
        for i in range(L):
            row = np.moveaxis(law, i, -1)[tuple(np.delete(states, i, axis=1).T)]
            log_score[:, i] = np.log(row / row[np.arange(len(states)), states[:, i], None])
        for n, x0 in enumerate(STORED["uniform_x0"]):
            noisy = np.prod([keep[x0[i], states[:, i]] for i in range(L)], axis=0)
            dse = score_entropy(process, log_score, np.tile(x0, (len(states), 1)), states, node)
            total[n] += weight * process.rate(node) * noisy @ dse.sum(axis=1)
    total += prior_kl(process, STORED["uniform_x0"]).sum(axis=1)
    np.testing.assert_allclose(
        total, STORED["uniform_nll_exact"], rtol=0, atol=1e-5
    )  # sigma_min cuts off 1e-6


@pytest.mark.parametrize(
    "process", (Uniform(V, LinearSchedule(eps_end=0.01)), ctmc(V, "nearest_neighbour"))
)
def test_prior_term(process):
    rows = process.matrix(1.0) if hasattr(process, "matrix") else None
    if rows is None:
        rows = process.alpha(1.0) * np.eye(V) + process.mask_rate(1.0) / V
    expected = (rows * np.log(rows * V)).sum(axis=1)
    np.testing.assert_allclose(prior_kl(process, np.arange(V)[None])[0], expected, atol=1e-12)


def network(x, t):
    """Logits that depend on neighbours and time."""
    near = jax.nn.one_hot(jnp.roll(x, 1, axis=1) % V, V)
    return 1.5 * near + jnp.arange(V) * 0.2 + t[:, None, None]


def batch(num=64):
    return jax.random.randint(jax.random.key(5), (num, L), 0, V)


def test_losses_of_a_masked_model_agree_draw_by_draw():
    """The general bound on an absorbing process is `masked_cross_entropy`, masks and times included."""
    tokens, key = batch(), jax.random.key(0)
    process = Absorbing(V)
    general, aux = quick_jit(lambda k: leave_one_out_bound(process, network, k, tokens))(key)
    own, _ = quick_jit(lambda k: masked_cross_entropy(process, network, k, tokens))(key)
    np.testing.assert_allclose(general, own, rtol=2e-5)
    assert aux["per_token"].shape == tokens.shape and (aux["changed"] <= 1).all()
    as_posterior, _ = quick_jit(
        lambda k: leave_one_out_bound(process, network, k, tokens, parameterization="posterior")
    )(key)
    np.testing.assert_allclose(as_posterior, own, rtol=2e-5)


@pytest.mark.parametrize("kind", ("absorbing", "uniform", "ctmc"))
def test_gradients_are_finite_and_scores_of_the_network_are_its_bound(kind):
    schedule = LinearSchedule(eps_end=1e-3)
    process = {
        "absorbing": Absorbing(V, schedule),
        "uniform": Uniform(V, schedule),
        "ctmc": ctmc(V, "nearest_neighbour", schedule),
    }[kind]
    tokens, key = batch(), jax.random.key(1)

    def scored(shift):
        def log_score(x, t):
            logits = network(x, t) + shift * jnp.arange(V)
            return scores.concrete_score(process, logits, x, t)

        return denoising_score_entropy(process, log_score, key, tokens)[0].mean()

    def plain(shift):
        def logits(x, t):
            return network(x, t) + shift * jnp.arange(V)

        return leave_one_out_bound(process, logits, key, tokens)[0].mean()

    a, b = (quick_jit(jax.value_and_grad(f))(0.1) for f in (scored, plain))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert np.isfinite(a).all() and a[0] > 0 and a[1] != 0


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: denoising_score_entropy(Uniform(V), network, jax.random.key(0), batch()),
            r"needs finite total noise, but alpha\(1\) = 0: give the schedule an eps_end",
        ),
        (
            lambda: leave_one_out_bound(
                Uniform(V), lambda x, t: jnp.zeros((*x.shape, 7)), jax.random.key(0), batch()
            ),
            "logits of shape",
        ),
        (
            lambda: leave_one_out_bound(Uniform(V), network, jax.random.key(0), batch() + 1),
            r"tokens must lie in 0..3; got 1..4",
        ),
        (lambda: prior_kl(Absorbing(V), batch()), "no prior term for Absorbing"),
        (
            lambda: score_entropy(MASKED, jnp.zeros((2, L, V + 1)), batch(2), batch(2), 0.5),
            "does not fit tokens",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
