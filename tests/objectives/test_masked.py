"""The masked bounds: the authors' integrands, and exact likelihoods by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import objectives, oracles
from diffusion_jax.evaluation import mask_sets
from diffusion_jax.objectives import masked
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
    found = {k.removeprefix("loss_"): v for k, v in stored if k.startswith("loss_")}
    return golden("discrete_losses") | {k: found[k] for k in ("cond", "model_logits")}


@pytest.mark.parametrize("network", ["oracle", "model"])
def test_integrands_of_the_official_codes(network, x64):
    g = golden_losses()
    with np.errstate(divide="ignore"):
        logits = np.log(g["cond"]) if network == "oracle" else g["model_logits"]
    summed = objectives.masked_sum(jnp.asarray(logits), jnp.asarray(g["x0"]), g["mask"])
    exact = np.where(g["mask"], g[f"{network}_ce"], 0.0).sum(axis=1)
    np.testing.assert_allclose(summed, exact, atol=1e-9)
    t, count = g["t"], g["mask"].sum(axis=1)
    weights = {name: Absorbing(4, schedule).weight(t) for name, schedule in SCHEDULES.items()}
    weights |= {"dse": weights["mdlm_nelbo"], "lambda_dce": 1.0 / t, "k_dce": 5 / count}
    np.testing.assert_allclose(masked.count_weight(count, 5), 5 / count)
    for steps in (4, 10, 1000):
        md4 = Absorbing(4, SCHEDULES["nelbo_md4_linear"])
        end = masked.finite_time(t, steps)
        weights[f"md4_discrete_T{steps}"] = masked.finite_weight(md4, end, steps)
    for name, weight in weights.items():
        np.testing.assert_allclose(
            weight * summed, g[f"{network}_{name}"], atol=1e-9, rtol=1e-9, err_msg=name
        )
    loglinear = Absorbing(4, SCHEDULES["mdlm_nelbo"])
    official = weights["mdlm_nelbo"] * summed + objectives.score_offset(loglinear, t, count)
    np.testing.assert_allclose(official, g[f"{network}_t_dce_official"], atol=1e-9, rtol=1e-9)


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


MD4 = CosineSchedule(1e-4, 1e-4)
MASKINGS = {
    "continuous": (Absorbing(V, CosineSchedule(), t_min=0.01), {}),
    "independent": (Absorbing(V, CosineSchedule(), t_min=0.01), {"times": "independent"}),
    "importance": (Absorbing(V, MD4, t_min=0.01), {}),
    "lambda": (Absorbing(V, MD4), {}),
    "smdm": (Absorbing(V), {"eps": 0.02}),
    "count": (Absorbing(V, MD4), {}),
    "finite": (Absorbing(V, MD4), {"steps": 4}),
}


def exact_values(name, values):
    """What a masking estimates: by the sizes' exact weights, or by quadrature."""
    process, _ = MASKINGS[name]
    if name in ("lambda", "count"):
        weights = mask_sets.any_order_weights(L)
    elif name == "smdm":
        weights = mask_sets.rate_weights(L, 0.02, 1.0) / 0.98
    elif name == "finite":
        weights = mask_sets.step_weights(process, L, 4)
    else:
        ends = process.mask_rate(0.01), process.mask_rate(1.0)
        weights = mask_sets.rate_weights(L, *ends)
    return mask_sets.weighted_bound(values, weights)


@functools.cache
def oracle_values():
    return mask_sets.cross_entropies(Absorbing(V), oracles.token_table(TABLE), SEQUENCES)


