"""Samplers of discrete chains: transitions and laws by enumeration, draws, prompts, guidance, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import guidance
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
from diffusion_jax.samplers import (
    Prompt,
    build_sampler,
    discrete_ancestral,
    discrete_euler,
    masked_ancestral,
    sample,
    score_analytic,
    score_euler,
    tau_leaping,
)

STORED = golden("discrete_chains")
V, L = 4, 5
P = golden("discrete_table")["p"]
CLEAN = np.indices((V,) * L).reshape(L, -1).T
LOGLINEAR = LinearSchedule(eps_end=1e-3)


def noisy_law(keep):
    """The data's law after every token went through `keep [V, S]`."""
    law = P
    for axis in range(L):
        law = np.moveaxis(np.tensordot(keep, law, (0, axis)), 0, axis)
    return law


def rows_of(law, states):
    """`law` with each position in turn set to every value: `[N, L, S]`."""
    return np.stack(
        [
            np.moveaxis(law, i, -1)[tuple(np.delete(states, i, axis=1).T)]
            for i in range(states.shape[1])
        ],
        axis=1,
    )


def leave_one_out(keep, states):
    """p(x0^i | x_t without i) under the table, `[N, L, V]`."""
    out = np.empty((len(states), L, V))
    for i in range(L):
        law = P
        for axis in range(L):
            if axis != i:
                law = np.moveaxis(np.tensordot(keep, law, (0, axis)), 0, axis)
        out[:, i] = np.moveaxis(law, i, -1)[tuple(np.delete(states, i, axis=1).T)]
    return out / out.sum(axis=-1, keepdims=True)


def push(law, transition):
    """One step of a chain whose positions move independently given the state."""
    here = law > 0
    head = np.einsum("s,si,sj->sij", law[here], transition[here, 0], transition[here, 1])
    tail = np.einsum("si,sj,sk->sijk", *(transition[here, i] for i in (2, 3, 4)))
    return np.einsum("sij,sklm->ijklm", head, tail).reshape(-1)


def transitions(sampler, outputs, states):
    """p(x_s | x_t) of each step as the sampler draws it, float64 `[N, L, S]`; `outputs(t)` is the network."""
    for i, t in enumerate(sampler.times):
        inputs = jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), sampler.xs)
        probs = np.asarray(sampler.step.probs(jnp.asarray(outputs(t)), jnp.asarray(states), inputs))
        yield np.maximum(probs, 0.0) / np.maximum(probs, 0.0).sum(axis=-1, keepdims=True)


def law_of(sampler, outputs, start):
    law = start
    for transition in transitions(sampler, outputs, CLEAN):
        law = push(law, transition)
    return law


def distance(a, b):
    return 0.5 * np.abs(np.ravel(a) - np.ravel(b)).sum()


def uniform_keep(process, t):
    return process.alpha(t) * np.eye(V) + process.mask_rate(t) / V


FLAT = np.full(V**L, float(V) ** -L)


@pytest.mark.parametrize("n", (1, 2, 8))
def test_exact_laws_of_the_uniform_process(n, x64):
    """Plug-in with leave-one-out posteriors, with the wrong ones, and Euler on exact scores: the goldens."""
    at = (1, 2, 8).index(n)
    process = Uniform(V)
    loo = lambda t: np.log(leave_one_out(uniform_keep(process, t), CLEAN))
    sampler = discrete_ancestral(process, n)
    law = law_of(sampler, loo, FLAT)
    np.testing.assert_allclose(law, STORED["uniform_law_udlm_loo"][at], rtol=0, atol=1e-12)

    full = lambda t: scores.posterior(process, loo(t), CLEAN, t)
    wrong = law_of(sampler, full, FLAT)
    np.testing.assert_allclose(wrong, STORED["uniform_law_udlm_full_WRONG"][at], rtol=0, atol=1e-12)
    told = discrete_ancestral(process, n, parameterization="posterior")
    np.testing.assert_allclose(law_of(told, full, FLAT), law, rtol=0, atol=1e-10)

    process = Uniform(V, LOGLINEAR)

    def log_score(t):
        ratio = rows_of(noisy_law(uniform_keep(process, t)), CLEAN)
        return np.log(ratio / np.take_along_axis(ratio, CLEAN[..., None], axis=-1))

    euler = score_euler(process, n, denoise=False, t_end=0.0)
    expected = STORED["uniform_law_sedd_euler"][at]
    np.testing.assert_allclose(law_of(euler, log_score, FLAT), expected, rtol=0, atol=1e-12)
    # the same rates by way of posteriors
    loo = lambda t: np.log(leave_one_out(uniform_keep(process, t), CLEAN))
    again = law_of(discrete_euler(process, n), loo, FLAT)
    np.testing.assert_allclose(again, expected, rtol=0, atol=1e-10)


