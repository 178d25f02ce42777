"""Bayesian flow samplers against the authors' programs, exact models, and their generic twins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import mixture_mean, plain_run

from diffusion_jax import oracles, registry
from diffusion_jax.processes import VP, ContinuousBFN, DiscreteBFN
from diffusion_jax.samplers import (
    bfn,
    bfn_continuous,
    bfn_solver,
    bfn_solver_discrete,
    build_sampler,
    ddim,
    dpm_solver_pp,
    sample,
    sde_dpm_solver_pp,
)
from diffusion_jax.samplers.bayesian_flow import with_draws
from diffusion_jax.samplers.categorical import inverse_cdf

CTS, DIS = golden("solvers_bfn_cts"), golden("solvers_bfn_dis")
FLOW = ContinuousBFN(float(CTS["min_variance"]), float(CTS["eta"]))
TOKENS = DiscreteBFN(int(DIS["K"]), float(DIS["max_sqrt_beta"]) ** 2, float(DIS["eta"]))
MODEL = oracles.SequenceList(DIS["sequences"], DIS["probs"], TOKENS.vocab_size)
FLOOR = np.exp(float(DIS["logit_floor"]))
NFES = [int(n) for n in CTS["nfes"]]


def mixture(x, point):
    """The exact x0_hat, clipped as the authors do."""
    return np.clip(mixture_mean(x, point, CTS["w"], CTS["means"], CTS["covs"]), -1.0, 1.0)


def sequences(z, point):
    """The exact class probabilities; the authors' program saw them with a floor under the logits."""
    probs = np.maximum(MODEL(z, None), FLOOR)
    return probs / probs.sum(-1, keepdims=True)


def noise_rows(draws, sampler):
    noise = np.zeros((sampler.nfe + 1, *draws.shape[1:]))
    noise[1:] = draws[: sampler.nfe]
    return noise


@pytest.mark.parametrize("drop", (True, False), ids=("drop", "full"))
@pytest.mark.parametrize(
    "rule, official", (("ode1", "ode1"), ("ode2", "ode2m"), ("sde2", "sde2m"), ("sde_euler",) * 2)
)
def test_continuous_solvers_are_the_authors(rule, official, drop):
    for n in NFES:
        sampler = bfn_solver(FLOW, n, rule=rule, last_drop=drop)
        assert sampler.nfe == n
        end = plain_run(sampler, mixture, CTS["xT"], noise_rows(CTS["noise"], sampler))[-1]
        stored = CTS[f"cts_{official}_{'drop' if drop else 'full'}__nfe{n}"]
        np.testing.assert_allclose(end, stored, rtol=0, atol=1e-10, err_msg=str(n))


@pytest.mark.parametrize("drop", (True, False), ids=("drop", "full"))
@pytest.mark.parametrize("rule", ("ode1", "ode2m", "ode2s", "ode_euler", "sde1", "sde2m"))
def test_discrete_solvers_are_the_authors(rule, drop):
    for n in NFES:
        sampler = bfn_solver_discrete(TOKENS, n, rule=rule, last_drop=drop)
        assert sampler.nfe == (2 * n if rule == "ode2s" else n)
        noise = noise_rows(DIS["noise"], sampler) if rule.startswith("sde") else None
        end = plain_run(sampler, sequences, DIS["zT"], noise)[-1]
        stored = DIS[f"dis_{rule}_{'drop' if drop else 'full'}__nfe{n}"]
        end = np.log(np.maximum(end, FLOOR)) if drop else end
        np.testing.assert_allclose(end, stored, rtol=0, atol=1e-10, err_msg=str(n))


def test_the_original_continuous_sampler_is_the_authors():
    def head(x, point):  # where nothing is known the authors' head says 0
        return mixture(x, point) if point["alpha"] > 0 else np.zeros_like(x)

    for n in (10, 20, 50):
        sampler = bfn_continuous(FLOW, n)
        assert sampler.nfe == n + 1
        noise = np.zeros((n + 2, 16, 2))
        noise[1 : n + 1] = CTS["bfn_sampler_noise"][:n]
        path = plain_run(sampler, head, CTS["xT"], noise)
        np.testing.assert_array_equal(path[0], 0.0)  # x_init gives the shape alone
        np.testing.assert_allclose(path[-1], CTS[f"bfn_sampler__n{n}"], rtol=0, atol=1e-10)