@pytest.mark.parametrize("name", MASKINGS)
def test_every_loss_is_an_unbiased_estimate_of_its_bound(name):
    process, options = MASKINGS[name]
    masking = {"independent": "continuous", "smdm": "lambda"}.get(name, name)
    each = 600
    tokens = jnp.asarray(np.tile(SEQUENCES, (each, 1)), jnp.int32)
    oracle = oracles.token_table(TABLE)
    losses, aux = quick_jit(
        lambda key, tokens: objectives.masked_cross_entropy(
            process, oracle, key, tokens, masking=masking, **options
        )
    )(jax.random.key(0), tokens)
    assert losses.dtype == jnp.float32 and losses.shape == (each * 27,)
    assert float(aux["t"].min()) >= (0.0 if masking in ("lambda", "count", "finite") else 0.01)
    exact = exact_values(name, oracle_values())
    # all sequences together, and each alone
    values = np.asarray(losses, float).reshape(each, 27)
    error = values.std() / np.sqrt(values.size)
    assert values.mean() == pytest.approx(exact.mean(), abs=4 * error)
    errors = values.std(axis=0) / np.sqrt(each)
    assert (np.abs(values.mean(axis=0) - exact) < 4.5 * errors).all()


def test_counts_are_exact_and_spread_over_the_batch():
    length, num = 7, 28
    tokens = jnp.zeros((num, length), jnp.int32)
    where = np.arange(length) < np.array([[7], [3], [1], [0]] * 7)
    process = Absorbing(V, PolynomialSchedule(2.0))

    @quick_jit
    def draw(key, where):
        index = jnp.arange(num)
        return masked.by_count(process, key, tokens, index, num, where)

    for seed in range(3):
        x, _, weight = draw(jax.random.key(seed), None)
        count = np.asarray(x == V).sum(axis=1)
        np.testing.assert_array_equal(np.bincount(count, minlength=8), [0, *[4] * 7])
        np.testing.assert_allclose(weight, 7 / count)
        x, _, weight = draw(jax.random.key(seed), where)
        hit = np.asarray(x == V)
        assert not (hit & ~where).any()
        free = where.sum(axis=1)
        assert (hit.sum(axis=1) >= 1)[free > 0].all() and (weight[free == 0] == 0).all()
        assert (hit.sum(axis=1)[free == 1] == 1).all()


def test_counts_come_with_the_rate_at_which_they_occur():
    """k masks among L: the rate is Beta(k, L - k + 1), so a network that sees t is unbiased too."""
    process = Absorbing(V, PolynomialSchedule(2.0))
    tokens = jnp.asarray(np.tile(SEQUENCES, (1500, 1)), jnp.int32)

    def seeing(x, t):  # prefers token 0 the more, the later it is
        return jnp.zeros((*x.shape, V)).at[..., 0].set(3.0 * jnp.asarray(t)[:, None])

    losses, aux = quick_jit(
        lambda key: objectives.masked_cross_entropy(process, seeing, key, tokens, masking="count")
    )(jax.random.key(1))
    exact = mask_sets.time_bound(
        process, lambda x, t: seeing(x, jnp.full(x.shape[0], t)), SEQUENCES, nodes=30
    )
    values = np.asarray(losses, float).reshape(-1, 27)
    errors = values.std(axis=0) / np.sqrt(len(values))
    assert (np.abs(values.mean(axis=0) - exact) < 4.5 * errors).all()
    k = np.round(np.asarray(aux["masked"]) * L)
    rate = np.asarray(process.mask_rate(aux["t"]))
    for n in range(1, L + 1):
        some = rate[k == n]
        assert some.mean() == pytest.approx(n / (L + 1), abs=4 * some.std() / np.sqrt(len(some)))


def test_counts_vary_least():
    tokens = jnp.asarray(np.tile(SEQUENCES, (400, 1)), jnp.int32)
    oracle, process = oracles.token_table(TABLE), Absorbing(V, t_min=1e-3)
    spread = {}
    for name in ("count", "lambda"):
        losses, _ = quick_jit(
            lambda key, name=name: objectives.masked_cross_entropy(
                process, oracle, key, tokens, masking=name
            )
        )(jax.random.key(0))
        spread[name] = np.asarray(losses, float).reshape(-1, 27).var(axis=0).mean()
    assert spread["count"] == pytest.approx(
        mask_sets.count_variance(oracle_values()).mean(), rel=0.1
    )
    assert spread["lambda"] > 3 * spread["count"]


