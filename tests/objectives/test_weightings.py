"""Every weighting is a plain error in another variable, or an integral known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import objectives, registry
from diffusion_jax.objectives import weightings
from diffusion_jax.processes import preconditioning

GAUSSIAN = {n: registry.get("process", n)() for n in registry.names("process", family="gaussian")}


def run(process, weighting, seed=0):
    """One loss in 64 bits with a model that knows nothing; returns what it saw and the loss."""
    rng = np.random.default_rng(seed)
    x0 = jnp.asarray(rng.standard_normal((12, 3)))
    seen = {}

    def denoise(x, t):
        seen.update(x=np.asarray(x), t=np.asarray(t))
        seen["x0_hat"] = np.asarray(jnp.tanh(x + t[:, None]))
        return jnp.tanh(x + t[:, None])

    losses, aux = objectives.denoising(
        process, denoise, jax.random.key(seed), x0, weighting=weighting, times="independent"
    )
    np.testing.assert_array_equal(aux["t"], seen["t"])
    point = {k: np.asarray(v)[:, None] for k, v in process.point(seen["t"]).items()}
    x0 = np.asarray(x0)
    eps = (seen["x"] - point["alpha"] * x0) / point["sigma"]
    eps_hat = (seen["x"] - point["alpha"] * seen["x0_hat"]) / point["sigma"]
    return np.asarray(losses), x0, seen["x0_hat"], eps, eps_hat, point, seen


def mean_square(difference):
    return (difference**2).mean(axis=1)


def errors(process, x0, x0_hat, eps, eps_hat, p):
    """The mean squared error of each prediction, from x0 and eps alone."""
    c = preconditioning.edm(p, 0.5)
    x = p["alpha"] * x0 + p["sigma"] * eps
    return {
        "x0": mean_square(x0 - x0_hat),
        "eps": mean_square(eps - eps_hat),
        "v": mean_square(
            (p["alpha"] * eps - p["sigma"] * x0) - (p["alpha"] * eps_hat - p["sigma"] * x0_hat)
        ),
        "velocity": mean_square(
            p["dalpha"] * x0 + p["dsigma"] * eps - p["dalpha"] * x0_hat - p["dsigma"] * eps_hat
        ),
        # of the raw network output under EDM's preconditioning
        "edm": mean_square((x0 - c.c_skip * x) / c.c_out - (x0_hat - c.c_skip * x) / c.c_out),
        "min_snr": np.minimum(mean_square(eps - eps_hat), 5.0 * mean_square(x0 - x0_hat)),
    }


@pytest.mark.parametrize("weighting", ["x0", "eps", "v", "velocity", "edm", "min_snr"])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_a_weighting_is_the_plain_error_in_its_prediction(name, weighting, x64):
    losses, *parts, _ = run(GAUSSIAN[name], weighting)
    np.testing.assert_allclose(losses, errors(GAUSSIAN[name], *parts)[weighting], rtol=1e-6)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_integrals_weigh_by_the_rate_of_the_log_snr(name, x64):
    process = GAUSSIAN[name]
    t = np.linspace(process.t_min, process.t_max, 22)[1:-1]
    t -= 0.3 / getattr(process, "num_train_steps", np.inf)  # off the knots of a list of betas
    step = 1e-6 * t
    rate = -(process.log_snr(t + step) - process.log_snr(t - step)) / (2 * step)
    slope = -(np.exp(process.log_snr(t + step)) - np.exp(process.log_snr(t - step))) / (2 * step)
    on_device = jnp.asarray(t)
    np.testing.assert_allclose(weightings.elbo(process, on_device), 0.5 * slope, rtol=1e-6)
    gate = 1.0 / (1.0 + np.exp(process.log_snr(t) - 2.0))  # sigmoid(2 - log_snr)
    expected = 0.5 * rate * gate * np.exp(process.log_snr(t))
    np.testing.assert_allclose(weightings.sigmoid(process, on_device), expected, rtol=1e-6)


def test_which_weightings_are_integrals():
    integrals = {n for n in registry.names("weighting") if weightings.build_weighting(n).integral}
    assert integrals == {"elbo", "sigmoid"}


def test_building(x64):
    process, t = GAUSSIAN["vp"], jnp.array([0.01, 0.5])
    capped = weightings.build_weighting("min_snr", gamma=2.0)
    np.testing.assert_allclose(
        capped.weight(process, t), [2.0, process.alpha(0.5) ** 2 / process.sigma(0.5) ** 2]
    )
    own = weightings.build_weighting(lambda process, t: 3.0 * t)
    assert not own.integral
    np.testing.assert_allclose(own.weight(process, t), 3.0 * t)
    again = weightings.build_weighting(capped)
    np.testing.assert_array_equal(again.weight(process, t), capped.weight(process, t))
    with pytest.raises(ValueError, match="unknown weighting 'min_srn'; did you mean 'min_snr'"):
        weightings.build_weighting("min_srn")