def test_the_original_discrete_sampler_is_the_authors(x64):
    for n in (10, 20):
        draws = DIS["bfn_sampler_uniform"][:n], DIS["bfn_sampler_noise"][:n]
        sampler = with_draws(bfn(TOKENS, n), *draws)
        assert sampler.nfe == n + 1
        probs = sample(sampler, MODEL, None, jnp.ones((16, 3, 5)))
        np.testing.assert_array_equal(probs.argmax(-1), DIS[f"bfn_sampler__n{n}"])


def slope(errors):
    return np.log2(errors[0] / errors[1])


def test_continuous_solvers_are_the_generic_ones():
    """On the flow's own times, with no special last call; and on another process."""
    rng = np.random.default_rng(0)
    for process in (FLOW, VP(), ContinuousBFN(1e-3, 0.1)):
        x = rng.standard_normal((5, 2)) * process.prior_std
        for n in (2, 7):
            options = {"grid": "uniform"}
            twins = (
                ("ode1", ddim(process, n, **options)),
                ("ode2", dpm_solver_pp(process, n, lower_order_final=False, **options)),
                ("sde2", sde_dpm_solver_pp(process, n, **options)),
            )
            noise = rng.standard_normal((n + 1, 5, 2))
            for rule, twin in twins:
                own = bfn_solver(process, n, rule=rule, last_drop=False, **options)
                a, b = (plain_run(s, mixture, x, noise)[-1] for s in (own, twin))
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)
                assert own.order == twin.order and own.stochastic == twin.stochastic


def test_the_original_continuous_sampler_is_bayesian_updating_and_ancestral_sampling():
    """mu' = (rho mu + a y) / (rho + a), y = x0_hat + z / sqrt(a), said again; and DDIM with eta = 1."""
    process, n = ContinuousBFN(1e-3, 0.05), 9
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((n + 2, 4, 2))
    network = lambda x, point: 0.7 * np.tanh(x + 0.3) * (1.0 - 0.5 * point["t"])
    mu, rho = np.zeros((4, 2)), 1.0
    for i in range(1, n + 1):
        accuracy = 1e-3 ** (-i / n) * (1.0 - 1e-3 ** (1.0 / n))
        y = network(mu, {"t": 1.0 - (i - 1) / n}) + noise[i] / np.sqrt(accuracy)
        mu, rho = (rho * mu + accuracy * y) / (rho + accuracy), rho + accuracy
    sampler = bfn_continuous(process, n)
    path = plain_run(sampler, network, rng.standard_normal((4, 2)), noise)
    np.testing.assert_allclose(path[n], mu, rtol=0, atol=1e-13)
    np.testing.assert_allclose(path[-1], network(mu, {"t": 0.0}), rtol=0, atol=1e-13)
    for other in (VP(), process):
        start = 0.9
        x = rng.standard_normal((4, 2))
        own = bfn_continuous(other, n, t_start=start, last_call=False, grid="uniform")
        twin = ddim(other, n, t_start=start, eta=1.0, grid="uniform")
        a, b = (plain_run(s, network, x, noise[: n + 1])[-1] for s in (own, twin))
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_exact_ends_and_orders_of_the_discrete_solvers():
    """Errors against the stored exact end of the ODE fall with the declared order."""
    exact = DIS["dis_exact_end"]

    def error(rule, n):
        sampler = bfn_solver_discrete(TOKENS, n, rule=rule, last_drop=False)
        return np.sqrt(np.mean((plain_run(sampler, sequences, DIS["zT"])[-1] - exact) ** 2))

    for rule, order in (("ode_euler", 1), ("ode1", 1), ("ode2m", 2), ("ode2s", 2)):
        errors = [error(rule, n) for n in (160, 320)]
        assert slope(errors) == pytest.approx(order, abs=0.15), rule
        assert bfn_solver_discrete(TOKENS, 4, rule=rule, last_drop=False).order == order
        assert errors[1] < (0.05 if order == 1 else 1e-4)
    assert error("ode1", 20) < 0.25 * error("ode_euler", 20)