@pytest.mark.parametrize("masking", masked.MASKINGS)
def test_a_uniform_network_costs_log_v_a_token(masking):
    """And nothing is NaN where t or the rate is 0."""
    process = Absorbing(50, t_min=0.0 if masking != "importance" else 1e-6)
    tokens = jnp.zeros((4096, 6), jnp.int32)
    slope = lambda scale, key: objectives.masked_cross_entropy(
        process, lambda x, t: scale * jnp.zeros((*x.shape, 50)), key, tokens, masking=masking
    )[0].mean()
    value, gradient = quick_jit(jax.value_and_grad(slope))(1.0, jax.random.key(0))
    assert gradient == 0.0
    tolerance = 1e-5 if masking == "count" else 0.6
    assert value == pytest.approx(6 * np.log(50), rel=tolerance / 10)


def test_nothing_is_nan_at_the_ends():
    process = Absorbing(V)
    ends = lambda process, key, index, total: (jnp.array([0.0, 1.0]), jnp.ones(2))
    tokens = jnp.zeros((2, L), jnp.int32)
    losses, _ = objectives.masked_cross_entropy(
        process,
        lambda x, t: jnp.zeros((2, L, V)),
        jax.random.key(0),
        tokens,
        times=ends,
    )
    np.testing.assert_allclose(losses, [0.0, L * np.log(V)], rtol=1e-6)
    offset = objectives.score_offset(process, jnp.array([0.0, 1e-8, 1.0]), jnp.array([0, 1, L]))
    assert np.isfinite(offset).all() and offset[0] == 0.0


def test_answers_given_their_prompts():
    """`where` bounds the likelihood of the rest given what is never masked: exactly so for the oracle."""
    where = np.array([False, True, True])
    each = 500
    tokens = jnp.asarray(np.tile(SEQUENCES, (each, 1)), jnp.int32)
    losses, _ = quick_jit(
        lambda key: objectives.masked_cross_entropy(
            Absorbing(V),
            oracles.token_table(TABLE),
            key,
            tokens,
            masking="count",
            where=jnp.broadcast_to(where, tokens.shape),
        )
    )(jax.random.key(2))
    exact = -np.log(TABLE / TABLE.sum(axis=(1, 2), keepdims=True)).reshape(-1)
    values = np.asarray(losses, float).reshape(each, 27)
    errors = values.std(axis=0) / np.sqrt(each)
    assert (np.abs(values.mean(axis=0) - exact) < 4.5 * errors).all()


def test_importance_sampling_has_a_constant_weight():
    """MDLM: -log p times -f_0; there the log rate is taken to end at 0."""
    process = Absorbing(V, LinearSchedule(eps_end=1e-3), t_min=1e-3)
    draw = masked.build_masking("importance")
    _, t, weight = draw(
        process, jax.random.key(0), jnp.zeros((64, L), jnp.int32), jnp.arange(64), 64, None
    )
    low, high = (np.log(process.mask_rate(v)) for v in (1e-3, 1.0))
    np.testing.assert_allclose(weight, high - low, rtol=1e-4)
    rates = np.sort(np.log(process.mask_rate(np.asarray(t, float))))
    np.testing.assert_allclose(np.diff(rates), (high - low) / 64, rtol=1e-2)


def test_the_reconstruction_term():
    md4 = Absorbing(7, MD4, t_min=0.0)
    assert objectives.uniform_reconstruction(md4, 10) == pytest.approx(10 * 1e-4 * np.log(7))
    linear = Absorbing(7, t_min=1e-3)
    assert objectives.uniform_reconstruction(linear, 10) == pytest.approx(1e-2 * np.log(7))


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


@pytest.mark.parametrize(
    "options, words",
    [
        ({"masking": "counts"}, "masking must be one of .*'counts'; did you mean 'count'"),
        ({"where": jnp.ones((1, 3), bool)}, r"where must be bool of shape \(1, 2\)"),
        ({"masking": "finite", "steps": 0}, "steps must be a positive int, got 0"),
        ({"masking": "importance"}, "needs a mask rate above 0 at t_min"),
    ],
)
def test_option_errors(options, words):
    tokens = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match=words):
        objectives.masked_cross_entropy(
            Absorbing(3, t_min=0.0), lambda x, t: x, jax.random.key(0), tokens, **options
        )
