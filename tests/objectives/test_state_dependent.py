"""GenMD4's bound: the authors' numbers, exact likelihoods with the time-dependent posterior, gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit
from token_laws import L, P, V, network

from diffusion_jax import objectives
from diffusion_jax.objectives import state_dependent as sd
from diffusion_jax.processes import Absorbing, LinearSchedule, StateMasking

G = golden("discrete_genmd4")
PROCESS = StateMasking(V, G["w"])


def lookup(table):
    table = jnp.asarray(table)
    return lambda x, t: table[x @ jnp.asarray((V + 1) ** np.arange(L)[::-1])]


def model():
    return lookup(np.log(np.maximum(network("model"), 1e-300)))


def test_the_official_numbers(x64):
    z, x0, t = (jnp.asarray(G[name]) for name in ("z_fixed", "x0", "t_fixed"))
    values, cross = sd.state_integrand(PROCESS, model(), z, x0, t)
    np.testing.assert_allclose(values, G["loss_fixed"], atol=1e-11)
    logs = PROCESS.log_prob(z, x0, t)
    np.testing.assert_allclose(logs, G["log_q_fixed"], atol=1e-12)
    pairs = sd.leave_one_out(values[:, None], values[None], logs[:, None], logs[None])
    np.testing.assert_allclose(pairs, G["reinforce_pairs"], atol=1e-11)
    np.testing.assert_allclose(
        sd.state_reconstruction(PROCESS, x0, 1e-3), G["recon_loss_t1_1e3"], atol=1e-13
    )
    assert (cross > 0).all()


SETS = np.array(list(itertools.product([False, True], repeat=L)))


def tilted_posterior(powers, eps):
    """`(x, t) -> log E[x0 | x_t]`, from the joint table: masked tokens weighted by 1 - alpha_v(t)."""
    grid = np.stack(np.unravel_index(np.arange(V**L), (V,) * L), axis=-1)
    one_hot = jnp.asarray(np.eye(V)[grid])

    def denoise(x, t):
        def one(x, t):
            masked = x == V
            log_rate = jnp.log1p(-eps) + jnp.asarray(powers) * jnp.log(t)
            agrees = ((grid == x) | masked).all(axis=1)
            weight = jnp.asarray(P.ravel()) * jnp.exp((masked * log_rate[grid]).sum(axis=1))
            joint = jnp.einsum("s,slv->lv", jnp.where(agrees, weight, 0.0), one_hot)
            return jnp.log(joint / joint.sum(axis=-1, keepdims=True))

        return jax.vmap(one)(x, jnp.broadcast_to(t, x.shape[:1]))

    return denoise


def expected_integrand(process, denoise, x0, times):
    """E over masks of the integrand, `[T, N]`, by enumeration."""
    x = np.where(SETS[None], V, x0[:, None]).reshape(-1, L)
    clean = np.broadcast_to(x0[:, None], (len(x0), *SETS.shape)).reshape(-1, L)

    @jax.jit
    def at(t):
        each = jnp.full(len(x), t)
        values, _ = sd.state_integrand(process, denoise, jnp.asarray(x), jnp.asarray(clean), each)
        chance = jnp.exp(process.log_prob(jnp.asarray(x), jnp.asarray(clean), each))
        return (chance * values).reshape(len(x0), -1).sum(axis=1)

    return np.stack([at(t) for t in times])


def test_the_exact_posterior_gives_the_likelihood(x64):
    x0 = G["x0"]
    oracle = tilted_posterior(G["w"], 1e-4)
    for i, t in enumerate(G["t"]):
        mu = jnp.exp(
            oracle(jnp.asarray(np.stack(np.unravel_index(G["oracle_mu_states"], (5,) * L), 1)), t)
        )
        masked = np.stack(np.unravel_index(G["oracle_mu_states"], (5,) * L), 1) == V
        np.testing.assert_allclose(np.asarray(mu)[masked], G["oracle_mu"][i][masked], atol=1e-10)
    for name, denoise in (("oracle", oracle), ("model", model())):
        found = expected_integrand(PROCESS, denoise, x0, G["t"])
        np.testing.assert_allclose(found, G[f"expected_loss_{name}"], atol=1e-9)
    # t = u^4 makes the integrand, which grows like t^(w - 1), smooth at 0
    nodes, weights = np.polynomial.legendre.leggauss(24)
    u, weights = (nodes + 1) / 2, weights / 2
    values = expected_integrand(PROCESS, oracle, x0, u**4)
    integral = (weights * 4 * u**3) @ values
    np.testing.assert_allclose(integral, G["integral_oracle"], atol=1e-7)
    np.testing.assert_allclose(integral + G["prior_kl"], G["nll_exact"], atol=1e-7)
    # the prior term of the library codes what is clean at t = 1 uniformly: a little more
    assert 0 < sd.state_prior(PROCESS, L) < 1e-3


def test_equal_powers_are_md4(x64):
    """The integrand of `Absorbing` with alpha = 1 - (1 - eps) t, for every mask and time."""
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.integers(0, V, (40, L)))
    t = jnp.asarray(rng.uniform(0.05, 1.0, 40))
    x = jnp.where(rng.uniform(size=(40, L)) < 0.5, V, x0)
    values, cross = sd.state_integrand(StateMasking(V, 1.0), model(), x, x0, t)
    md4 = Absorbing(V, LinearSchedule(eps_end=1e-4))
    np.testing.assert_allclose(values, md4.weight(t) * cross, rtol=1e-12)
    np.testing.assert_allclose(
        sd.state_reconstruction(StateMasking(V, 1.0), x0, 0.01),
        objectives.uniform_reconstruction(md4, L, 0.01),
        rtol=1e-12,
    )


def copying(t=None):
    """Token 0 or 1, then 2 or 3 alike. The network looks to the left only: it learns from the first."""

    def denoise(x, t):
        first = jnp.array([[0.0, 0.0, -30.0, -30.0]])
        told = jnp.where(x[:, :1] == V, 0.0, jnp.where(x[:, :1] == jnp.arange(2), 0.0, -30.0))
        second = jnp.concatenate([jnp.full((len(x), 2), -30.0), told], axis=1)
        return jnp.stack([jnp.broadcast_to(first, second.shape), second], axis=1)

    return denoise


def toy_bound(first, second):
    """Nats: log 2, and again log 2 if the copy is revealed before what it copies."""
    return np.log(2) * (1 + second / (first + second))


def test_the_gradient_goes_through_the_draws():
    """On a toy whose bound and slopes are known; without the score function they are wrong."""
    tokens = jnp.asarray(np.tile([[0, 2], [1, 3]], (30_000, 1)), jnp.int32)

    def loss(powers, key):
        process = StateMasking(
            V, jnp.stack([powers[0], powers[0], powers[1], powers[1]]), t_min=1e-3
        )
        losses, _ = sd.state_masked_loss(process, copying(), key, tokens)
        return losses.mean()

    slope = quick_jit(jax.value_and_grad(loss))
    for first, second in ((1.0, 1.0), (3.0, 1.5)):
        found = [slope(jnp.array([first, second]), jax.random.key(i)) for i in range(4)]
        values, slopes = (np.array([np.asarray(v[i]) for v in found]) for i in (0, 1))
        assert values.mean() == pytest.approx(toy_bound(first, second), rel=0.02)
        total = (first + second) ** 2
        exact = np.log(2) * np.array([-second, first]) / total
        assert np.abs(slopes.mean(axis=0) - exact).max() < 0.025, slopes.mean(axis=0)


def test_the_value_does_not_hold_the_surrogate():
    x0 = jnp.asarray(G["x0"], jnp.int32)
    run = lambda: sd.state_masked_loss(PROCESS, model(), jax.random.key(0), x0)[0]
    losses = quick_jit(run)()
    assert losses.shape == (5,) and np.isfinite(losses).all()
    with jax.debug_key_reuse(True):
        np.testing.assert_allclose(quick_jit(run)(), losses)


def test_powers_part_where_one_kind_of_token_can_be_predicted():
    """The kind that tells the other is masked late: the bound falls from 1.5 log 2 towards log 2."""
    tokens = jnp.asarray(np.tile([[0, 2], [1, 3]], (256, 1)), jnp.int32)

    def loss(raw, key):
        process = StateMasking(V, jax.nn.softplus(raw))
        return sd.state_masked_loss(process, copying(), key, tokens)[0].mean()

    slope = quick_jit(jax.grad(loss))
    raw = jnp.full(V, np.log(np.expm1(1.0)))
    for step in range(150):
        raw = raw - 0.1 * slope(raw, jax.random.key(step))
    powers = np.asarray(jax.nn.softplus(raw))
    assert powers[:2].min() > 1.3 and powers[2:].max() < 0.7
    assert toy_bound(powers[:2].mean(), powers[2:].mean()) < 1.3 * np.log(2)
