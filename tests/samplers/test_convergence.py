"""Every registered deterministic solver converges to the exact flow at the order it declares."""

import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from solver_checks import AffineBridge, Mixture, affine_gaussian

from diffusion_jax import oracles, processes, registry
from diffusion_jax.samplers import dpm_solver_pp, sample, sde_dpm_solver_pp, with_noise

MODEL = golden("solvers_model")
MIXTURE = Mixture(MODEL["w"], MODEL["means"], MODEL["covs"])
# Both leave remainder 2 in threes and 0 in twos: single-step plans end alike.
STEPS = (320, 644)


def declared(family):
    return [n for n in registry.names("sampler", family=family) if order_of(n) is not None]


def order_of(name):
    return registry.entry("sampler", name).meta.get("order")


def without_cool_down(name, process, n, **ends):
    """The solver with its order kept to the end, where it can be told so."""
    build = registry.get("sampler", name)
    try:
        return build(process, n, lower_order_final=False, **ends)
    except TypeError:
        return build(process, n, **ends)


def error(sampler):
    """Root mean square distance to the probability-flow ODE solved to 1e-11 by an adaptive method."""
    end = sample(sampler, MIXTURE, None, MODEL["z16"])
    return float(np.sqrt(np.mean((end - MODEL["vp_exact_t_end"]) ** 2)))


def slope(steps, errors):
    return np.log(errors[0] / errors[1]) / np.log(steps[1] / steps[0])


@pytest.mark.parametrize("name", declared("gaussian"))
def test_order_of_gaussian_solvers(name, x64):
    ends = {"grid": "log_snr", "t_start": 1.0, "t_end": 1e-3}
    solvers = [without_cool_down(name, processes.VP(), n, **ends) for n in STEPS]
    assert not solvers[0].stochastic
    assert solvers[0].order == order_of(name)
    near = 0.15 if order_of(name) < 4 else 0.3  # first steps of lower order show longer
    assert slope(STEPS, [error(s) for s in solvers]) == pytest.approx(order_of(name), abs=near)


def test_the_released_third_order_form_is_of_order_two(x64):
    """Doubling its second difference makes it third order, and ten times more exact at 320 steps."""
    ends = {"grid": "log_snr", "order": 3, "lower_order_final": False}
    released = dpm_solver_pp(processes.VP(), 320, **ends)
    exact = dpm_solver_pp(processes.VP(), 320, exact_d2=True, **ends)
    assert (released.order, exact.order) == (2, 3)
    assert error(exact) < 0.2 * error(released)


def test_sde_solvers_at_eta_zero_declare_their_deterministic_order(x64):
    for order, reached in ((1, 1), (2, 2), (3, 2)):
        solvers = [
            sde_dpm_solver_pp(processes.VP(), n, order=order, eta=0.0, grid="log_snr")
            for n in STEPS
        ]
        assert solvers[0].order == reached and not solvers[0].stochastic
        assert slope(STEPS, [error(s) for s in solvers]) == pytest.approx(reached, abs=0.15)


@pytest.mark.parametrize("name", ("ddim", "heun", "dpmpp_2m", "dpmpp_2s", "edm_heun"))
@pytest.mark.parametrize("process", ("edm", "rectified_flow", "cosine", "sub_vp", "ve"))
def test_exact_flow_of_gaussian_data_on_other_processes(name, process, x64):
    """A second exact answer, in closed form: the flow of Gaussian data is affine.

    Between two inner times, so that no process has an infinite log-SNR there.
    """
    process = registry.get("process", process)()
    mean, covariance = np.array([0.6, -0.4]), np.array([[0.30, 0.12], [0.12, 0.10]])
    model = affine_gaussian(mean, covariance)
    t, s = (float(process.t_of_lam(lam)) for lam in (-2.5, 2.5))
    x = process.alpha(t) * mean + process.sigma(t) * MODEL["z16"]
    exact = oracles.gaussian_flow(process, mean, covariance, x, t, s)
    errors = []
    for n in (40, 80):
        sampler = without_cool_down(name, process, n, grid="log_snr", t_start=t, t_end=s)
        errors.append(np.abs(sample(sampler, model, None, x) - exact).max())
    assert slope((40, 80), errors) == pytest.approx(order_of(name), abs=0.25)
    assert errors[-1] < (0.02 if order_of(name) == 1 else 2e-3)


def joint_gaussian(process, source):
    return oracles.GaussianBridge(
        process,
        source,
        mean0=jnp.array([0.3, -0.2]),
        mean1=jnp.array([-0.4, 0.25]),
        cov00=jnp.array([[0.5, 0.1], [0.1, 0.3]]),
        cov01=jnp.array([[0.2, 0.05], [0.0, 0.1]]),
        cov11=jnp.array([[0.6, 0.0], [0.0, 0.4]]),
    )


@pytest.mark.parametrize("name", declared("bridge"))
@pytest.mark.parametrize("process", ("vp_bridge", "ve_bridge", "brownian_bridge"))
def test_order_of_bridge_solvers(name, process, x64):
    """From the first state behind the source on, against the bridge's own flow, on a grid uniform in lam."""
    process = registry.get("process", process)()
    source = np.array([[0.7, -0.3], [-1.1, 0.4], [0.2, 0.9]])
    bridge = joint_gaussian(process, source)
    mean, covariance = bridge.conditional()
    denoise = AffineBridge(source, mean, *np.linalg.eigh(covariance))
    ends = {"t_start": float(process.t_of_lam(-5.0)), "t_end": float(process.t_of_lam(5.0))}
    errors = []
    for n in (81, 161):
        sampler = registry.get("sampler", name)(process, n, grid="log_snr", **ends)
        noise = np.full((n + 1, 3, 2), 0.5)
        end, path = sample(with_noise(sampler, noise), denoise, None, source, trajectory=True)
        booted = float(sampler.xs["next"]["t"][0])
        exact = bridge.flow(path[1], booted, float(sampler.xs["next"]["t"][-1]))
        errors.append(float(np.abs(end - exact).max()))
    assert sampler.order == order_of(name)
    # on Gaussian data order 3 shows 4 and more, in the released code as well; `test_orders_on_a_mixture`
    above = 1.6 if order_of(name) == 3 else 0.15
    assert -0.15 < slope((80, 160), errors) - order_of(name) < above
    assert errors[-1] < {1: 0.1, 2: 1e-3, 3: 1e-5}[order_of(name)]
