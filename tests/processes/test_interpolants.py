"""Interpolants against the authors' program, and the processes that they are under another name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import processes
from diffusion_jax.processes import BrownianBridge, Cosine, Interpolant, RectifiedFlow

STORED = golden("bridges_si")
T = 1.0 - STORED["t"]  # the paper's clock runs the other way
GAMMAS = {
    "brownian": "brownian",
    "quadratic": "bsquared",
    "sin2": "sinesquared",
    "sigmoid": "sigmoid",
}
PATHS = {"linear": "linear", "trig": "trig", "encoder_decoder": "encoding-decoding"}
COSINE = Cosine(s=1e-15)  # without the offset of arXiv 2102.09672
ONE_SIDED = {"one-sided-linear": RectifiedFlow(), "one-sided-trig": COSINE}


@pytest.mark.parametrize(("ours", "theirs"), GAMMAS.items())
def test_latent_noise_of_the_authors(ours, theirs):
    process = Interpolant(gamma=ours)
    gamma, slope, product = STORED[f"gamma_{theirs}"]
    np.testing.assert_allclose(process.c(T), gamma, rtol=0, atol=2e-15)
    cc = process.slopes(T)["cc"]
    np.testing.assert_allclose(-cc, product, rtol=0, atol=2e-15)
    np.testing.assert_allclose(-cc / process.c(T), slope, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("ours", "theirs"), PATHS.items())
def test_paths_of_the_authors(ours, theirs):
    process = Interpolant(path=ours)
    slopes = process.slopes(T)
    found = process.a(T), -slopes["a"], process.b(T), -slopes["b"]
    np.testing.assert_allclose(found, STORED[f"path_{theirs}"], rtol=0, atol=2e-15)


@pytest.mark.parametrize("name", ONE_SIDED)
def test_one_sided_interpolants_are_gaussian_processes(name):
    """x_t = a x1 + b x0 with x1 standard normal: alpha = b and sigma = a."""
    process = ONE_SIDED[name]
    found = process.sigma(T), -process.dsigma(T), process.alpha(T), -process.dalpha(T)
    np.testing.assert_allclose(found, STORED[f"path_{name}"], rtol=0, atol=1e-14)


def test_without_noise_the_paths_are_those_of_the_gaussian_processes():
    for path, process in (("linear", RectifiedFlow()), ("trig", COSINE)):
        interpolant = Interpolant(path=path, gamma="none")
        slopes = interpolant.slopes(T)
        assert not interpolant.c(T).any() and not slopes["cc"].any()
        np.testing.assert_allclose(interpolant.a(T), process.sigma(T), rtol=0, atol=1e-14)
        np.testing.assert_allclose(interpolant.b(T), process.alpha(T), rtol=0, atol=1e-14)
        np.testing.assert_allclose(slopes["a"], process.dsigma(T), rtol=0, atol=1e-14)


def test_the_linear_brownian_interpolant_is_the_brownian_bridge():
    interpolant, bridge = Interpolant(scale=0.7), BrownianBridge(scale=0.7)
    for name in "abc":
        found, expected = (getattr(p, name)(T) for p in (interpolant, bridge))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-15)
    mine, theirs = interpolant.slopes(T), bridge.slopes(T)
    for name in ("a", "b", "cc"):
        np.testing.assert_allclose(mine[name], theirs[name], rtol=0, atol=2e-15)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("path", PATHS)
def test_slopes_are_derivatives(path, gamma, x64):
    process = Interpolant(path=path, gamma=gamma, scale=0.8)
    t = jnp.asarray(T)
    slopes = process.slopes(t)
    each = jax.vmap(jax.grad(process.a))(t), jax.vmap(jax.grad(process.b))(t)
    cc = jax.vmap(jax.grad(lambda v: 0.5 * process.c(v) ** 2))(t)
    # at t = 1/2 the encoder-decoder changes its form; both slopes are 0 there
    for found, expected in zip((slopes["a"], slopes["b"], slopes["cc"]), (*each, cc)):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", ("none", *GAMMAS))
@pytest.mark.parametrize("path", PATHS)
def test_ends(path, gamma):
    """At both ends nothing but the end itself is left."""
    if (path, gamma) == ("encoder_decoder", "none"):
        with pytest.raises(ValueError, match="needs a gamma"):
            Interpolant(path=path, gamma=gamma)
        return
    process = Interpolant(path=path, gamma=gamma, scale=0.9)
    for t, a, b in ((0.0, 0.0, 1.0), (1.0, 1.0, 0.0)):
        point = process.point(t)
        found = [float(point[name]) for name in "abc"]
        np.testing.assert_allclose(found, (a, b, 0.0), rtol=0, atol=1e-14)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"unknown path 'lienar'.*did you mean 'linear'"):
        Interpolant(path="lienar")
    with pytest.raises(ValueError, match="unknown gamma 'brown'"):
        Interpolant(gamma="brown")
    with pytest.raises(ValueError, match=r"'trig' needs c < 1: scale = 3.0"):
        Interpolant(path="trig", scale=3.0)
    with pytest.raises(ValueError, match="scale = 0"):
        processes.Interpolant(scale=0.0)