@pytest.mark.parametrize("rule", ("ode1", "ode2m", "ode2s"))
def test_ode_rules_are_exact_for_constant_probabilities(rule):
    """For constant e the ODE keeps z / (1 - t) - K beta1 (1 - t) (e - 1/K) as it is."""
    process = DiscreteBFN(4, beta1=1.7, eta=0.02)
    rng = np.random.default_rng(2)
    e = rng.dirichlet(np.ones(4), (3, 2))
    z = rng.standard_normal((3, 2, 4))
    pull = lambda t: 4 * 1.7 * (1.0 - t) * (e - 0.25)
    for times in ([0.98, 0.5, 0.0], [0.9, 0.2]):
        sampler = bfn_solver_discrete(process, rule=rule, last_drop=False, grid=times)
        end = plain_run(sampler, lambda z, point: e, z)[-1]
        kept = z / (1.0 - times[0]) - pull(times[0])
        exact = (1.0 - times[-1]) * (kept + pull(times[-1]))
        np.testing.assert_allclose(end, exact, rtol=0, atol=1e-12)


def test_sde_rules_keep_the_marginals_of_one_sequence():
    """With e_x known, z stays N(beta (K e_x - 1), K beta I) exactly: each row's mean and variance."""
    process = DiscreteBFN(3, beta1=2.0, eta=0.1)
    one_hot = np.eye(3)[None, [1]]
    for rule in ("sde1", "sde2m"):
        sampler = bfn_solver_discrete(process, 6, rule=rule, last_drop=False)
        beta0 = process.beta(0.9)
        path = plain_run(sampler, lambda z, point: one_hot, beta0 * (3 * one_hot - 1.0))
        beta = sampler.xs["next"]["beta"][:, None, None, None]
        np.testing.assert_allclose(path[1:], beta * (3 * one_hot - 1.0), atol=1e-12)
        unit = [
            plain_run(
                sampler,
                lambda z, point: one_hot,
                0 * one_hot,
                np.eye(7)[i, :, None, None, None] * np.ones((1, 1, 3)),
            )[-1]
            - plain_run(sampler, lambda z, point: one_hot, 0 * one_hot)[-1]
            for i in range(1, 7)
        ]
        np.testing.assert_allclose(sum(u**2 for u in unit), 3 * (2.0 - beta0), atol=1e-12)


def test_one_update_of_both_stochastic_samplers_has_the_same_mean():
    """SDE-1 averages over the category that the BFN draws; the law of one update by enumeration.

    Mean K e - 1 times a, covariance K a I, to which the drawn category adds (K a)^2 (diag e - e e^T).
    """
    process = DiscreteBFN(3, beta1=0.8, eta=0.2)
    e = np.array([0.5, 0.3, 0.2])
    z = np.array([0.1, -0.4, 0.3])
    grid = [0.8, 0.5]
    a = process.beta(0.5) - process.beta(0.8)
    model = jax.tree_util.Partial(lambda p, z, t: jnp.broadcast_to(p, z.shape), jnp.asarray(e))
    count = 60_000
    start = jnp.broadcast_to(jnp.asarray(z), (count, 1, 3))
    _, path = sample(bfn(process, grid=grid), model, jax.random.key(0), start, trajectory=True)
    drawn = np.asarray(path[1])[:, 0]
    sampler = bfn_solver_discrete(process, rule="sde1", last_drop=False, grid=grid)
    mean = plain_run(sampler, lambda z, point: e + 0 * z, z[None, None])[-1][0, 0]
    np.testing.assert_allclose(mean, z + a * (3 * e - 1.0), atol=1e-13)
    covariance = 3 * a * np.eye(3) + (3 * a) ** 2 * (np.diag(e) - np.outer(e, e))
    deviation = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(drawn.mean(0), mean, atol=4 * deviation.max() / np.sqrt(count))
    bound = 4 * np.outer(deviation, deviation).max() * np.sqrt(2 / count)
    np.testing.assert_allclose(np.cov(drawn.T), covariance, atol=bound)


def test_the_original_sampler_ends_in_the_law_of_the_data():
    """With the exact model the modes are sequences of the list, in their proportions, up to the steps."""
    process = dataclasses.replace(TOKENS, beta1=6.0)
    count = 4_000
    probs = sample(bfn(process, 60), MODEL, jax.random.key(1), jnp.zeros((count, 3, 5)))
    tokens = np.asarray(probs.argmax(-1))
    hits = (tokens[:, None, :] == DIS["sequences"][None]).all(-1)
    assert hits.any(1).mean() > 0.99
    error = 4 * np.sqrt(DIS["probs"] * (1 - DIS["probs"]) / count)
    assert (np.abs(hits.mean(0) - DIS["probs"]) < error + 0.015).all()


