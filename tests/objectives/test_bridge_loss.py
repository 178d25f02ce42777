"""The bridge loss: the authors' numbers, and the value that no network can beat."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_files import golden
from quick_jit import quick_jit

from diffusion_jax import objectives, oracles
from diffusion_jax.denoisers import Denoiser
from diffusion_jax.processes import I2SB, BrownianBridge, VEBridge, VPBridge

PROCESSES = {"vp": VPBridge(), "ve": VEBridge(), "i2sb": I2SB(rho_T_excludes_overlap=True)}


def golden_loss(name):
    g = {k.removeprefix("loss_"): v for k, v in golden("processes_bridge").items()}
    clock = PROCESSES[name].clock_scale
    return {k: g[k] for k in ("x0", "xT", "z", "W", "m0", "mT", "S00", "S0T", "STT")} | {
        "sd": g["precond_sd_cov"][0],
        "cov": g["precond_sd_cov"][1],
        "t": g[f"{name}_t"] / clock,
        **{k: g[f"{name}_{k}"] for k in ("xt", "denoised", "weight", "loss", "xs_mse")},
        **{k: g[f"{name}_{k}"] for k in ("bayes_mse", "bayes_loss")},
    }


def give_noise(monkeypatch, z):
    module = sys.modules["diffusion_jax.objectives.bridge"]
    monkeypatch.setattr(module, "normal_per_example", lambda keys, like: jnp.asarray(z))


def toy_network(g):
    """The network of the goldens: tanh([x, x1] W^T) + 1e-3 c_noise."""

    def network(x, c_noise):
        return jnp.tanh(jnp.concatenate([x, g["xT"]], axis=1) @ g["W"].T) + 1e-3 * c_noise[:, None]

    return network


def fixed(g):
    """A time sampler that gives the golden times, in turn."""
    t = jnp.asarray(g["t"])
    return lambda process, key, index, total: (t[index % len(t)], jnp.ones(index.shape))


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_loss_of_the_official_code(name, x64, monkeypatch):
    g, process = golden_loss(name), PROCESSES[name]
    give_noise(monkeypatch, g["z"])
    denoise = Denoiser(toy_network(g), process, "ddbm", g["sd"], g["sd"], g["cov"])
    seen = {}

    class Watch:
        """The denoiser, noting what it is asked and what it says."""

        output_scale = staticmethod(denoise.output_scale)

        def at(self, x, point):
            seen.update(xt=x, denoised=denoise.at(x, point))
            return seen["denoised"]

    losses, aux = objectives.bridge_denoising(
        process,
        Watch(),
        jax.random.key(0),
        jnp.asarray(g["x0"]),
        jnp.asarray(g["xT"]),
        times=fixed(g),
    )
    np.testing.assert_allclose(seen["xt"], g["xt"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(seen["denoised"], g["denoised"], rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(aux["x0_error"], g["xs_mse"], rtol=1e-9)
    np.testing.assert_allclose(losses / aux["x0_error"], g["weight"], rtol=1e-8)
    np.testing.assert_allclose(losses, g["loss"], rtol=1e-8)


def test_loss_of_i2sb_with_its_own_parameterisation(x64, monkeypatch):
    """D = x - rho F, and weight 1 / rho^2: the plain error of F."""
    g, process = golden_loss("i2sb"), PROCESSES["i2sb"]
    give_noise(monkeypatch, g["z"])
    network = toy_network(g)

    def at_their_clock(x, t):
        return network(x, 1000.0 * (1e-4 + (1.0 - 1e-4) * jnp.round(999 * t) / 999))

    denoise = Denoiser(at_their_clock, process, "i2sb")
    losses, _ = objectives.bridge_denoising(
        process,
        denoise,
        jax.random.key(0),
        jnp.asarray(g["x0"]),
        jnp.asarray(g["xT"]),
        times=fixed(g),
    )
    np.testing.assert_allclose(losses, g["loss"], rtol=1e-9)


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_exact_model_reaches_the_bayes_loss(name):
    g, process = golden_loss(name), PROCESSES[name]
    count = 12 * 1000
    joint = np.block([[g["S00"], g["S0T"]], [g["S0T"].T, g["STT"]]])
    draws = np.random.default_rng(0).standard_normal((count, 6)) @ np.linalg.cholesky(joint).T
    x0 = jnp.asarray(draws[:, :3] + g["m0"], jnp.float32)
    x1 = jnp.asarray(draws[:, 3:] + g["mT"], jnp.float32)
    oracle = oracles.GaussianBridge(process, x1, *(g[k] for k in ("m0", "mT", "S00", "S0T", "STT")))

    @quick_jit
    def run(key, x0, x1):
        models = oracle, lambda x, t: oracle(x, t) + 0.3
        return [
            objectives.bridge_denoising(process, model, key, x0, x1, times=fixed(g))[0]
            for model in models
        ]

    losses, biased = run(jax.random.key(1), x0, x1)
    errors = np.asarray(losses, float).reshape(-1, 12)
    standard_error = errors.std(axis=0) / np.sqrt(len(errors))
    assert (np.abs(errors.mean(axis=0) - g["bayes_mse"]) < 4.5 * standard_error).all()
    # the default weight of a preconditioned denoiser is 1 / c_out^2
    preconditioned = Denoiser(None, process, "ddbm", g["sd"], g["sd"], g["cov"])
    weight = 1.0 / preconditioned.preconditioning(process.point(g["t"])).c_out ** 2
    np.testing.assert_allclose(weight * g["bayes_mse"], g["bayes_loss"], rtol=1e-7)
    assert biased.mean() > errors.mean() + 0.05  # any other function does worse


def test_halves_of_a_batch_have_the_losses_of_the_whole():
    x0, x1 = jnp.asarray(np.random.default_rng(1).standard_normal((2, 8, 3)), jnp.float32)

    @quick_jit
    def losses(x0, x1, index):
        return objectives.bridge_denoising(
            BrownianBridge(),
            lambda x, t: jnp.tanh(x) * t[:, None],
            jax.random.key(5),
            x0,
            x1,
            index=index,
            total=8,
        )[0]

    index = jnp.arange(8)
    whole = losses(x0, x1, index)
    halves = [losses(x0[s], x1[s], index[s]) for s in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, rtol=1e-6)


def test_only_what_the_mask_marks_counts():
    x0, x1 = jnp.asarray(np.random.default_rng(2).standard_normal((2, 4, 6, 1)), jnp.float32)
    hole = jnp.zeros((4, 6, 1)).at[:, :2].set(1.0)

    def losses(extra, mask):
        wrong = jnp.where(hole == 1, 0.5, extra)
        return objectives.bridge_denoising(
            BrownianBridge(), lambda x, t: x0 + wrong, jax.random.key(0), x0, x1, mask=mask
        )[0]

    np.testing.assert_allclose(losses(9.0, hole), 0.25 * 2 / 6, rtol=1e-5)
    np.testing.assert_allclose(losses(0.5, None), 0.25, rtol=1e-5)


def test_errors():
    x = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=r"differ in shape: \(4, 3\) and \(4, 2\)"):
        objectives.bridge_denoising(VPBridge(), lambda x, t: x, jax.random.key(0), x, x[:, :2])
    with pytest.raises(ValueError, match=r"returned shape \(3,\)"):
        objectives.bridge_denoising(VPBridge(), lambda x, t: x[0], jax.random.key(0), x, x)
