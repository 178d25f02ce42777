"""Time samplers: densities, stratification, and independence of the batch's layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit
from scipy import stats
from scipy.special import logit

from diffusion_jax import registry
from diffusion_jax.objectives import times
from diffusion_jax.processes import EDM, VP, Absorbing, Cosine, RectifiedFlow, VPBridge, discrete_vp

GAUSSIAN = {"vp": VP(), "cosine": Cosine(), "edm": EDM(), "rectified_flow": RectifiedFlow()}
STRATIFIED = ("uniform", "log_normal", "logit_normal")
CONTINUOUS = registry.names("times", discrete=None)


@functools.cache
def drawn(name, process_name, count, seed=0):
    """Sorted times and their 1 / density, float64."""
    process = GAUSSIAN[process_name]
    draw = quick_jit(lambda key: times.build_times(name)(process, key, jnp.arange(count), count))
    t, inverse_density = (np.asarray(v, float) for v in draw(jax.random.key(seed)))
    order = np.argsort(t)
    return t[order], inverse_density[order]


def distribution(name, process):
    """The density and distribution function that a sampler's documentation promises."""
    low, high = process.t_min, process.t_max
    if name in ("uniform", "independent"):
        uniform = stats.uniform(low, high - low)
        return uniform.pdf, uniform.cdf
    if name == "log_normal":
        to, mean, std = lambda t: np.log(process.sigma(t) / process.alpha(t)), -1.2, 1.2
        slope = lambda t: (
            process.dsigma(t) / process.sigma(t) - process.dalpha(t) / process.alpha(t)
        )
    else:
        to, mean, std = logit, 0.0, 1.0
        slope = lambda t: 1.0 / (t * (1.0 - t))
    cut = stats.truncnorm((to(low) - mean) / std, (to(high) - mean) / std, mean, std)
    return (lambda t: cut.pdf(to(t)) * slope(t)), (lambda t: cut.cdf(to(t)))


def test_every_sampler_is_covered():
    assert set(CONTINUOUS) == {*STRATIFIED, "independent"}


def test_labels_are_those_of_the_list():
    process = discrete_vp(num_train_steps=10)
    t, inverse_density = times.labels(process, jax.random.key(0), jnp.arange(40), 40)
    labels, counts = np.unique(np.round(10 * np.asarray(t), 4), return_counts=True)
    np.testing.assert_array_equal(labels, np.arange(1, 11))
    np.testing.assert_array_equal(counts, 4)
    assert (inverse_density == 1.0).all()
    with pytest.raises(ValueError, match="need a list of noise levels"):
        times.labels(VP(), jax.random.key(0), jnp.arange(2), 2)


@pytest.mark.parametrize("process", GAUSSIAN)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_inverse_density_is_that_of_the_documented_law(name, process):
    t, inverse_density = drawn(name, process, 20_000)
    made = GAUSSIAN[process]
    assert made.t_min <= t.min() and t.max() <= made.t_max
    density, cdf = distribution(name, made)
    # at the very ends of a normal, float32 quantiles lose their digits
    inner = slice(20, -20)
    np.testing.assert_allclose(density(t[inner]) * inverse_density[inner], 1.0, rtol=0.02)
    np.testing.assert_allclose(np.trapezoid(1.0 / inverse_density, t), 1.0, atol=2e-3)
    gap = 4 / np.sqrt(len(t)) if name == "independent" else 2.0 / len(t) + 2e-4
    np.testing.assert_allclose(cdf(t), (np.arange(len(t)) + 0.5) / len(t), atol=gap)


@pytest.mark.parametrize("name", STRATIFIED)
def test_each_stratum_is_hit_exactly_once(name):
    t, _ = drawn(name, "vp", 64, seed=3)
    position = 64 * distribution(name, GAUSSIAN["vp"])[1](t)
    offset = np.median(position - np.arange(64))
    assert 0.0 <= offset <= 1.0
    np.testing.assert_allclose(position - np.arange(64), offset, atol=0.02)


