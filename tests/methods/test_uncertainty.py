"""The learnt uncertainty of score models (EDM2, arXiv 2312.02696, eq. 14 and 21), and its network trained."""

import importlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import builder
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.methods.base import Context
from diffusion_jax.methods.score import score
from diffusion_jax.networks import MLP, EDM2UNet
from diffusion_jax.processes import EDM, VP
from diffusion_jax.training import make_optimizer

SPEC = DataSpec(kind="points", elements={"points": Element((3,), "float32")})
BATCH = {"points": np.ones((1, 3), np.float32), "index": np.arange(1)}


class Told(nn.Module):
    """F = a x + what it was told of the time; u = b + 2 of the same."""

    @nn.compact
    def __call__(self, x, t, *, train=False):
        self.param("b", nn.initializers.zeros, ())
        return self.param("a", nn.initializers.ones, ()) * x + t[:, None]

    def log_variance(self, t):
        return self.get_variable("params", "b") + 2.0 * t


@pytest.mark.parametrize("parameterization", ["edm", "x0"])
def test_the_loss_and_its_minimum(parameterization):
    options = dict(parameterization=parameterization, times="log_normal")
    plain, learnt = (score(EDM(), Told(), SPEC, uncertainty=u, **options) for u in (False, True))
    params, context = {"a": jnp.float32(0.7), "b": jnp.float32(0.3)}, Context(batch_size=1)
    both = quick_jit(lambda p, key: [m.loss(p, key, BATCH, context) for m in (plain, learnt)])
    slope = quick_jit(jax.value_and_grad(lambda p, key: learnt.loss(p, key, BATCH, context)[0]))
    for seed in range(3):
        key = jax.random.key(seed)
        (weighted, before), (loss, metrics) = both(params, key)
        u = float(metrics["log_variance"])
        assert float(metrics["weighted_mse"]) == pytest.approx(float(weighted), rel=1e-6)
        assert float(metrics["x0_mse"]) == pytest.approx(float(before["x0_mse"]), rel=1e-6)
        assert float(loss) == pytest.approx(float(weighted) / np.exp(u) + u, rel=1e-5)
        # The best u is the logarithm of the error: there the gradient of u vanishes and L = 1 + u.
        best = {**params, "b": params["b"] + np.log(weighted) - u}
        value, gradient = slope(best, key)
        assert float(gradient["b"]) == pytest.approx(0.0, abs=1e-5)
        assert float(value) == pytest.approx(1.0 + np.log(float(weighted)), rel=1e-5)


def test_uncertainty_reads_what_the_network_is_told():
    process, told = VP(), {}
    for parameterization in ("edm", "x0"):
        method = score(process, Told(), SPEC, uncertainty=True, parameterization=parameterization)
        params = {"a": jnp.float32(0.0), "b": jnp.float32(0.0)}
        _, metrics = method.loss(params, jax.random.key(0), BATCH, Context(batch_size=1))
        told[parameterization] = float(metrics["log_variance"]) / 2.0
    point = process.point(told["x0"])
    assert told["edm"] == pytest.approx(0.25 * np.log(point["sigma"] / point["alpha"]), rel=1e-4)


def test_a_network_without_uncertainty_is_refused():
    with pytest.raises(ValueError, match="MLP has no log_variance"):
        score(VP(), MLP(), SPEC, uncertainty=True)


def test_first_loss_of_edm2_is_one():
    """F = 0 and data of variance sigma_data^2: the weighted error is 1, whatever the noise (EDM, eq. 8)."""
    module = EDM2UNet(channels=8, channel_mults=(1,), num_res_blocks=1, head_channels=8)
    spec = DataSpec(kind="image", elements={"image": Element((4, 4, 2), "float32")})
    method = score(EDM(), module, spec, uncertainty=True, times="log_normal", sigma_data=0.5)
    assert method.project is module.project
    image = 0.5 * np.random.default_rng(0).standard_normal((128, 4, 4, 2)).astype(np.float32)
    batch = {"image": image, "index": np.arange(128)}
    params = quick_jit(method.init)(jax.random.key(1), batch)
    run = quick_jit(lambda p: method.loss(p, jax.random.key(0), batch, Context(batch_size=128)))
    loss, metrics = run(params)
    assert float(metrics["weighted_mse"]) == pytest.approx(1.0, abs=0.05)
    assert np.isfinite(loss)


def test_the_paper_s_config_is_built():
    config = importlib.import_module("configs.edm2.imagenet512").get_config("XXS")
    elements = {"image": Element((64, 64, 4), "float32"), "label": Element((), "int32")}
    built = builder.build_method(config, DataSpec("image", elements, num_classes=1000))
    key, batch = jax.random.key(0), built.spec.zeros(2)
    params = jax.eval_shape(built.method.init, key, batch)
    assert sum(a.size for a in jax.tree.leaves(params)) == 31_309_029 + 2 * (64 + 128)
    assert jax.tree.structure(jax.eval_shape(built.method.project, params)) == jax.tree.structure(
        params
    )
    optimizer = make_optimizer(config.train.optimizer, config.train.steps)
    rates = {5000: 0.017, 70_000 * 4: 0.0085, 10**6: 0.017 * 0.07**0.5}
    for step, rate in rates.items():
        assert float(optimizer.learning_rate(step)) == pytest.approx(rate, rel=1e-4)
    with pytest.raises(ValueError, match="unknown size 'T'; valid: XXS, XS, S, M, L, XL, XXL"):
        importlib.import_module("configs.edm2.imagenet512").get_config("T")
