"""The consistency function of a bridge and the teacher's step, against goldens and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden

from diffusion_jax import oracles
from diffusion_jax.guidance import bridge_consistency, bridge_ode_map
from diffusion_jax.processes import (
    I2SB,
    BrownianBridge,
    GmaxBridge,
    Interpolant,
    VEBridge,
    VPBridge,
)

PROCESSES = {"vp": VPBridge(), "ve": VEBridge()}


def oracle(process, source, g):
    names = ("m0", "mT", "S00", "S0T", "STT")
    return oracles.GaussianBridge(process, source, *(g[n] for n in names))


def pairs(name):
    """(golden arrays, process, [(i, t, r)]) with times in the library's clock."""
    g, process = golden("bridges_cdbm"), PROCESSES[name]
    times = g[f"{name}_pairs"] / process.clock_scale
    return g, process, [(i, t, r) for i, (t, r) in enumerate(times)]


def close(got, wanted, tolerance):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("name", PROCESSES)
def test_golden_denoiser_and_first_order_step(name, x64):
    g, process, times = pairs(name)
    denoise = oracle(process, g["xT"], g)
    for i, t, r in times:
        x = g[f"{name}_xt"][i]
        close(denoise(x, t), g[f"{name}_denoised"][i], 1e-12)
        step = bridge_ode_map(denoise, process, g["xT"])
        close(step(x, t, r), g[f"{name}_xr_ode1"][i], 1e-12)
        # the time of each example
        many = step(x, jnp.full(len(x), t), jnp.full(len(x), r))
        close(many, g[f"{name}_xr_ode1"][i], 1e-11)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_function_is_the_step_to_the_end(name, x64):
    """h of the exact denoiser is one first-order step; its distance from the exact map falls with t."""
    g, process, times = pairs(name)
    denoise = oracle(process, g["xT"], g)
    h = bridge_consistency(denoise, process, g["xT"])
    step = bridge_ode_map(denoise, process, g["xT"])
    for i, t, _ in times:
        x = g[f"{name}_xt"][i]
        close(h(x, t), step(x, t, process.t_min), 1e-12)
        close(denoise.flow(x, t, process.t_min), g[f"{name}_h_exact_t"][i], 1e-12)


def second_schedule(name):
    makers = {"brownian": BrownianBridge, "i2sb": I2SB, "gmax": GmaxBridge, "linear": Interpolant}
    return PROCESSES[name] if name in PROCESSES else makers[name]()


@pytest.mark.parametrize("name", ["vp", "ve", "brownian", "i2sb", "gmax", "linear"])
def test_boundary(name):
    """h(x, t_end) = x whatever the network says, to the last bit on the host and to rounding on device."""
    process = second_schedule(name)
    rng = np.random.default_rng(0)
    x, source = rng.standard_normal((2, 5, 3)).astype(np.float32)
    wild = lambda x, t: 100.0 * jnp.sin(7.0 * x)
    for t_end in (None, 0.1):
        h = bridge_consistency(wild, process, source, t_end)
        t = process.t_min if t_end is None else t_end
        np.testing.assert_array_equal(h.at(x, process.point(t)), x)
        many = jax.jit(lambda x, t, h=h: h(x, t))(x, jnp.full(5, t, jnp.float32))
        np.testing.assert_allclose(many, x, rtol=0, atol=2e-5)


def test_the_source_itself():
    """At t = 1 the bridge has no noise and h is the denoiser; just below it is finite in float32."""
    process, source = VPBridge(), jnp.ones((4, 3), jnp.float32)
    h = bridge_consistency(lambda x, t: 0.5 * x, process, source)
    t = jnp.asarray([1.0, 1.0 - 6e-8, 0.999999, 0.999], jnp.float32)
    ends = jax.jit(lambda x: h(x, t))(process.corrupt(0.5 * source, source, jnp.ones((4, 3)), t))
    np.testing.assert_array_equal(ends[0], 0.5 * source[0])
    # x = a x1 + b x0 + c eps with D = x0 = x / 2 up to c eps: the end is x0 + c_e eps
    np.testing.assert_allclose(ends[1:], 0.5, atol=0.03)
    slope = jax.jit(jax.jacrev(lambda x: h(x, t).sum()))(source)
    assert np.isfinite(slope).all()