def test_orders_of_convergence(x64):
    """All five are of first order on a uniform chain: the distance to the data halves with the step."""
    process = Uniform(V, GeometricSchedule(1e-3, 6.0))
    loo = lambda t: np.log(leave_one_out(uniform_keep(process, t), CLEAN))
    log_score = lambda t: process.log_score(loo(t), CLEAN, t)
    made = {
        "ancestral": (discrete_ancestral, loo, {}),
        "tau_leaping": (tau_leaping, loo, {}),
        "euler": (discrete_euler, loo, {}),
        "score_euler": (score_euler, log_score, {}),
        "score_analytic": (score_analytic, log_score, {}),
    }
    noise = noisy_law(uniform_keep(process, 1.0)).ravel()
    end = noisy_law(uniform_keep(process, 0.4)).ravel()
    for name, (build, network, options) in made.items():
        if name.startswith("score"):
            options = {"denoise": False}
        errors = []
        for n in (16, 32):
            law = law_of(build(process, n, t_end=0.4, **options), network, noise)
            errors.append(distance(law, end))
        assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.25), (name, errors)


@pytest.mark.parametrize("pair", range(4))
def test_steps_of_absorbing_scores(pair, x64):
    """Tweedie's, Euler's and the denoising step of scores that are not normalised: the goldens."""
    process = Absorbing(V, LOGLINEAR)
    t, s = float(STORED["steps_t"][pair]), float(STORED["steps_s"][pair])
    tokens = STORED["steps_x_t"]
    log_probs = np.maximum(STORED["steps_model_logp"], -800.0)
    log_score = (
        log_probs + STORED["steps_score_offset"][..., None] + scores.score_scalar(process, t)
    )
    masked = tokens == V
    for build, name in ((score_analytic, "score_analytic"), (score_euler, "score_euler")):
        sampler = build(process, 1, t_start=t, t_end=s)
        inputs = [jax.tree.map(lambda v, i=i: jnp.asarray(v[i]), sampler.xs) for i in range(2)]
        got = sampler.step.probs(jnp.asarray(log_score), jnp.asarray(tokens), inputs[0])
        expected = np.maximum(STORED[f"steps_{name}"][pair], 0.0)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)
    # the last row denoises from t itself
    sampler = score_analytic(process, 1, t_start=min(t + 0.05, 1.0), t_end=t)
    inputs = jax.tree.map(lambda v: jnp.asarray(v[1]), sampler.xs)
    got = np.asarray(sampler.step.probs(jnp.asarray(log_score), jnp.asarray(tokens), inputs))
    assert (got[masked][:, V] == 0).all()
    got = got[masked][:, :V] / got[masked].sum(axis=-1, keepdims=True)
    expected = STORED["steps_score_denoise"][pair][masked]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-12)


