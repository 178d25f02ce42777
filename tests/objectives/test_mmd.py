"""The unbiased squared MMD: the authors' numbers, loops over pairs, closed forms, and its mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax.evaluation.kernel import kernel_distance
from diffusion_jax.objectives import build_kernel, mmd2
from diffusion_jax.objectives.mmd import polynomial, rbf

KERNELS = {
    "poly1": polynomial(1),
    "poly3": polynomial(),
    "rbf": rbf(),
    "poly3_g05": polynomial(3, 0.5),
    "rbf_g05": rbf(0.5),
}


@pytest.mark.parametrize("name", KERNELS)
def test_values_and_gradients_of_the_official_code(x64, name):
    stored = golden("solvers_mmd_ot")
    x, y = jnp.asarray(stored["mmd_x"]), jnp.asarray(stored["mmd_y"])
    value, slope = jax.value_and_grad(mmd2)(x, y, KERNELS[name])
    np.testing.assert_allclose(value, stored[f"mmd2_{name}"], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(slope, stored[f"mmd2_{name}_grad_x"], rtol=1e-11, atol=1e-14)
    # symmetric in its sets
    np.testing.assert_allclose(mmd2(y, x, KERNELS[name]), value, rtol=1e-12, atol=1e-15)
    evaluated = kernel_distance(stored["mmd_y"], stored["mmd_x"], kernel=KERNELS[name])
    np.testing.assert_allclose(evaluated, value, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("name", KERNELS)
def test_float32_keeps_the_difference(name):
    """Within float32 of the terms that cancel, and far from the origin for a kernel of differences."""
    stored = golden("solvers_mmd_ot")
    shift = 30.0 if name.startswith("rbf") else 0.0
    x, y = (jnp.asarray(stored[n] + shift, jnp.float32) for n in ("mmd_x", "mmd_y"))
    value, slope = jax.value_and_grad(mmd2)(x, y, KERNELS[name])
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, stored[f"mmd2_{name}"], rtol=2e-5, atol=2e-6)
    wanted = stored[f"mmd2_{name}_grad_x"]
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max() + 1e-8)


def test_bfloat16_vectors_are_compared_in_float32():
    x = jax.random.normal(jax.random.key(0), (8, 3), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(1), (8, 3), jnp.bfloat16)
    value = mmd2(x, y)
    assert value.dtype == jnp.float32
    exact = kernel_distance(np.asarray(y, np.float64), np.asarray(x, np.float64))
    assert float(value) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("kernel", [polynomial(2, 0.3, 0.5), rbf(0.7)])
def test_sets_of_two_sizes_pair_by_pair(x64, kernel):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 3)), 0.3 + rng.normal(size=(5, 3))

    def k(a, b):
        if isinstance(kernel, rbf):
            return np.exp(-0.7 * np.sum((a - b) ** 2))
        return (0.3 * np.dot(a, b) + 0.5) ** 2

    def within(s):
        return np.mean([k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j])

    wanted = within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(mmd2(x, y, kernel), wanted, rtol=1e-12)
    np.testing.assert_allclose(kernel_distance(x, y, kernel=kernel), wanted, rtol=1e-11)


def test_mean_over_splits_of_one_set_is_zero():
    """The two sets of a split have one law: unbiased, so below zero as often as above."""
    rng = np.random.default_rng(1)
    data = rng.exponential(size=(40, 4)).astype(np.float32)
    for kernel in (polynomial(), rbf()):
        splits = jnp.asarray([data[rng.permutation(40)] for _ in range(1500)])
        values = np.asarray(jax.vmap(lambda s, k=kernel: mmd2(s[:16], s[16:], k))(splits))
        # drawing without replacement leaves each pair exchangeable: the mean is 0 exactly
        assert abs(values.mean()) < 4 * values.std() / np.sqrt(len(values))
        assert 0.2 < (values < 0).mean() < 0.9


def test_linear_kernel_is_the_distance_of_means():
    """E mmd2 = |mean difference|^2 / D for degree 1, whatever the other moments."""
    key = jax.random.key(0)
    x = 3.0 * jax.random.normal(key, (4000, 2))
    y = jax.random.normal(jax.random.fold_in(key, 1), (4000, 2)) + jnp.array([[1.0, 2.0]])
    assert float(mmd2(x, y, polynomial(1))) == pytest.approx(5.0 / 2.0, rel=0.1)


def test_gaussians_in_closed_form():
    """E k of the rbf kernel over N(0, s^2) and N(m, s^2) is (1 + 4 g s^2)^(-1/2) exp(-g m^2 / (1 + 4 g s^2))."""
    g, s, m = 0.6, 0.8, 1.1
    wide = 1.0 + 4.0 * g * s**2
    wanted = 2.0 * wide**-0.5 * (1.0 - np.exp(-g * m**2 / wide))
    rng = np.random.default_rng(3)
    x, y = rng.normal(0, s, (3000, 1)), rng.normal(m, s, (3000, 1))
    got = float(mmd2(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), rbf(g)))
    assert got == pytest.approx(wanted, rel=0.08)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: build_kernel("rbff"),
            "kernel must be one of polynomial, rbf; got 'rbff'; did you mean 'rbf'",
        ),
        (lambda: build_kernel("rbf", degree=2), "kernel 'rbf': .*degree"),
        (lambda: build_kernel("polynomial", degree=0), "degree must be a positive int, got 0"),
        (lambda: build_kernel("rbf", gamma=-1.0), "gamma must be positive, got -1.0"),
        (lambda: mmd2(np.zeros((3, 2)), np.zeros((3, 4))), r"got shapes \(3, 2\), \(3, 4\)"),
        (lambda: mmd2(np.zeros((3, 2, 2)), np.zeros((3, 4))), r"takes vectors \[N, D\]"),
        (lambda: mmd2(np.zeros((1, 2)), np.zeros((3, 2))), "2 vectors or more of each, got 1, 3"),
    ],
)
def test_refusals(make, words):
    with pytest.raises(ValueError, match=words):
        make()
