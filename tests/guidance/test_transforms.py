"""Denoiser -> denoiser, on Gaussian data, on bridges and on logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import guidance, oracles, samplers
from diffusion_jax.processes import VP, VPBridge

PROCESS = VP()
X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2)), jnp.float32)


def gaussian(mean, scale):
    return oracles.Gaussian(PROCESS, np.array(mean), scale * np.eye(2))


CONDITIONAL, UNCONDITIONAL = gaussian([0.8, 0.2], 0.05), gaussian([0.0, 0.0], 0.5)


def bridge_oracle(source):
    process, eye = VPBridge(), np.eye(2)
    return oracles.GaussianBridge(process, source, np.zeros(2), np.zeros(2), eye, 0.6 * eye, eye)


def test_clip():
    wild = lambda x, t: 3.0 * x
    np.testing.assert_array_equal(guidance.clip(wild)(X, 0.5), jnp.clip(3.0 * X, -1, 1))
    np.testing.assert_array_equal(
        guidance.clip(wild, -0.2, 0.4)(X, 0.5), jnp.clip(3 * X, -0.2, 0.4)
    )
    mild = lambda x, t: 0.01 * x
    np.testing.assert_array_equal(guidance.clip(mild)(X, 0.5), 0.01 * X)


def test_guidance_weights():
    c, u = CONDITIONAL(X, 0.4), UNCONDITIONAL(X, 0.4)
    for weight, exact in ((0.0, u), (1.0, c), (2.0, 2 * c - u), (0.3, 0.3 * c + 0.7 * u)):
        got = guidance.guide(CONDITIONAL, UNCONDITIONAL, weight)(X, 0.4)
        np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)


def test_guidance_tilts_the_score():
    """guide of x0_hat is Ho and Salimans' rule on scores: u + w (c - u)."""
    alpha, sigma = PROCESS.alpha(0.4), PROCESS.sigma(0.4)
    guided = guidance.guide(CONDITIONAL, UNCONDITIONAL, 2.5)(X, 0.4)
    score = (alpha * guided - X) / sigma**2
    c, u = CONDITIONAL.score(X, 0.4), UNCONDITIONAL.score(X, 0.4)
    np.testing.assert_allclose(score, u + 2.5 * (c - u), rtol=1e-3, atol=1e-3)


def test_guidance_of_logits():
    c, u = jnp.log(jnp.array([[[0.7, 0.3]]])), jnp.log(jnp.array([[[0.5, 0.5]]]))
    guided = guidance.guide(lambda x, t: c, lambda x, t: u, 2.0)(jnp.array([[2]]), 0.5)
    tilted = 0.7**2 / 0.5, 0.3**2 / 0.5
    np.testing.assert_allclose(jax.nn.softmax(guided)[0, 0], tilted / np.sum(tilted), rtol=1e-6)


@pytest.mark.parametrize("family", ["gaussian", "bridge"])
def test_inpainting(family):
    denoise = CONDITIONAL if family == "gaussian" else bridge_oracle(X + 1.0)
    known, unknown = jnp.full((4, 2), 0.25), jnp.array([1.0, 0.0])
    got = guidance.inpaint(denoise, known, unknown)(X, 0.4)
    np.testing.assert_allclose(got[:, 0], denoise(X, 0.4)[:, 0], rtol=1e-6)
    np.testing.assert_array_equal(got[:, 1], known[:, 1])
    by_example = jnp.array([[1, 1], [0, 1], [1, 0], [0, 0]], jnp.float32)
    got = guidance.inpaint(denoise, known, by_example)(X, 0.4)
    np.testing.assert_allclose(got, jnp.where(by_example == 1, denoise(X, 0.4), known), rtol=1e-6)


def test_transforms_pass_the_whole_point_on():
    """A solver hands float64 schedule values down; a transform must not fall back to t."""
    seen = []

    class Inner:
        def __call__(self, x, t):
            seen.append("t")
            return x

        def at(self, x, point):
            seen.append(sorted(point))
            return x

    whole = guidance.clip(guidance.guide(Inner(), Inner(), 2.0))
    point = PROCESS.point(0.5)
    whole.at(X, point)
    assert seen == [sorted(point)] * 2
    seen.clear()
    whole(X, 0.5)
    assert seen == ["t"] * 2


def test_composition():
    """Inner first: clip(guide) clips what guidance overshoots, guide(clip) does not."""
    c, u = CONDITIONAL(X, 0.4), UNCONDITIONAL(X, 0.4)
    outer = guidance.clip(guidance.guide(CONDITIONAL, UNCONDITIONAL, 5.0))
    np.testing.assert_allclose(
        outer(X, 0.4), jnp.clip(u + 5 * (c - u), -1, 1), rtol=1e-4, atol=1e-5
    )
    inner = guidance.guide(guidance.clip(CONDITIONAL, -0.1, 0.1), UNCONDITIONAL, 5.0)
    expected = u + 5 * (jnp.clip(c, -0.1, 0.1) - u)
    np.testing.assert_allclose(inner(X, 0.4), expected, rtol=1e-4, atol=1e-5)
    filled = guidance.inpaint(outer, jnp.zeros((4, 2)), jnp.array([0.0, 1.0]))
    assert (filled(X, 0.4)[:, 0] == 0).all()


def test_sweeping_the_weight_does_not_trace_again():
    traces = []

    @quick_jit
    def call(denoise, x):
        traces.append(1)
        return denoise(x, 0.4)

    outputs = [
        call(guidance.clip(guidance.guide(CONDITIONAL, UNCONDITIONAL, w), -9.0, high), X)
        for w, high in ((0.5, 9.0), (1.0, 9.0), (4.0, 8.0))
    ]
    assert len(traces) == 1
    assert not np.allclose(outputs[0], outputs[2])


def test_guided_and_inpainted_sampling():
    """Guidance pushes samples away from the unconditional mean; what is known ends where it must."""
    sampler = samplers.dpm_solver_pp(PROCESS, num_steps=12)
    start = PROCESS.prior(jax.random.key(0), (256, 2))
    unguided = samplers.sample(
        sampler, guidance.guide(CONDITIONAL, UNCONDITIONAL, 1.0), None, start
    )
    np.testing.assert_allclose(
        unguided, samplers.sample(sampler, CONDITIONAL, None, start), rtol=1e-3, atol=1e-4
    )
    pushed = samplers.sample(sampler, guidance.guide(CONDITIONAL, UNCONDITIONAL, 3.0), None, start)
    assert pushed[:, 0].mean() > unguided[:, 0].mean() + 0.05
    held = guidance.inpaint(CONDITIONAL, jnp.full((256, 2), -0.7), jnp.array([1.0, 0.0]))
    filled = samplers.sample(sampler, held, None, start)
    np.testing.assert_allclose(filled[:, 1], -0.7, atol=0.05)


def test_guide_keeps_impossible_tokens_impossible():
    logits = jnp.array([[0.0, -jnp.inf]])
    mixed = guidance.guide(lambda x, t: logits + 1.0, lambda x, t: logits, 2.0)(None, 0.5)
    np.testing.assert_array_equal(mixed, [[2.0, -np.inf]])


def test_dynamic_threshold_is_the_published_rule(x64):
    stored = golden("solvers_schedules")
    x = stored["dynthr_in"]
    limited = guidance.dynamic_threshold(lambda x, t: x, quantile=0.95)(x, 0.5)
    np.testing.assert_allclose(limited, stored["dynthr_out_p095"], rtol=0, atol=1e-12)
    assert jnp.abs(limited).max() <= 1.0 < np.abs(x).max()
