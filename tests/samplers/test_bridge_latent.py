"""Booting noise: encoding against the exact flow, decoding what was encoded, paths between codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_checks import plain_run

from diffusion_jax import processes
from diffusion_jax.oracles import GaussianBridge
from diffusion_jax.samplers import (
    Pinned,
    dbim,
    dbim_encode,
    interpolate_latents,
    sample,
)

BRIDGES = {
    "vp": processes.VPBridge(),
    "brownian": processes.BrownianBridge(scale=0.7),
    "ve": processes.VEBridge(sigma_max=5.0),
}


def oracle(process, num=5, seed=0):
    """A joint Gaussian, and data drawn from it: eigenvalues of Cov(x0 | x1) from 0.02 to 0.3."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((6, 6)) * np.array([0.3, 0.5, 0.8, 0.6, 0.9, 0.5])
    joint = root @ root.T / 3.0
    mean0, mean1 = rng.standard_normal((2, 3)) * 0.4
    source = mean1 + rng.standard_normal((num, 3)) @ np.linalg.cholesky(joint[3:, 3:]).T
    blocks = joint[:3, :3], joint[:3, 3:], joint[3:, 3:]
    model = GaussianBridge(process, jnp.asarray(source), mean0, mean1, *blocks)
    mean, covariance = (np.asarray(v) for v in model.conditional())
    x0 = mean + rng.standard_normal((num, 3)) @ np.linalg.cholesky(covariance).T
    return model, source, x0


def boot_noise(process, model, source, x, t):
    """z of an x where the boot lands, from the definition x = a x1 + b D_T + c z."""
    guess = model(jnp.asarray(source), process.t_max)
    a, b, c = (process.point(t)[n] for n in "abc")
    return (x - a * source - b * np.asarray(guess)) / c


def decode(process, num_steps, model, source, z, **options):
    sampler = dbim(process, num_steps, booting="given", **options)
    return np.asarray(sample(sampler, model, None, Pinned(source, jnp.asarray(z))))


@pytest.mark.parametrize("name", BRIDGES)
@pytest.mark.parametrize("grid", (None, "log_snr"))
def test_decoding_gives_back_what_was_encoded(name, grid, x64):
    """The implicit encoder inverts the decoder of the same steps, not just the ODE, to rounding."""
    process = BRIDGES[name]
    model, source, x0 = oracle(process)
    for num_steps in (2, 5, 20):
        encoder = dbim_encode(process, num_steps, tolerance=1e-12, grid=grid)
        z = sample(encoder, model, None, Pinned(source, x0))
        again = decode(process, num_steps, model, source, z, grid=grid)
        np.testing.assert_allclose(again, x0, rtol=0, atol=1e-10)
        loose = dbim_encode(process, num_steps, tolerance=1e-2, grid=grid)
        z = sample(loose, model, None, Pinned(source, x0))
        again = decode(process, num_steps, model, source, z, grid=grid)
        assert 1e-9 < np.abs(again - x0).max() < 2e-2  # the tolerance is what is asked, not more


def test_encoding_what_was_decoded_gives_the_noise(x64):
    process = BRIDGES["vp"]
    model, source, _ = oracle(process)
    z = np.random.default_rng(1).standard_normal(source.shape)
    x = decode(process, 10, model, source, z)
    found = sample(
        dbim_encode(process, 10, tolerance=1e-13), model, None, Pinned(source, jnp.asarray(x))
    )
    np.testing.assert_allclose(found, z, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", (1, 2))
def test_order_of_the_explicit_encoder(order, x64):
    """Towards the exact flow's code, on a grid whose steps shrink alike."""
    process = BRIDGES["vp"]
    model, source, x0 = oracle(process)
    errors, calls = [], (40, 80, 160)
    for n in calls:
        encoder = dbim_encode(process, n + 1, order=order, grid="log_snr")
        assert encoder.nfe == n + 1 and encoder.order == order
        times = np.append(encoder.times[:-1], encoder.xs["next"]["t"][-1])
        exact = model.flow(jnp.asarray(x0), times[0], times[-1])
        z = sample(encoder, model, None, Pinned(source, x0))
        wanted = boot_noise(process, model, source, np.asarray(exact), times[-1])
        errors.append(np.abs(np.asarray(z) - wanted).max())
    slopes = np.diff(np.log(errors)) / np.diff(np.log(calls))
    np.testing.assert_allclose(slopes, -order, atol=0.2)


def test_the_implicit_encoder_is_the_flow_in_the_limit(x64):
    process = BRIDGES["vp"]
    model, source, x0 = oracle(process)
    errors = []
    for n in (41, 81):
        encoder = dbim_encode(process, n, tolerance=1e-8, grid="log_snr")
        end = float(encoder.xs["next"]["t"][-1])
        exact = model.flow(jnp.asarray(x0), process.t_min, end)
        z = sample(encoder, model, None, Pinned(source, x0))
        wanted = boot_noise(process, model, source, np.asarray(exact), end)
        errors.append(np.abs(np.asarray(z) - wanted).max())
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.15)


