"""Bounds of finite chains: D3PM's, VQ-Diffusion's, CDCD's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax.objectives.score_entropy import score_entropy
from diffusion_jax.objectives.transition_kl import (
    chain_losses,
    contrastive_losses,
    cross_entropy,
    hybrid_loss,
    other_examples,
    shuffled_chunks,
    transition_kl,
)
from diffusion_jax.processes import Absorbing, Uniform, ctmc, d3pm, mask_replace, scores

STORED = golden("discrete_chains")
K, T = 5, 8


@pytest.mark.parametrize("name", ("absorbing", "uniform", "gaussian"))
def test_d3pms_terms(name):
    """KL for k > 1, cross-entropy of the network's output for k = 1, for every (x_t, x_0)."""
    options = {"beta_min": 0.05, "beta_max": 0.6} if name == "gaussian" else {}
    process = d3pm(K - (name == "absorbing"), name, T, dtype="float64", **options)
    logits = STORED[f"d3pm_{name}_logits"][:, None].repeat(K, axis=1)  # [x_t, x_0, K]
    xt, x0 = np.indices((K, K))
    for i, k in enumerate(STORED[f"d3pm_{name}_k"]):
        expected = STORED[f"d3pm_{name}_kl"][i]
        got = chain_losses(process, logits, x0, xt, (k + 1) / T, k / T)
        seen = np.isfinite(expected) & (x0 < process.vocab_size)
        assert seen.any()
        np.testing.assert_allclose(got[seen], expected[seen], rtol=0, atol=1e-10)


def test_mass_on_the_mask_as_in_mdlms_baseline():
    x0, xt, mask, t, logits = (
        STORED[f"losses_{n}"] for n in ("x0", "x_t", "mask", "t", "d3pm_logits")
    )
    steps = int(STORED["losses_d3pm_T"])
    t = np.minimum((np.floor(t * steps) + 1) / steps, 1.0 - 1e-4)
    got = steps * transition_kl(Absorbing(4), logits, x0, xt, t, t - 1.0 / steps)
    np.testing.assert_allclose(got, STORED["losses_d3pm_loss_per_token"], rtol=0, atol=1e-9)
    assert (got[~mask] == 0).all()


def cdcd():
    names = ("k", "x0", "xt", "neg", "logp")
    k, x0, xt, negatives, logits = (STORED[f"d3pm_cdcd_{n}"] for n in names)
    return mask_replace(5, 8), logits, x0, xt, negatives, (k + 1) / 8, k / 8


def test_vq_diffusion_and_contrastive_terms():
    process, logits, x0, xt, negatives, t, s = cdcd()
    positive = chain_losses(process, logits, x0, xt, t, s, parameterization="posterior")
    np.testing.assert_allclose(positive, STORED["d3pm_cdcd_kl_pos"], rtol=0, atol=1e-10)
    for wise in ("step", "sample"):
        pushed = contrastive_losses(process, logits, negatives, xt, t, s, wise=wise)
        expected = STORED[f"d3pm_cdcd_kl_neg_{wise}"].mean(axis=0)
        np.testing.assert_allclose(pushed, expected, rtol=0, atol=1e-10)
        loss = positive.sum() - 5e-5 * pushed.sum()
        np.testing.assert_allclose(loss, STORED[f"d3pm_cdcd_loss_{wise}"], rtol=0, atol=1e-10)


def test_a_negative_that_is_the_data_undoes_the_positive_term():
    process, logits, x0, xt, _, t, s = cdcd()
    own = lambda w: chain_losses(process, w, x0, xt, t, s, parameterization="posterior").sum()
    pushed = lambda w: contrastive_losses(process, w, jnp.asarray(x0)[None], xt, t, s).sum()
    a, b = quick_jit(lambda w: (jax.grad(own)(w), -jax.grad(pushed)(w)))(jnp.asarray(logits))
    np.testing.assert_allclose(a, -b, rtol=1e-5, atol=1e-7)
    assert np.abs(a).max() > 0.01


