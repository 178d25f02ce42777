"""From raw networks to denoisers: whatever a perfect network predicts, the denoiser is the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import oracles, registry
from diffusion_jax.denoisers import PARAMETERIZATIONS, Denoiser, evaluate
from diffusion_jax.processes import (
    PREDICTIONS,
    VP,
    Absorbing,
    Interpolant,
    VEBridge,
    VPBridge,
    from_x0,
    preconditioning,
)

GAUSSIAN = {n: registry.get("process", n)() for n in registry.names("process", family="gaussian")}
MEAN, COVARIANCE = np.array([0.3, -0.5]), np.array([[0.4, 0.1], [0.1, 0.2]])


def problem(process):
    t = np.linspace(process.t_min, process.t_max, 7)[1:-1]
    rng = np.random.default_rng(0)
    x = process.sigma(t)[:, None] * rng.standard_normal((5, 2)) + process.alpha(t)[:, None] * MEAN
    return jnp.asarray(x), jnp.asarray(t)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_every_parameterization_of_a_perfect_network_is_the_oracle(name, x64):
    process = GAUSSIAN[name]
    oracle = oracles.Gaussian(process, MEAN, COVARIANCE)
    x, t = problem(process)
    point = process.point(t)
    exact = oracle(x, t)

    def perfect(kind):
        def network(x, t):
            return from_x0(kind, oracle(x, t), x, process.point(t))

        return network

    c = preconditioning.edm(point, 0.7)

    def perfect_edm(x_in, c_noise):
        """Sees c_in x and c_noise, and answers in units of c_out."""
        np.testing.assert_allclose(c_noise, c.c_noise, rtol=1e-12)
        x = x_in / c.c_in[:, None]
        return (oracle(x, t) - c.c_skip[:, None] * x) / c.c_out[:, None]

    networks = {kind: perfect(kind) for kind in PREDICTIONS} | {"edm": perfect_edm}
    assert set(networks) == set(PARAMETERIZATIONS) - {"ddbm", "i2sb"}
    for kind, network in networks.items():
        denoise = Denoiser(network, process, kind, sigma_data=0.7)
        np.testing.assert_allclose(denoise(x, t), exact, rtol=1e-8, atol=1e-9, err_msg=kind)
        np.testing.assert_array_equal(denoise.at(x, point), denoise(x, t))


@pytest.mark.parametrize("process", [VPBridge(), VEBridge()], ids=["vp", "ve"])
def test_bridge_parameterizations_of_a_perfect_network_are_the_oracle(process, x64):
    rng = np.random.default_rng(1)
    source, x = (jnp.asarray(v) for v in rng.standard_normal((2, 4, 2)))
    oracle = oracles.GaussianBridge(
        process, source, MEAN, -MEAN, COVARIANCE, 0.5 * COVARIANCE, COVARIANCE
    )
    t = jnp.array([0.001, 0.3, 0.8, 0.99])
    point = process.point(t)
    c = preconditioning.ddbm(point, 0.6, 0.9, 0.1, process.clock_scale)

    def perfect(x_in, c_noise):
        np.testing.assert_allclose(c_noise, 250.0 * np.log(process.clock_scale * t), rtol=1e-12)
        x = x_in / c.c_in[:, None]
        return (oracle(x, t) - c.c_skip[:, None] * x) / c.c_out[:, None]

    denoise = Denoiser(perfect, process, "ddbm", 0.6, 0.9, 0.1)
    np.testing.assert_allclose(denoise(x, t), oracle(x, t), rtol=1e-8, atol=1e-10)
    np.testing.assert_array_equal(denoise.at(x, point), denoise(x, t))
    plain = Denoiser(lambda x, t: oracle(x, t), process, "x0")
    np.testing.assert_array_equal(plain(x, t), oracle(x, t))

    def base_noise(x, t):
        alpha, rho = process.alpha(t)[:, None], jnp.sqrt(process.rho2(t))[:, None]
        return (x - alpha * oracle(x, t)) / (alpha * rho)

    def bridge_noise(x, t):
        a, b, c = (point[name][:, None] for name in "abc")
        return (x - a * source - b * oracle(x, t)) / c

    for kind, network in (("i2sb", base_noise), ("eps", bridge_noise)):
        denoise = Denoiser(network, process, kind, source=source)
        np.testing.assert_allclose(denoise(x, t), oracle(x, t), rtol=1e-8, atol=1e-9, err_msg=kind)
        np.testing.assert_array_equal(denoise.at(x, point), denoise(x, t))
        # output_scale is the derivative of x0_hat by the network's output
        wrong = Denoiser(lambda x, t, n=network: n(x, t) + 0.1, process, kind, source=source)
        moved = np.abs(wrong(x, t) - denoise(x, t)) / 0.1
        scale = denoise.output_scale(point)[:, None]
        np.testing.assert_allclose(moved, np.broadcast_to(scale, moved.shape), rtol=1e-6)


def test_a_denoiser_is_a_pytree_of_parameters():
    def apply(weight, x, t):
        return weight * x + t

    traces = []

    @jax.jit
    def call(denoise, x):
        traces.append(1)
        return denoise(x, 0.5)

    x = jnp.ones((2, 3))
    outputs = []
    for weight, sigma_data in ((1.0, 0.5), (2.0, 0.5), (1.0, 0.7)):
        network = jax.tree_util.Partial(apply, jnp.float32(weight))
        outputs.append(call(Denoiser(network, VP(), "edm", sigma_data), x))
    assert len(traces) == 1
    assert not np.allclose(outputs[0], outputs[1]) and not np.allclose(outputs[0], outputs[2])


def test_evaluate_prefers_the_point_and_carries_a_cache():
    point = VP().point(0.3)
    assert evaluate(lambda x, t: x + t, 1.0, point) == (1.3, None)

    class ByPoint:
        def __call__(self, x, t):
            raise AssertionError("the point is known")

        def at(self, x, point):
            return x * point["alpha"]

    assert evaluate(ByPoint(), 2.0, point) == (2.0 * point["alpha"], None)

    def stateful(x, t, cache):
        return x + t, cache + 1

    assert evaluate(stateful, 1.0, point, 5) == (1.3, 6)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: Denoiser(None, VP(), "epsilon"),
            "unknown parameterization 'epsilon'; did you mean",
        ),
        (
            lambda: Denoiser(None, VPBridge(), "v"),
            "'v' is not defined for a bridge; valid: ddbm, eps, i2sb, x0",
        ),
        (lambda: Denoiser(None, VPBridge(), "eps"), "'eps' of a bridge needs its source"),
        (lambda: Denoiser(None, Interpolant(), "i2sb"), "needs the bridge of an SDE, got Interp"),
        (lambda: Denoiser(None, VP(), "i2sb"), "'i2sb' needs a bridge"),
        (lambda: Denoiser(None, VPBridge(), "edm"), "'edm' is not defined for a bridge"),
        (lambda: Denoiser(None, VP(), "ddbm"), "'ddbm' needs a bridge"),
        (lambda: Denoiser(None, Absorbing(4), "ddbm"), "'ddbm' needs a bridge"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
