"""Preconditioning: unit variance in and out of the network, and the authors' tables."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import registry
from diffusion_jax.processes import EDM, VP, BrownianBridge, VEBridge, VPBridge, preconditioning

GAUSSIAN = {n: registry.get("process", n)() for n in registry.names("process", family="gaussian")}
BRIDGES = {"vp": VPBridge(), "ve": VEBridge(), "brownian": BrownianBridge(scale=0.7)}


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_edm_gives_the_network_unit_variance(name, sigma_data):
    process = GAUSSIAN[name]
    point = process.point(np.linspace(process.t_min, process.t_max, 30))
    alpha, sigma = point["alpha"], point["sigma"]
    c = preconditioning.edm(point, sigma_data)
    variance_x = alpha**2 * sigma_data**2 + sigma**2
    np.testing.assert_allclose(c.c_in**2 * variance_x, 1.0, rtol=1e-12)

    def residual_variance(c_skip):
        """Var(x0 - c_skip x) = Var((1 - c_skip alpha) x0 - c_skip sigma eps)."""
        return (1.0 - c_skip * alpha) ** 2 * sigma_data**2 + (c_skip * sigma) ** 2

    np.testing.assert_allclose(residual_variance(c.c_skip), c.c_out**2, rtol=1e-10)
    for nearby in (c.c_skip + 1e-3 / alpha, c.c_skip - 1e-3 / alpha):  # c_skip is the best choice
        assert (residual_variance(nearby) >= residual_variance(c.c_skip)).all()


def test_edm_is_the_table_of_the_paper():
    sigma, sd = np.array([0.002, 0.1, 0.5, 3.0, 80.0]), 0.5
    c = preconditioning.edm(EDM().point(sigma / 80.0), sd)
    np.testing.assert_allclose(c.c_skip, sd**2 / (sigma**2 + sd**2), rtol=1e-12)
    np.testing.assert_allclose(c.c_out, sigma * sd / np.sqrt(sigma**2 + sd**2), rtol=1e-12)
    np.testing.assert_allclose(c.c_in, 1 / np.sqrt(sigma**2 + sd**2), rtol=1e-12)
    np.testing.assert_allclose(c.c_noise, np.log(sigma) / 4, rtol=1e-12)


def test_edm_of_any_schedule_is_edm_of_the_rescaled_variable():
    point = VP().point(np.array([0.01, 0.3, 0.8]))
    u = point["sigma"] / point["alpha"]
    ours, papers = preconditioning.edm(point), preconditioning.edm(EDM().point(u / 80.0))
    np.testing.assert_allclose(ours.c_skip * point["alpha"], papers.c_skip, rtol=1e-12)
    np.testing.assert_allclose(ours.c_in * point["alpha"], papers.c_in, rtol=1e-12)
    np.testing.assert_allclose(ours.c_out, papers.c_out, rtol=1e-12)
    np.testing.assert_allclose(ours.c_noise, papers.c_noise, rtol=1e-12)


@pytest.mark.parametrize("statistics", [(0.5, 0.5, 0.0), (0.5, 0.9, 0.2), (1.2, 0.3, -0.25)])
@pytest.mark.parametrize("name", BRIDGES)
def test_ddbm_gives_the_network_unit_variance(name, statistics):
    process, (sd0, sd1, covariance) = BRIDGES[name], statistics
    point = process.point(np.linspace(process.t_min, 1.0, 30))
    a, b, c = point["a"], point["b"], point["c"]
    got = preconditioning.ddbm(point, sd0, sd1, covariance, process.clock_scale)
    joint = np.array([[sd0**2, covariance], [covariance, sd1**2]])  # of (x0, x1)
    of_x = np.stack([b, a], axis=-1)
    variance_x = np.einsum("ti,ij,tj->t", of_x, joint, of_x) + c**2
    with_x0 = of_x @ joint[0]
    np.testing.assert_allclose(got.c_in**2 * variance_x, 1.0, rtol=1e-12)
    residual = sd0**2 - 2 * got.c_skip * with_x0 + got.c_skip**2 * variance_x
    np.testing.assert_allclose(residual, got.c_out**2, rtol=1e-7, atol=1e-14)
    np.testing.assert_allclose(
        got.c_skip, with_x0 / variance_x, rtol=1e-12
    )  # regression of x0 on x


@pytest.mark.parametrize("name, row", [("vp", "precond0"), ("vp", "precond1")])
def test_ddbm_is_the_official_one_vp(name, row):
    _check_official(name, row, VPBridge(), 1.0)


@pytest.mark.parametrize("name, row", [("ve", "precond0"), ("ve", "precond1")])
def test_ddbm_is_the_official_one_ve(name, row):
    _check_official(name, row, VEBridge(), 80.0)


def _check_official(name, row, process, clock):
    g = golden("processes_bridge")
    sd, covariance = g[f"{name}_{row}_sd_cov"]
    assert process.clock_scale == clock
    point = process.point(g[f"{name}_t"] / clock)
    c = preconditioning.ddbm(point, sd, sd, covariance, clock)
    for ours, theirs in zip((c.c_skip, c.c_in, c.c_out, c.c_noise), g[f"{name}_{row}"]):
        np.testing.assert_allclose(ours, theirs, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(1.0 / c.c_out**2, g[f"{name}_{row}"][4], rtol=1e-9)


def test_ddbm_becomes_edm_when_the_source_is_infinitely_far():
    """As sigma_max grows at a fixed noise level, the bridge forgets its end point."""
    sigma = np.array([0.01, 0.5, 4.0])
    bridge = VEBridge(sigma_max=1e5)
    c = preconditioning.ddbm(bridge.point(sigma / 1e5), 0.5, 0.8, 0.1, bridge.clock_scale)
    limit = preconditioning.edm(EDM().point(sigma / 80.0), 0.5)
    for name in ("c_skip", "c_out", "c_in"):
        np.testing.assert_allclose(getattr(c, name), getattr(limit, name), rtol=1e-6)
    np.testing.assert_allclose(c.c_noise, 1000.0 * limit.c_noise, rtol=1e-9)


def test_float32():
    t = jnp.array([1e-4, 0.3, 0.9999])
    exact = preconditioning.ddbm(VPBridge().point(np.asarray(t, float)), 0.5, 0.5, 0.125)
    got = preconditioning.ddbm(VPBridge().point(t), 0.5, 0.5, 0.125)
    for ours, reference in zip(got, exact):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, reference, rtol=2e-6)