def test_mixture_and_plug_in_are_one_chain():
    """A posterior network and the leave-one-out network that Bayes' rule makes of it cost the same."""
    process, logits, x0, xt, _, t, s = cdcd()
    other = scores.leave_one_out(process, logits, xt, t)
    a = transition_kl(process, logits, x0, xt, t, s, parameterization="posterior")
    np.testing.assert_allclose(transition_kl(process, other, x0, xt, t, s), a, atol=1e-12)
    assert np.abs(transition_kl(process, logits, x0, xt, t, s) - a).max() > 1e-3


def test_absorbing_terms_are_md4s():
    """T KL of the masked chain is T (alpha_s - alpha_t) / (1 - alpha_t) CE at masked positions."""
    process, rng = Absorbing(4), np.random.default_rng(0)
    logits, x0 = rng.normal(size=(3, 6, 4)), rng.integers(0, 4, (3, 6))
    xt = np.where(rng.uniform(size=(3, 6)) < 0.6, 4, x0)
    t = np.array([0.2, 0.6, 1.0])
    got = transition_kl(process, logits, x0, xt, t, t - 0.2)
    weight = (0.2 / t)[:, None] * (xt == 4)
    np.testing.assert_allclose(got, weight * cross_entropy(logits, x0), rtol=1e-9, atol=1e-12)


def network(x, t):
    near = jax.nn.one_hot(jnp.roll(x, 1, axis=1) % 4, 4)
    return 1.5 * near + jnp.arange(4) * 0.2 + t[:, None, None] * jnp.arange(4)


def batch(num=16, length=8):
    return jax.random.randint(jax.random.key(5), (num, length), 0, 4)