def test_absorbing_steps_are_those_of_the_masked_sampler(x64):
    """Ancestral and Euler on the linear schedule reveal at the same rate; nothing is masked at the end."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.uniform(size=(6, L)) < 0.6, V, rng.integers(0, V, (6, L)))
    logits = rng.normal(size=(6, L, V))
    general = ctmc(V, "absorbing", LinearSchedule())
    process = Absorbing(V)
    first = list(transitions(discrete_ancestral(process, 4), lambda t: logits, tokens))
    for t, s, row in zip((1.0, 0.75, 0.5, 0.25), (0.75, 0.5, 0.25, 0.0), first):
        probs = np.exp(scores.log_softmax(logits))
        np.testing.assert_allclose(row, process.reverse_probs(probs, tokens, t, s), atol=1e-12)
    for build, chain in (
        (discrete_euler, process),
        (discrete_ancestral, general),
        (tau_leaping, process),
    ):
        rows = list(transitions(build(chain, 4), lambda t: logits, tokens))
        if build is not tau_leaping:
            np.testing.assert_allclose(np.array(rows), np.array(first), rtol=0, atol=1e-8)
        np.testing.assert_allclose(rows[-1], first[-1], rtol=0, atol=1e-12)
        assert (rows[-1][..., V] == 0).all()


CHAINS = {
    "uniform": Uniform(V),
    "ctmc": ctmc(V, "nearest_neighbour"),
    "absorbing": Absorbing(V),
    "d3pm": d3pm(V, "gaussian", 6, beta_min=0.05, beta_max=2.0),
    "mask_replace": mask_replace(V, 6),
}


@pytest.mark.parametrize("name", CHAINS)
def test_drawn_tokens(name):
    """Draws of position-wise independent data, from a number of sequences: each token's law is right."""
    process, num = CHAINS[name], 4000
    probs = np.array([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], np.float32)
    logits = jnp.log(probs)  # independent positions: posteriors without a token do not depend on x
    steps = 6 if name in ("d3pm", "mask_replace") else 12
    sampler = discrete_ancestral(process, steps, length=2)
    assert sampler.nfe == steps
    out = sample(
        sampler, lambda x, t: jnp.broadcast_to(logits, (*x.shape, V)), jax.random.key(0), num
    )
    out = np.asarray(out)
    assert out.shape == (num, 2) and out.min() >= 0 and out.max() < V
    for i in range(2):
        frequency = np.bincount(out[:, i], minlength=V) / num
        error = 4.5 * np.sqrt(probs[i] * (1 - probs[i]) / num)
        # the chains of finite length leave a little noise that the prior does not know of
        assert (np.abs(frequency - probs[i]) < error + 0.004).all(), (frequency, probs[i])


def test_prompts_are_kept_from_the_first_call_to_the_end():
    process = Uniform(V)
    prompt = np.tile([3, 0, 2, 0, 1], (8, 1))
    given = np.tile([True, False, True, False, True], (8, 1))
    seen = []

    def network(x, t):
        jax.debug.callback(lambda v: seen.append(np.asarray(v)), x)
        return jnp.zeros((*x.shape, V))

    x_init = Prompt(np.where(given, prompt, 99), given)
    out, path = sample(
        discrete_ancestral(process, 3), network, jax.random.key(0), x_init, trajectory=True
    )
    jax.effects_barrier()
    assert len(seen) == 3
    for x in (*seen, out, *path):
        np.testing.assert_array_equal(x[:, ::2], prompt[:, ::2])
    assert len(np.unique(np.asarray(out)[:, 1::2], axis=0)) > 3


def test_filters_act_on_tokens_of_the_network_or_on_moves():
    """top_k = 1 at t_end = 0 draws the network's best token; of scores, the likeliest move."""
    process, rng = Uniform(V), np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, L, V)), jnp.float32)
    network = lambda x, t: jnp.broadcast_to(logits, (*x.shape, V))
    for options in ({"top_k": 1}, {"temperature": 0.0}, {"nucleus": 1e-3}):
        sampler = discrete_ancestral(process, 2, length=L, **options)
        out = sample(sampler, network, jax.random.key(0), 20)
        np.testing.assert_array_equal(out, np.tile(logits.argmax(-1), (20, 1)))
    masked = Absorbing(V, LOGLINEAR)
    scored = lambda x, t: network(x, t) + scores.score_scalar(masked, t) - 1.0
    out = sample(score_analytic(masked, 2, length=L, top_k=1), scored, jax.random.key(0), 20)
    np.testing.assert_array_equal(out, np.tile(logits.argmax(-1), (20, 1)))


def two_networks():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(3, L, V)), jnp.float32) for _ in range(2)]


def step_inputs(sampler, i=0):
    return jax.tree.map(lambda v: jnp.asarray(v[i]), sampler.xs)