def test_calls_of_an_encoder():
    """Those of the decoder when explicit; a bound that follows from the log-SNR step when implicit."""
    process = BRIDGES["vp"]
    assert dbim_encode(process).nfe == dbim_encode(process, 20).nfe == dbim(process).nfe == 20
    encoder = dbim_encode(process, 20, tolerance=1e-6, slope=1.0)
    lam = np.asarray(process.lam(dbim(process, 20).xs["next"]["t"]))
    rates = np.tanh(np.diff(lam) / 4.0)
    counts = np.ceil(np.log(0.5e-6) / np.log(rates))
    assert encoder.nfe == 2 + counts.sum() and not encoder.stochastic
    assert (np.diff(encoder.times[:-1]) >= 0).all() and encoder.times[-1] == process.t_max
    assert dbim_encode(process, 20, tolerance=1e-6, slope=3.0).nfe > encoder.nfe


def test_a_slope_for_data_of_several_modes(x64):
    """Between two modes b dD/dx exceeds 1: the iteration needs to know, and then converges."""
    process = BRIDGES["brownian"]
    source = np.zeros((3, 1))

    def denoise(x, t):  # x0 is -1 or 1 with even odds, blurred by 0.1
        b, c = (process.point(t)[n] for n in "bc")
        total = (0.1 * b) ** 2 + c**2
        pulled = jnp.where(total > 0, x * b / jnp.where(total > 0, total, 1.0), 0.0)
        mode = jnp.tanh(pulled)
        return mode + 0.01 * b * (x - b * mode) / jnp.where(total > 0, total, 1.0)

    z = np.array([[-0.8], [0.1], [1.2]])
    x = decode(process, 8, denoise, source, z)
    for slope, converges in ((1.0, False), (6.0, True)):
        encoder = dbim_encode(process, 8, tolerance=1e-8, slope=slope)
        found = np.asarray(sample(encoder, denoise, None, Pinned(source, jnp.asarray(x))))
        assert (np.abs(found - z).max() < 1e-6) == converges


