"""Exact likelihoods against the authors' losses, enumerated on the golden table (float64)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from token_laws import L, V, index_of, network

from diffusion_jax.evaluation import mask_sets as ms
from diffusion_jax.processes import Absorbing, LinearSchedule, PolynomialSchedule

P = Absorbing(V)
EXACT = {"atol": 1e-12, "rtol": 1e-12}
_POWERS = (V + 1) ** np.arange(L)[::-1]


def lookup(name):
    """A table as a denoiser, with another shift of the logits in every state."""
    logits = np.log(np.maximum(network(name), 1e-300))
    table = jnp.asarray(logits + np.arange(len(logits))[:, None, None] % 7)
    return lambda x, t: table[x @ jnp.asarray(_POWERS)]


@functools.cache
def values(name, rows="all"):
    g = golden("discrete_likelihood")
    tokens = g["x0"]
    if rows != "all":
        tokens = np.stack(np.unravel_index(g["ce_by_mask_rows"], (V,) * L), axis=-1)
    with jax.enable_x64(True):
        return ms.cross_entropies(P, lookup(name), tokens)


both = pytest.mark.parametrize("name", ["oracle", "model"])


@both
def test_cross_entropies_of_every_mask_set(name):
    g, found = golden("discrete_likelihood"), values(name, "some")
    np.testing.assert_allclose(found.sum(axis=-1), g[f"ce_by_mask_{name}"], **EXACT)
    assert (found[:, ~ms.mask_sets(L)] == 0).all()
    # state 3124 is all masked: the last set
    first = -np.log(network(name)[index_of([V] * L)])
    x0 = np.stack(np.unravel_index(g["ce_by_mask_rows"], (V,) * L), axis=-1)
    np.testing.assert_allclose(found[:, -1], first[np.arange(L), x0], **EXACT)


@both
def test_bounds(name):
    g, found = golden("discrete_likelihood"), values(name)
    bound = lambda weights: ms.weighted_bound(found, weights)
    exact = bound(ms.any_order_weights(L))
    np.testing.assert_allclose(exact, g[f"{name}_elbo"], **EXACT)
    if name == "oracle":
        np.testing.assert_allclose(exact, -g["log_p"], **EXACT)
    np.testing.assert_allclose(ms.any_order_weights(L)[ms.mask_sets(L).sum(1)], g["mask_weights"])
    np.testing.assert_allclose(ms.rate_weights(L), ms.any_order_weights(L), **EXACT)
    d = 1e-3
    mdlm = bound(ms.rate_weights(L, d * (1 - d), 1 - d)) / (1 - d)
    np.testing.assert_allclose(mdlm, g[f"{name}_elbo_mdlm_clipped"], **EXACT)
    smdm = bound(ms.rate_weights(L, d, 1.0)) / (1 - d)
    np.testing.assert_allclose(smdm, g[f"{name}_elbo_smdm_clipped"], **EXACT)
    for steps, stored in zip(g["T_list"], g[f"{name}_nelbo_T"]):
        finite = bound(ms.step_weights(P, L, int(steps)))
        np.testing.assert_allclose(finite, stored, atol=1e-11)
    for t, stored in zip(g["t_grid"], g[f"{name}_expected_integrand_linear"]):
        np.testing.assert_allclose(bound(ms.time_weights(P, L, t)), stored, **EXACT)


@both
@pytest.mark.parametrize("block", [1, 2, 3, 5])
def test_blocks(name, block):
    found = ms.block_bound(values(name), block)
    stored = golden("discrete_likelihood")[f"block_{'full' if block == L else block}_{name}"]
    np.testing.assert_allclose(found, stored, **EXACT)


def test_the_constant_of_t_dce():
    """RADD's extra term, averaged over its clipped times, by quadrature and in closed form."""
    g, d = golden("discrete_likelihood"), 1e-3
    from diffusion_jax.objectives import score_offset

    process = Absorbing(V, LinearSchedule(eps_end=d))
    nodes, weights = np.polynomial.legendre.leggauss(1000)
    log_t = -np.log(d) * (nodes - 1) / 2  # t = d .. 1
    t = np.exp(log_t)
    mean_count = L * process.mask_rate(t)
    each = score_offset(process, t, mean_count)
    offset = (-np.log(d) / 2 * weights * t) @ each / (1 - d)
    assert offset == pytest.approx(float(g["t_dce_official_offset"]), abs=1e-9)
    clipped = ms.weighted_bound(values("model"), ms.rate_weights(L, d * (1 - d), 1 - d)) / (1 - d)
    np.testing.assert_allclose(clipped + offset, g["model_t_dce_official"], atol=1e-9)


def test_variances_of_one_draw():
    g, found = golden("discrete_likelihood"), values("model")
    np.testing.assert_allclose(ms.count_variance(found), g["var_k_dce"], rtol=1e-11)
    for low, name in ((1e-3, "1e-3"), (1e-5, "1e-5")):
        stored = g[f"var_lambda_dce_clip{name}"]
        np.testing.assert_allclose(ms.rate_variance(found, low), stored, rtol=1e-10)


def test_a_network_that_sees_the_time(x64):
    """With one that does not, all times give the same; with one that does, the integral is by hand."""
    tokens = golden("discrete_likelihood")["x0"][:6]
    blind = ms.time_bound(P, lookup("model"), tokens, nodes=5)
    np.testing.assert_allclose(blind, values("model")[:6].sum(-1) @ mask_weights(), atol=1e-11)
    # logits of token 0 are t, all others 0: masks are independent, so the bound is an integral over r
    process = Absorbing(3, PolynomialSchedule(2.0))

    def seeing(x, t):
        return jnp.zeros((*x.shape, 3)).at[..., 0].set(jnp.broadcast_to(t, x.shape[:1])[:, None])

    pair = np.array([[0, 0], [1, 2]])
    u, w = np.polynomial.legendre.leggauss(200)
    t = np.sqrt((u + 1) / 2)  # rate r = t^2 is uniform
    normaliser = np.log(np.exp(t) + 2)
    expected = [2 * (w / 2) @ (normaliser - t), 2 * (w / 2) @ normaliser]
    found = ms.time_bound(process, seeing, pair, nodes=60)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def mask_weights():
    return ms.any_order_weights(L)[ms.mask_sets(L).sum(axis=1)]


def test_errors():
    with pytest.raises(ValueError, match="lengths 1 to 16, got 17"):
        ms.mask_sets(17)
    with pytest.raises(ValueError, match="block must be positive, got 0"):
        ms.block_bound(np.zeros((1, 4, 2)), 0)
    with pytest.raises(ValueError, match=r"tokens must lie in 0\.\.3; got 0\.\.4"):
        ms.cross_entropies(P, lookup("model"), np.array([[0, 1, 2, 3, 4]]))