def test_guided_steps():
    """D-CFG mixes the two steps, not the two posteriors; weights 1 and 0 are the networks alone."""
    process, (c, u) = Uniform(V), two_networks()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (3, L)))
    sampler = discrete_ancestral(process, 2)
    inputs = step_inputs(sampler)

    def step(weight):
        denoise = guidance.guide_steps(lambda x, t: c, lambda x, t: u, weight)
        probs = sampler.step.guided(denoise(tokens, 1.0), tokens, inputs)
        return np.asarray(probs / probs.sum(axis=-1, keepdims=True), np.float64)

    t, s = 1.0, 0.5
    steps = [
        process.reverse_probs(
            np.exp(scores.log_softmax(np.asarray(v, np.float64))), np.asarray(tokens), t, s
        )
        for v in (c, u)
    ]
    np.testing.assert_allclose(step(1.0), steps[0], atol=1e-6)
    np.testing.assert_allclose(step(0.0), steps[1], atol=1e-6)
    mixed = steps[0] ** 2.5 * steps[1] ** -1.5
    np.testing.assert_allclose(step(2.5), mixed / mixed.sum(axis=-1, keepdims=True), atol=2e-6)
    out = sample(
        sampler,
        guidance.guide_steps(lambda x, t: c, lambda x, t: u, 2.0),
        jax.random.key(0),
        np.asarray(tokens),
    )
    assert out.shape == tokens.shape


@pytest.mark.parametrize("change", ("exact", "first_order"))
def test_steered_steps(change):
    """D-CBG with a classifier that is linear in the tokens: both forms are its weights, exactly."""
    process, (logits, weights) = Uniform(V), two_networks()
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, V, (3, L)))
    table = weights[0]  # [L, V]

    def classifier(x, t):
        rows = x if x.ndim == 3 else jax.nn.one_hot(x, V)
        return (rows * table).sum(axis=(1, 2)) + t

    denoise = guidance.steer(lambda x, t: logits, classifier, 1.5, V, change)
    sampler = discrete_ancestral(process, 2)
    made = quick_jit(lambda x: denoise(x, jnp.float32(1.0)))(tokens)
    probs = sampler.step.guided(made, tokens, step_inputs(sampler))
    got = np.asarray(probs / probs.sum(axis=-1, keepdims=True))
    plain = process.reverse_probs(
        np.exp(scores.log_softmax(np.asarray(logits, np.float64))), np.asarray(tokens), 1.0, 0.5
    )
    expected = plain * np.exp(1.5 * np.asarray(table))
    np.testing.assert_allclose(got, expected / expected.sum(axis=-1, keepdims=True), atol=2e-6)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: discrete_ancestral(None), "needs a discrete process, got NoneType"),
        (lambda: tau_leaping(CHAINS["d3pm"]), "needs a process in continuous time, got D3PM"),
        (lambda: discrete_ancestral(CHAINS["d3pm"], 7), "7 steps do not fit"),
        (
            lambda: discrete_ancestral(CHAINS["d3pm"], 6, grid="quadratic"),
            "the chain has 6 steps: 6 between",
        ),
        (
            lambda: discrete_ancestral(Uniform(V), parameterization="full"),
            "parameterization must be one of leave_one_out, posterior; got 'full'",
        ),
        (lambda: discrete_ancestral(Uniform(V), last_step="x"), "last_step must be one of"),
        (lambda: discrete_ancestral(Uniform(V), temprature=1.0), "did you mean 'temperature'"),
        (lambda: score_euler(Absorbing(V, LOGLINEAR), denoise=False), "masks would be left over"),
        (lambda: score_euler(Uniform(V), t_start=1.0), "needs finite noise at its first time 1"),
        (
            lambda: build_sampler(Uniform(V), "score_euler", 1),
            "costs n\\+1 calls for n steps: nfe=1 is too few",
        ),
        (lambda: masked_ancestral(Uniform(V)), "needs an Absorbing process, got Uniform"),
        (
            lambda: sample(discrete_ancestral(Uniform(V), 2), two_networks, jax.random.key(0), 3),
            "the number of sequences alone does not say their length",
        ),
        (
            lambda: sample(
                discrete_ancestral(Uniform(V), 2),
                two_networks,
                jax.random.key(0),
                np.full((2, L), V),
            ),
            r"tokens must lie in 0..3; got 4..4",
        ),
        (
            lambda: sample(
                discrete_ancestral(Uniform(V), 2),
                two_networks,
                jax.random.key(0),
                Prompt(np.zeros((2, L), int), np.zeros((2, L))),
            ),
            "Prompt.given must be bool of shape",
        ),
        (
            lambda: sample(
                discrete_ancestral(Uniform(V), 2),
                lambda x, t: jnp.zeros((*x.shape, 7)),
                jax.random.key(0),
                np.zeros((2, L), int),
            ),
            "denoise returned logits of shape",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