def test_the_kernel_runs_the_encoder():
    """Against a plain NumPy loop over the table, compiled and in float32."""
    process = BRIDGES["vp"]
    model, source, x0 = jax.tree.map(np.float32, oracle(process))
    for options in ({}, {"order": 2}, {"tolerance": 1e-4}):
        encoder = dbim_encode(process, 6, **options)
        fast = sample(encoder, model, None, Pinned(source, x0))
        assert fast.dtype == np.float32 and fast.shape == x0.shape
        plain = plain_run(encoder, lambda x, p: model.at(jnp.asarray(x), p), x0, source=source)
        np.testing.assert_allclose(fast, plain[-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ("slerp", "lerp"))
def test_the_ends_of_a_path(kind):
    z0, z1 = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
    path = interpolate_latents(z0, z1, np.linspace(0, 1, 5), kind=kind)
    assert path.shape == (5, 3, 4, 5) and path.dtype == np.float32
    np.testing.assert_allclose(path[0], z0, atol=1e-6)
    np.testing.assert_allclose(path[-1], z1, atol=1e-6)
    np.testing.assert_allclose(interpolate_latents(z0, z1, 0.25, kind=kind), path[1], atol=1e-6)
    back = interpolate_latents(z1, z0, np.linspace(0, 1, 5), kind=kind)
    np.testing.assert_allclose(back[::-1], path, atol=1e-5)


def test_slerp_keeps_the_length_and_goes_evenly(x64):
    """Latents of one length stay on their sphere, and equal weights turn by equal angles."""
    z0, z1 = np.random.default_rng(0).standard_normal((2, 4, 30))
    z0, z1 = (z / np.linalg.norm(z, axis=1, keepdims=True) * 3.0 for z in (z0, z1))
    path = np.asarray(interpolate_latents(z0, z1, np.linspace(0, 1, 6)))
    np.testing.assert_allclose(np.linalg.norm(path, axis=-1), 3.0, rtol=1e-12)
    cosines = (path[1:] * path[:-1]).sum(-1) / 9.0
    np.testing.assert_allclose(cosines, np.broadcast_to(cosines[:1], cosines.shape), rtol=1e-10)
    total = np.arccos((z0 * z1).sum(-1) / 9.0)
    np.testing.assert_allclose(np.arccos(cosines[0]) * 5, total, rtol=1e-9)
    straight = np.asarray(interpolate_latents(z0, z1, 0.5, kind="lerp"))
    np.testing.assert_allclose(straight, 0.5 * (z0 + z1), rtol=1e-12)
    assert (np.linalg.norm(straight, axis=-1) < 2.7).all()


def test_slerp_where_there_is_no_single_arc():
    """Parallel, opposite and zero latents give finite values and finite gradients."""
    z = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    for other in (z, -z, 2.0 * z, 0.0 * z):
        path = interpolate_latents(z, other, np.array([0.0, 0.3, 1.0], np.float32))
        assert np.isfinite(path).all()
        np.testing.assert_allclose(path[-1], other, atol=1e-5)
        np.testing.assert_allclose(path[1], 0.7 * z + 0.3 * other, atol=1e-4)
        gradient = jax.grad(lambda v, o=other: interpolate_latents(v, o, 0.3).sum())(jnp.asarray(z))
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_steps": 1}, "at least 2 network calls, got num_steps=1"),
        ({"tolerance": 0.0}, "tolerance must lie between 0 and 1, or be None; got 0.0"),
        ({"tolerance": 2}, "tolerance must lie between 0 and 1, or be None; got 2"),
        ({"slope": 0.0}, "slope must be positive, got 0.0"),
        ({"order": 3}, "order must be one of 1, 2; got 3"),
        ({"order": 2, "tolerance": 0.1}, "a tolerance inverts a decoder of order 1; got order=2"),
        ({"t_end": 0.0}, "no noise (c = 0) at t = 0, where a step starts: give the t_end"),
        ({"process": processes.VP()}, "needs a bridge process, got VP"),
        ({"tolerance": 1e-12, "slope": 1e9}, "calls for one step"),
    ],
)
def test_what_cannot_be_encoded(change, words):
    options = {"process": BRIDGES["vp"], "num_steps": 5} | change
    with pytest.raises(ValueError) as caught:
        dbim_encode(options.pop("process"), **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_needs_the_source_too():
    with pytest.raises(ValueError, match="needs x_init = Pinned"):
        sample(dbim_encode(BRIDGES["vp"], 5), lambda x, t: x, None, np.zeros((2, 3), np.float32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 4)), 0.5), r"one shape, got \(2, 3\) and \(2, 4\)"),
        ((np.zeros(3), np.zeros(3), 0.5), r"one shape, got \(3,\)"),
        ((np.zeros((2, 3), int), np.zeros((2, 3), int), 0.5), "floats of one dtype"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((2, 2))), r"scalar or \[W\]"),
        ((np.zeros((2, 3)), np.zeros((2, 3)), 0.5, "slurp"), "did you mean 'slerp'"),
    ],
)
def test_what_cannot_be_interpolated(arguments, words):
    with pytest.raises(ValueError, match=words):
        interpolate_latents(*arguments)