def test_categories_by_inverse_cdf():
    probs = jnp.array([[0.0, 0.25, 0.0, 0.75, 0.0]] * 5)
    uniform = jnp.array([0.0, 0.2499, 0.25, 0.9, 1.0 - 2.0**-24])
    np.testing.assert_array_equal(inverse_cdf(probs, uniform), [1, 1, 3, 3, 3])


def test_starts():
    """Own samplers begin at t = 1 from nothing; solvers at 1 - eta; both anywhere they are told."""
    assert bfn(TOKENS, 4).times[0] == bfn_continuous(FLOW, 4).times[0] == 1.0
    np.testing.assert_allclose(
        bfn_solver(FLOW, 4).times, (1 - 0.01) * np.array([1, 0.75, 0.5, 0.25])
    )
    np.testing.assert_allclose(
        bfn_solver_discrete(TOKENS, 4).times, (1 - 1e-3) * np.array([1, 0.75, 0.5, 0.25])
    )
    z = jnp.ones((2, 3, 5))
    model = lambda z, t: jax.nn.softmax(z, axis=-1)
    for start, first in ((None, 0.0), (0.5, 1.0)):
        _, path = sample(
            bfn(TOKENS, 3, t_start=start), model, jax.random.key(0), z, trajectory=True
        )
        np.testing.assert_array_equal(path[0], first * z)
    assert bfn_solver_discrete(TOKENS, 3, rule="sde1", t_start=1.0).times[0] == 1.0


@pytest.mark.parametrize(
    "build, message",
    (
        (lambda: bfn_solver(FLOW, 5, rule="ode3"), "rule must be one of ode1, .*; got 'ode3'"),
        (
            lambda: bfn_solver_discrete(TOKENS, 5, rule="ode2"),
            "rule must be one of .*ode2m.*; got 'ode2'",
        ),
        (lambda: bfn_solver_discrete(FLOW, 5), "needs a DiscreteBFN process, got ContinuousBFN"),
        (lambda: bfn(VP(), 5), "needs a DiscreteBFN process, got VP"),
        (lambda: bfn_solver(TOKENS, 5), "needs a Gaussian process, got DiscreteBFN"),
        (lambda: bfn_solver_discrete(TOKENS, 5, rule="ode1", t_start=1.0), "singular at t = 1"),
        (lambda: bfn_solver(ContinuousBFN(eta=0.0), 5), "starts below t = 1"),
        (lambda: build_sampler(TOKENS, "dpmpp_2m", 5), "not for a bayesian_flow process"),
        (lambda: build_sampler(TOKENS, "bfn", 1), "costs n\\+1 calls for n steps: nfe=1"),
        (
            lambda: sample(bfn(TOKENS, 2), MODEL, jax.random.key(0), jnp.zeros((2, 3))),
            r"floating-point logits \[B, L, 5\]",
        ),
        (
            lambda: with_draws(bfn(TOKENS, 2), np.zeros((3, 1, 1)), np.zeros((2, 1, 1, 5))),
            "2 updates need as many draws; got 3, 2",
        ),
    ),
)
def test_errors_name_the_value(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_names_build_the_rules():
    assert registry.names("sampler", family="bayesian_flow", paper="2404.15766") == tuple(
        sorted(f"bfn_{r}" for r in ("ode1", "ode2m", "ode2s", "ode_euler", "sde1", "sde2m"))
    )
    for name in ("bfn_sde2m", "bfn_ode2s"):
        made = build_sampler(TOKENS, name, 10)
        own = bfn_solver_discrete(TOKENS, made.nfe // (1 + (name == "bfn_ode2s")), rule=name[4:])
        np.testing.assert_array_equal(made.xs["scalars"], own.xs["scalars"])
        assert made.name == name
    np.testing.assert_array_equal(
        build_sampler(FLOW, "bfn_solver_sde2", 6).xs["scalars"],
        bfn_solver(FLOW, 6, rule="sde2").xs["scalars"],
    )