PROCESSES = {
    "gaussian": (d3pm(4, "gaussian", 5, beta_max=0.3), {}),
    "mask_replace": (mask_replace(4, 5), {"parameterization": "posterior"}),
    "absorbing": (Absorbing(4), {"num_steps": 5}),
    "uniform": (Uniform(4), {"num_steps": 5, "first_step": "chain"}),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_hybrid_loss(name):
    """Against its parts by host numbers, at the drawn times; contrast 0 and the weights."""
    (process, options), tokens, key = PROCESSES[name], batch(), jax.random.key(2)
    seen = {}

    def keep(x, t):
        seen.update(x=x, t=t, logits=network(x, t))
        return seen["logits"]

    @quick_jit
    def run():
        return hybrid_loss(process, keep, key, tokens, auxiliary=0.01, **options), seen

    (losses, aux), seen = run()
    xt, t = np.asarray(seen["x"]), np.asarray(seen["t"], np.float64)
    assert set(np.round(5 * t).astype(int)) <= set(range(1, 6)) and len(np.unique(t)) >= 4
    logits = np.asarray(seen["logits"], np.float64)
    rest = {k: v for k, v in options.items() if k != "num_steps"}
    for i, time in enumerate(np.round(5 * t) / 5):
        expected = chain_losses(
            process, logits[i], np.asarray(tokens[i]), xt[i], float(time), float(time) - 0.2, **rest
        ).sum()
        span = 1.0 - process.t_min
        np.testing.assert_allclose(aux["bound"][i], 5 * expected * span, rtol=2e-4, atol=1e-5)
        expected += 0.01 * cross_entropy(logits[i], np.asarray(tokens[i])).sum()
        np.testing.assert_allclose(losses[i], expected * span, rtol=2e-4, atol=1e-5)


def test_contrast_is_subtracted_and_zero_is_vq_diffusion():
    process, tokens, key = mask_replace(4, 5), batch(), jax.random.key(2)
    options = {"parameterization": "posterior", "auxiliary_weight": "falling", "auxiliary": 5e-4}

    @quick_jit
    def run():
        made = {
            wise: hybrid_loss(
                process,
                network,
                key,
                tokens,
                contrast=0.1,
                wise=wise,
                num_negatives=3,
                chunks=4,
                **options,
            )
            for wise in ("step", "sample")
        }
        inter = hybrid_loss(
            process,
            network,
            key,
            tokens,
            contrast=0.1,
            negatives="inter",
            num_negatives=3,
            **options,
        )
        return hybrid_loss(process, network, key, tokens, **options), made, inter

    (plain, aux), made, (inter, more) = run()
    assert "contrast" not in aux
    for losses, extra in (*made.values(), (inter, more)):
        weight = 1.0 + (extra["t"] - 0.2)
        np.testing.assert_allclose(losses, plain - 0.1 * weight * extra["contrast"], rtol=1e-5)
    assert (made["step"][0] != made["sample"][0]).any() and (inter != made["step"][0]).any()


def test_negatives():
    tokens = jnp.arange(2 * 11).reshape(2, 11)
    keys = jax.random.split(jax.random.key(0), 2)
    shuffle = quick_jit(lambda keys, tokens: shuffled_chunks(keys, tokens, 6, chunks=4))
    mixed = np.asarray(shuffle(keys, tokens))
    assert mixed.shape == (6, 2, 11)
    np.testing.assert_array_equal(mixed[..., 8:], np.tile(tokens[:, 8:], (6, 1, 1)))
    np.testing.assert_array_equal(np.sort(mixed, axis=-1), np.tile(tokens, (6, 1, 1)))
    pairs = mixed[..., :8].reshape(6, 2, 4, 2)
    assert (pairs[..., 1] == pairs[..., 0] + 1).all()  # chunks stay whole
    assert len(np.unique(mixed[:, 0], axis=0)) > 3
    alone = shuffle(keys[1:], tokens[1:])
    np.testing.assert_array_equal(alone[:, 0], mixed[:, 1])
    np.testing.assert_array_equal(other_examples(batch(4), 3)[2, 0], batch(4)[1])


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: hybrid_loss(Uniform(4), network, jax.random.key(0), batch()), "pass num_steps"),
        (
            lambda: hybrid_loss(
                mask_replace(4, 5), network, jax.random.key(0), batch(), num_steps=6
            ),
            "the process has 5 steps, num_steps says 6",
        ),
        (
            lambda: hybrid_loss(
                mask_replace(4, 5), network, jax.random.key(0), batch(), auxiliary_weight="rising"
            ),
            "auxiliary_weight must be one of constant, falling",
        ),
        (
            lambda: hybrid_loss(
                mask_replace(4, 5), network, jax.random.key(0), batch(), negatives="others"
            ),
            "negatives must be one of intra, inter",
        ),
        (lambda: other_examples(batch(3), 3), "3 examples have no 3 others"),
        (lambda: shuffled_chunks(None, batch(), 2, chunks=9), r"chunks must lie in 2..8"),
        (
            lambda: chain_losses(
                mask_replace(4, 5),
                np.zeros((1, 4)),
                np.zeros(1, int),
                np.zeros(1, int),
                0.2,
                0.0,
                first_step="net",
            ),
            "first_step must be one of network, chain; got 'net'",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_chain_of_rates_is_taken_at_host_times():
    """KL of a `CTMC` step, whose limit T KL is the continuous-time bound."""
    process, rng = ctmc(4, "nearest_neighbour"), np.random.default_rng(0)
    logits, x0, xt = rng.normal(size=(6, 4)), rng.integers(0, 4, 6), rng.integers(0, 4, 6)
    log_score = scores.concrete_score(process, logits, xt, 0.5)
    limit = process.rate(0.5) * score_entropy(process, log_score, x0, xt, 0.5)
    gaps = [
        np.abs(transition_kl(process, logits, x0, xt, 0.5, 0.5 - dt) / dt - limit).max()
        for dt in (1e-3, 5e-4)
    ]
    assert gaps[0] < 0.05 * limit.max() and gaps[0] / gaps[1] == pytest.approx(2.0, abs=0.1)