def test_with_the_end_at_zero_it_is_the_denoiser(x64):
    process = VPBridge()
    x, source = np.random.default_rng(1).standard_normal((2, 5, 3))
    denoise = lambda x, t: jnp.tanh(x) + 0.1
    h = bridge_consistency(denoise, process, source, 0.0)
    for t in (0.999, 0.4, 1e-4):
        np.testing.assert_allclose(h(x, t), denoise(x, t), atol=1e-13)


def numbers_in_float32(process, t):
    point = {k: np.float32(v) for k, v in process.point(np.float64(t)).items()}
    return {k: jnp.asarray(v) for k, v in point.items()}


@pytest.mark.parametrize("name", ["vp", "ve", "gmax"])
def test_float32(name, x64):
    """Against float64, relative to the size of h; the schedule computed on the device in float32."""
    process = second_schedule(name)
    rng = np.random.default_rng(2)
    x0, x1, eps = rng.standard_normal((3, 64, 4))
    denoise = lambda x, t: 0.7 * jnp.tanh(x)
    for t in (0.9995, 0.9, 0.5, 0.05):
        x = process.corrupt(x0, x1, eps, t)
        exact = bridge_consistency(denoise, process, x1)(x, t)
        h = bridge_consistency(denoise, process, x1.astype(np.float32))
        small = h(x.astype(np.float32), jnp.full(64, t, jnp.float32))
        assert small.dtype == np.float32
        np.testing.assert_allclose(small, exact, rtol=0, atol=2e-5 * np.abs(exact).max())


def residual(process, denoise, x, t, r, order):
    """Distance between the exact ends of x at t and of its one-step image at r."""
    step = bridge_ode_map(denoise, process, denoise.source, order)
    after = denoise.flow(step(x, t, r), r, process.t_min)
    return float(jnp.abs(after - denoise.flow(x, t, process.t_min)).max())


@pytest.mark.parametrize(("order", "power"), [(1, 2.0), (2, 3.0)])
@pytest.mark.parametrize("name", ["vp", "brownian", "gmax"])
def test_self_consistency_falls_with_the_gap(name, order, power, x64):
    """With the exact denoiser the residual of one step is O((t - r)^(order + 1))."""
    g, process = golden("bridges_cdbm"), second_schedule(name)
    denoise = oracle(process, g["xT"], g)
    x = process.corrupt(g["x0"], g["xT"], g["z"], 0.6)
    gaps = np.array([0.04, 0.02, 0.01, 0.005])
    errors = [residual(process, denoise, x, 0.6, 0.6 - gap, order) for gap in gaps]
    slopes = np.diff(np.log(errors)) / np.diff(np.log(gaps))
    np.testing.assert_allclose(slopes[-1], power, atol=0.12)


def test_second_order_keeps_its_digits_for_small_gaps():
    """Float32, gap 1e-4: what the second call adds is small but right; no gap, no step."""
    process = VPBridge()
    rng = np.random.default_rng(3)
    x, source = rng.standard_normal((2, 32, 4)).astype(np.float32)
    bend = lambda x, t: jnp.tanh(3.0 * x)
    step = bridge_ode_map(bend, process, source, 2)
    np.testing.assert_allclose(step(x, 0.5, 0.5), x, atol=1e-6)
    with jax.enable_x64(True):
        wide = bridge_ode_map(bend, process, source.astype(np.float64), 2)
        for gap in (1e-4, 1e-2, 0.3):
            exact = wide(x.astype(np.float64), 0.5, 0.5 - gap)
            t = jnp.full(32, 0.5, jnp.float32)
            got = step(x, t, jnp.full(32, 0.5 - gap, jnp.float32))
            np.testing.assert_allclose(got, exact, rtol=0, atol=3e-6)


def test_errors():
    with pytest.raises(ValueError, match="order must be one of 1, 2; got 3"):
        bridge_ode_map(lambda x, t: x, VPBridge(), jnp.zeros((1, 2)), 3)
