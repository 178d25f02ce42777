"""The denoising loss on Gaussian data, where its minimum is an integral known exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import objectives, oracles
from diffusion_jax.processes import EDM, VP, RectifiedFlow

COUNT = 8192
MEAN = np.array([0.3, -0.6])
COVARIANCE = np.array([[0.3, 0.1], [0.1, 0.2]])
EIGENVALUES = np.linalg.eigvalsh(COVARIANCE)
PROCESSES = {"vp": VP(), "edm": EDM(), "rectified_flow": RectifiedFlow()}
PLAIN = ("x0", "eps", "v", "velocity", "edm", "min_snr")
INTEGRALS = ("elbo", "sigmoid")


def data():
    noise = np.random.default_rng(0).standard_normal((COUNT, 2))
    return jnp.asarray(MEAN + noise @ np.linalg.cholesky(COVARIANCE).T, jnp.float32)


def exact_weights(process, t):
    """Each weighting from the definition of its loss, NumPy."""
    p = process.point(t)
    alpha, sigma, dalpha, dsigma = (p[k] for k in ("alpha", "sigma", "dalpha", "dsigma"))
    snr = (alpha / sigma) ** 2
    rate = 2.0 * (dsigma / sigma - dalpha / alpha)  # -d log_snr / dt
    return {
        "x0": np.ones_like(t),
        "eps": snr,
        "v": (alpha**2 / sigma + sigma) ** 2,
        "velocity": (dalpha - dsigma * alpha / sigma) ** 2,
        "edm": snr + 1.0 / 0.5**2,
        "min_snr": np.minimum(snr, 5.0),
        "elbo": 0.5 * rate * snr,
        "sigmoid": 0.5 * rate * snr / (1.0 + snr * np.exp(-2.0)),
    }


def exact_minima(process):
    """E w(t) tr Cov(x0 | x_t) / D for uniform t (integrals: without the density of t)."""
    lam = np.linspace(process.lam(process.t_min), process.lam(process.t_max), 20_001)
    t = process.t_of_lam(lam)
    alpha, sigma = process.alpha(t)[:, None], process.sigma(t)[:, None]
    mmse = (EIGENVALUES * sigma**2 / (alpha**2 * EIGENVALUES + sigma**2)).mean(axis=1)
    span = process.t_max - process.t_min
    return {
        name: np.trapezoid(weight * mmse, t) / (1.0 if name in INTEGRALS else span)
        for name, weight in exact_weights(process, t).items()
    }


def within(values, exact):
    """Whether the mean of draws is within four standard errors of its exact value."""
    values = np.asarray(values, float)
    error = 4.0 * values.std(axis=0) / np.sqrt(len(values))
    return np.all(np.abs(values.mean(axis=0) - exact) < error)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_exact_model_reaches_the_analytic_minimum(name):
    process = PROCESSES[name]
    oracle = oracles.Gaussian(process, MEAN, COVARIANCE)

    @quick_jit
    def losses(key, x0):
        return {
            weighting: objectives.denoising(process, oracle, key, x0, weighting=weighting)[0]
            for weighting in (*PLAIN, *INTEGRALS)
        }

    got, exact = losses(jax.random.key(1), data()), exact_minima(process)
    for weighting, values in got.items():
        assert values.shape == (COUNT,) and values.dtype == jnp.float32
        assert within(values, exact[weighting]), (weighting, values.mean(), exact[weighting])


@pytest.mark.parametrize(
    "name, choices",
    [
        ("vp", ("log_normal", "logit_normal", "independent")),
        ("edm", ("log_normal",)),
        ("rectified_flow", ("logit_normal",)),
    ],
)
def test_integrals_do_not_depend_on_the_times(name, choices):
    """Where the density vanishes the estimate is noisy: the sigmoid weight is the bounded one."""
    process = PROCESSES[name]
    oracle = oracles.Gaussian(process, MEAN, COVARIANCE)

    @quick_jit
    def losses(key, x0):
        return [
            objectives.denoising(process, oracle, key, x0, weighting="sigmoid", times=times)[0]
            for times in choices
        ]

    for times, values in zip(choices, losses(jax.random.key(2), data())):
        assert within(values, exact_minima(process)["sigmoid"]), times


def test_no_gradient_at_the_exact_model():
    process = VP()
    oracle = oracles.Gaussian(process, MEAN, COVARIANCE)

    def losses(theta, key, x0):
        def denoise(x, t):
            return oracle(x, t) + theta[0] + theta[1] * x + theta[2] * jnp.sin(3.0 * t)[:, None] * x

        return [
            objectives.denoising(process, denoise, key, x0, weighting=weighting)[0]
            for weighting in ("eps", "elbo")
        ]

    slopes = quick_jit(jax.jacfwd(losses))
    for at_minimum in slopes(jnp.zeros(3), jax.random.key(3), data()):
        assert within(at_minimum, np.zeros(3))
    for elsewhere in slopes(jnp.array([0.1, 0.0, 0.0]), jax.random.key(3), data()):
        assert not within(elsewhere, np.zeros(3))


def test_the_elbo_is_the_likelihood_less_its_ends():
    """-E log p(x0) = prior term + diffusion loss + reconstruction, each known for Gaussian data."""
    process = VP()
    oracle = oracles.Gaussian(process, MEAN, COVARIANCE)
    losses = quick_jit(
        lambda key, x0: objectives.denoising(
            process, oracle, key, x0, weighting="elbo", times="log_normal", reduce="sum"
        )[0]
    )(jax.random.key(4), data())
    first, last = (np.exp(process.log_snr(t)) for t in (process.t_min, process.t_max))
    diffusion = 0.5 * (np.log1p(EIGENVALUES * first) - np.log1p(EIGENVALUES * last)).sum()
    assert within(losses, diffusion)
    # I(x0; x_1) is what the prior costs, the entropy of x0 given x_tmin what is left to reconstruct
    prior = 0.5 * np.log1p(EIGENVALUES * last).sum()
    left = EIGENVALUES / (1.0 + EIGENVALUES * first)
    reconstruction = 0.5 * np.log(2.0 * np.pi * np.e * left).sum()
    entropy = 0.5 * np.log((2.0 * np.pi * np.e) ** 2 * np.linalg.det(COVARIANCE))
    assert within(losses + prior + reconstruction, entropy)


# One value an example


def tanh_model(x, t):
    return jnp.tanh(x + t.reshape((-1,) + (1,) * (x.ndim - 1)))


def test_halves_of_a_batch_have_the_losses_of_the_whole():
    x0, key = data()[:8], jax.random.key(5)

    @quick_jit
    def losses(x0, index=None):
        total = None if index is None else 8  # by default this batch is all of it
        return {
            times: objectives.denoising(
                VP(), tanh_model, key, x0, times=times, index=index, total=total
            )[0]
            for times in ("uniform", "log_normal", "independent")
        }

    def check(got, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), got, expected)

    index = jnp.arange(8)
    whole = losses(x0)
    for rows in (np.arange(4), np.arange(4, 8), np.array([6, 1, 7, 0])):
        check(losses(x0[rows], index[rows]), {k: v[rows] for k, v in whole.items()})


def test_examples_do_not_mix_and_gradients_average():
    x0, key = data()[:6], jax.random.key(6)

    def losses(weight, x0):
        return objectives.denoising(VP(), lambda x, t: jnp.tanh(x @ weight), key, x0)[0]

    weight = jnp.array([[0.5, -0.2], [0.1, 0.9]])
    by_example, by_data = quick_jit(jax.jacrev(losses, argnums=(0, 1)))(weight, x0)
    mean = quick_jit(jax.grad(lambda w: losses(w, x0).mean()))(weight)
    np.testing.assert_allclose(by_example.mean(axis=0), mean, rtol=1e-5)
    strength = np.abs(by_data).sum(axis=-1)  # [loss, example]
    assert (strength[~np.eye(6, dtype=bool)] == 0).all() and (np.diag(strength) > 0).all()


def test_every_example_has_its_own_noise_and_the_key_decides():
    x0 = jnp.zeros((8, 16))
    at_half = lambda process, key, index, total: (jnp.full(index.shape, 0.5), jnp.ones(index.shape))
    run = quick_jit(
        lambda key: objectives.denoising(
            VP(), lambda x, t: x, key, x0, weighting="x0", times=at_half
        )[0]
    )
    first = np.asarray(run(jax.random.key(0)))
    assert len(np.unique(first)) == 8
    assert (first != np.asarray(run(jax.random.key(1)))).all()
    np.testing.assert_array_equal(first, run(jax.random.key(0)))


def test_reductions_and_aux():
    @quick_jit
    def run(x0):
        return [
            objectives.denoising(
                VP(), tanh_model, jax.random.key(0), x0, weighting="x0", reduce=reduce
            )
            for reduce in ("mean", "sum")
        ]

    (mean, aux), (total, _) = run(jnp.ones((4, 3, 3, 2)))
    np.testing.assert_allclose(total, 18 * mean, rtol=1e-6)
    np.testing.assert_array_equal(aux["x0_error"], mean)
    assert aux["t"].shape == (4,)


def test_a_network_in_bfloat16_is_scored_in_float32():
    def low(x, t):
        return tanh_model(x, t).astype(jnp.bfloat16)

    @quick_jit
    def run(x0):
        return [
            objectives.denoising(VP(), model, jax.random.key(0), x0)[0]
            for model in (low, lambda x, t: low(x, t).astype(jnp.float32))
        ]

    losses, wide = run(data()[:4])
    assert losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, wide, rtol=1e-6)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"weighting": "snr"}, "unknown weighting 'snr'"),
        ({"times": "unifrom"}, "unknown times 'unifrom'; did you mean 'uniform'"),
        ({"reduce": "max"}, "reduce must be 'mean' or 'sum', got 'max'"),
        ({"index": jnp.arange(3)}, r"index has shape \(3,\) for a batch of 4"),
        ({"denoise": lambda x, t: x[:, :1]}, r"returned shape \(4, 1\) for data of shape \(4, 2\)"),
    ],
)
def test_errors(change, words):
    arguments = {"denoise": tanh_model, **change}
    with pytest.raises(ValueError, match=words):
        objectives.denoising(
            VP(), arguments.pop("denoise"), jax.random.key(0), data()[:4], **arguments
        )
