"""What networks predict, against the definitions written in x0 and eps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import registry
from diffusion_jax.processes import PREDICTIONS, VP, convert, from_x0, to_x0

PROCESSES = {n: registry.get("process", n)() for n in registry.names("process", family="gaussian")}


def problem(process):
    """x0, eps, x_t [9, 3] and the point at 9 times over the whole interval."""
    rng = np.random.default_rng(0)
    x0, eps = rng.standard_normal((2, 9, 3))
    inner = np.linspace(process.t_min, process.t_max, 9)
    inner -= 0.3 / getattr(process, "num_train_steps", np.inf)  # off the knots of a list of betas
    point = process.point(inner)
    return x0, eps, process.corrupt(x0, eps, inner), point


def meant(kind, x0, eps, point):
    alpha, sigma, dalpha, dsigma = (
        np.asarray(point[k])[:, None] for k in ("alpha", "sigma", "dalpha", "dsigma")
    )
    return {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "velocity": dalpha * x0 + dsigma * eps,
    }[kind]


@pytest.mark.parametrize("name", PROCESSES)
def test_every_prediction_converts_into_every_other(name):
    x0, eps, x, point = problem(PROCESSES[name])
    for source in PREDICTIONS:
        given = meant(source, x0, eps, point)
        for target in PREDICTIONS:
            wanted = meant(target, x0, eps, point)
            got = convert(given, x, point, source, target)
            # x0 is what is left of x_t at the noisy end: errors grow like sigma / alpha
            size = np.abs(wanted).max(axis=1, keepdims=True)
            error = np.abs(got - wanted) / size
            assert error.max() < 1e-10, (source, target, error.max(axis=1))
        np.testing.assert_allclose(to_x0(source, given, x, point), x0, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(
            from_x0(source, to_x0(source, given, x, point), x, point),
            given,
            rtol=1e-8,
            atol=1e-10 * np.abs(given).max(),
        )


@pytest.mark.parametrize("name", PROCESSES)
def test_velocity_is_the_time_derivative_of_the_path(name, x64):
    process = PROCESSES[name]
    x0, eps, x, point = problem(process)
    t = jnp.asarray(point["t"])
    _, slope = jax.jvp(lambda t: process.corrupt(x0, eps, t), (t,), (jnp.ones_like(t),))
    got = from_x0("velocity", x0, x, point)
    size = np.abs(slope).max(axis=1, keepdims=True)
    assert (np.abs(got - slope) / size).max() < 1e-10


def test_score_is_the_gradient_of_the_log_density(x64):
    process = VP()
    x0, _, x, point = problem(process)

    def log_density(x, x0, alpha, sigma):
        return -0.5 * jnp.sum((x - alpha * x0) ** 2) / sigma**2

    score = jax.vmap(jax.grad(log_density))(x, x0, point["alpha"], point["sigma"])
    np.testing.assert_allclose(from_x0("score", x0, x, point), score, rtol=1e-9)


def test_scalar_times_serve_the_whole_batch():
    process = VP()
    rng = np.random.default_rng(1)
    x, value = rng.standard_normal((2, 5, 4, 4, 1))
    one, many = process.point(0.3), process.point(np.full(5, 0.3))
    for kind in PREDICTIONS:
        np.testing.assert_array_equal(to_x0(kind, value, x, one), to_x0(kind, value, x, many))


def test_float32_in_float32_out():
    process = VP()
    x = jnp.ones((4, 3))
    point = process.point(jnp.array([0.001, 0.2, 0.5, 1.0]))
    for kind in PREDICTIONS:
        assert convert(x, x, point, kind, "eps").dtype == jnp.float32
        assert to_x0(kind, x, x, process.point(0.5)).dtype == jnp.float32


@pytest.mark.parametrize("call", [to_x0, from_x0])
def test_unknown_prediction(call):
    x = np.zeros((1, 2))
    with pytest.raises(
        ValueError, match=r"prediction must be .*; got 'epsilon'; did you mean 'eps'\?"
    ):
        call("epsilon", x, x, VP().point(0.5))
    with pytest.raises(ValueError, match=r"one of x0, eps, v, score, velocity; got 'noise'$"):
        convert(x, x, VP().point(0.5), "x0", "noise")