def test_the_shift_of_the_strata_is_uniform():
    draw = quick_jit(
        jax.vmap(lambda key: times.uniform(VP(t_min=1e-6), key, jnp.arange(4), 4)[0].min())
    )
    first = 4.0 * np.asarray(draw(jax.random.split(jax.random.key(0), 2000)))
    assert stats.kstest(first, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("process", GAUSSIAN)
@pytest.mark.parametrize("name", CONTINUOUS)
def test_integrals_of_a_bump_are_unbiased(name, process):
    """A density over t integrates to 1 under any other density."""
    t, inverse_density = drawn(name, process, 20_000)
    made = GAUSSIAN[process]
    if name == "log_normal":
        log_u = np.log(made.sigma(t) / made.alpha(t))
        slope = made.dsigma(t) / made.sigma(t) - made.dalpha(t) / made.alpha(t)
        bump = stats.norm.pdf(log_u, -1.0, 0.8) * slope
    else:
        bump = stats.norm.pdf(logit(t), 0.3, 0.7) / (t * (1.0 - t))
    terms = inverse_density * bump
    error = 4.0 * terms.std() / np.sqrt(len(t)) if name == "independent" else 2e-3
    assert terms.mean() == pytest.approx(1.0, abs=error)


@pytest.mark.parametrize(
    "name, process",
    [
        ("uniform", "vp"),
        ("uniform", "rectified_flow"),
        ("log_normal", "vp"),
        ("log_normal", "cosine"),
    ],
)
def test_the_bound_of_gaussian_data_is_unbiased(name, process):
    """The ELBO of N(0, v) data, 1/2 log(1 + v snr) between the ends, does not vanish at t_min."""
    t, inverse_density = drawn(name, process, 20_000)
    made, v = GAUSSIAN[process], 0.25
    snr = (made.alpha(t) / made.sigma(t)) ** 2
    rate = 2.0 * (made.dsigma(t) / made.sigma(t) - made.dalpha(t) / made.alpha(t))  # -dlog_snr/dt
    integrand = 0.5 * rate * snr * v / (1.0 + v * snr)
    ends = np.array([made.t_min, made.t_max])
    high, low = 0.5 * np.log1p(v * (made.alpha(ends) / made.sigma(ends)) ** 2)
    assert (inverse_density * integrand).mean() == pytest.approx(high - low, rel=0.015)


def test_times_do_not_depend_on_how_the_batch_is_laid_out():
    @quick_jit
    def draw(index):
        key = jax.random.key(1)
        return {n: times.build_times(n)(VP(), key, index, 16) for n in CONTINUOUS}

    rows = np.array([11, 3, 8, 0, 15, 5, 1, 9])
    first, second = draw(jnp.arange(8)), draw(jnp.arange(8, 16))
    for name, mixed in draw(jnp.asarray(rows)).items():
        for a, lower, upper in zip(mixed, first[name], second[name]):
            np.testing.assert_allclose(a, np.concatenate([lower, upper])[rows], rtol=2e-6)
        assert len(np.unique([first[name][0], second[name][0]])) == 16


@pytest.mark.parametrize("process", [Absorbing(5), VPBridge()], ids=["absorbing", "bridge"])
def test_other_families_of_processes(process):
    @quick_jit
    def draw(key):
        names = ("uniform", "independent", "logit_normal")
        return {n: times.build_times(n)(process, key, jnp.arange(512), 512) for n in names}

    for t, inverse_density in draw(jax.random.key(0)).values():
        assert process.t_min <= float(t.min()) and float(t.max()) <= process.t_max
        order = np.argsort(t)
        mass = np.trapezoid(1 / np.asarray(inverse_density)[order], np.asarray(t)[order])
        assert mass == pytest.approx(1.0, abs=0.03)


def test_options_are_bound():
    moved = times.build_times("log_normal", mean=0.5, std=0.3)
    t, _ = quick_jit(lambda key: moved(EDM(), key, jnp.arange(1000), 1000))(jax.random.key(0))
    log_u = np.log(80.0 * np.asarray(t))
    assert log_u.mean() == pytest.approx(0.5, abs=0.01)
    assert log_u.std() == pytest.approx(0.3, abs=0.01)
    own = lambda process, key, index, total: (jnp.full(index.shape, 0.5), jnp.ones(index.shape))
    assert times.build_times(own) is own


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown times 'lognormal'; did you mean 'log_normal'"):
        times.build_times("lognormal")
