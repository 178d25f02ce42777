"""Processes given by their log-SNR: their definition, digits at the ends, and the official sampler."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import mixture_mean, place_noise, plain_run

from diffusion_jax.processes import VP, LinearLogSNR
from diffusion_jax.processes.log_snr import point_of
from diffusion_jax.samplers import ddim, ddpm

MODEL = golden("solvers_model")


def test_alpha_and_sigma_are_sigmoids_of_gamma():
    process = LinearLogSNR(-9.0, 3.0)
    t = np.linspace(0, 1, 31)
    gamma = -9.0 + 12.0 * t
    np.testing.assert_allclose(process.gamma(t), gamma, rtol=0, atol=1e-14)
    np.testing.assert_allclose(process.sigma(t) ** 2, 1 / (1 + np.exp(-gamma)), rtol=1e-13)
    np.testing.assert_allclose(process.alpha(t) ** 2, 1 / (1 + np.exp(gamma)), rtol=1e-13)
    np.testing.assert_allclose(process.log_snr(t), -gamma, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(process.gamma(np.array([0.0, 1.0])), [-9.0, 3.0])


def test_default_ends_are_those_of_the_paper():
    """float32 too: sigma^2 = 1.7e-6 is not what is left of 1 - alpha^2."""
    process = LinearLogSNR()
    assert process.sampling_range == (1.0, 0.0)
    exact = 1 / (1 + np.exp(13.3))
    assert process.sigma(0.0) ** 2 == pytest.approx(exact, rel=1e-12)
    assert float(process.sigma(jnp.float32(0.0))) ** 2 == pytest.approx(exact, rel=2e-6)
    assert process.prior_std == 1.0


def test_inverse_and_rate():
    process = LinearLogSNR()
    lam = np.linspace(-2.5, 6.65, 17)
    np.testing.assert_allclose(process.lam(process.t_of_lam(lam)), lam, rtol=1e-12)
    t = np.array([0.1, 0.7])
    np.testing.assert_allclose(process.dgamma(t), 18.3)
    # variance preserving: g^2 = -2 f
    np.testing.assert_allclose(process.diffusion_squared(t), -2 * process.drift(t), rtol=1e-13)


def test_point_of_a_learned_gamma_is_the_point_of_the_process():
    process, t = LinearLogSNR(-7.0, 4.0), np.linspace(0, 1, 7)
    point = point_of(process.gamma(t), t, process.dgamma(t))
    for name, value in process.point(t).items():
        np.testing.assert_allclose(point[name], value, rtol=1e-13, err_msg=name)


def test_the_ends_must_be_in_order():
    with pytest.raises(ValueError, match=r"gamma_min < gamma_max, got 5\.0 and -13\.3"):
        LinearLogSNR(5.0, -13.3)


@pytest.mark.parametrize("make", [lambda p, n: ddim(p, n, eta=1.0), ddpm], ids=["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [10, 50])
def test_the_official_ancestral_sampler(make, steps):
    """c = -expm1(gamma_s - gamma_t), T steps on the mixture with its noise."""
    g = golden("solvers_vdm")
    sampler = make(LinearLogSNR(*g["gamma_min_max"]), steps)
    exact, noise = g[f"ancestral__T{steps}"], g[f"ancestral_noise__T{steps}"]
    denoise = lambda x, point: mixture_mean(x, point, MODEL["w"], MODEL["means"], MODEL["covs"])
    path = plain_run(sampler, denoise, exact[0], place_noise(sampler, noise, range(steps)))
    np.testing.assert_allclose(path[-1], exact[-1], atol=1e-10)
    if len(exact) == steps + 1:
        np.testing.assert_allclose(path, exact, atol=1e-10)


def test_same_noise_levels_are_the_same_sampler():
    """A solver sees noise levels, not clocks: VP at the times of these levels has the same table."""
    vp, process = VP(), LinearLogSNR(-8.0, 4.0)
    t = np.linspace(1.0, 0.0, 9)
    other = ddim(vp, grid=vp.t_of_lam(process.lam(t)), eta=0.5)
    ours = ddim(process, grid=t, eta=0.5)
    np.testing.assert_allclose(ours.xs["scalars"], other.xs["scalars"], rtol=1e-9, atol=1e-12)
    for name in ("alpha", "sigma"):
        np.testing.assert_allclose(ours.xs["point"][name], other.xs["point"][name], rtol=1e-10)
