"""The official token transformer in the methods it comes from: trained a step, and sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import builder
from diffusion_jax.data.source import DataSpec, Element
from diffusion_jax.methods.base import Context, Network
from diffusion_jax.networks import DDiT
from tests.quick_jit import quick_jit

V, L = 5, 6
SMALL = dict(width=12, depth=2, heads=2, condition_width=8, max_length=16)
TO_LAST = {"name": "linear", "eps_end": 1e-3}
METHODS = {
    "sedd": (
        {"name": "absorbing", "schedule": TO_LAST},
        {},
        {"name": "score_entropy", "sampler": "score_analytic", "nfe": 3},
    ),
    "sedd uniform": (
        {"name": "uniform", "schedule": {"name": "geometric"}},
        {"mask_token": False},
        {"name": "score_entropy", "sampler": "score_euler", "nfe": 3},
    ),
    "mdlm": (
        {"name": "absorbing", "schedule": "linear"},
        {"time_conditioned": False},
        {"name": "masked", "objective": "continuous", "nfe": 3},
    ),
    "mdlm with time": (
        {"name": "absorbing", "schedule": TO_LAST},
        {},
        {"name": "masked", "objective": "count", "nfe": 3},
    ),
    "radd": (
        {"name": "absorbing", "schedule": "linear"},
        {"time_conditioned": False, "modulated": False},
        {"name": "masked", "objective": "lambda", "sampler": "first_hitting"},
    ),
    "udlm": (
        {"name": "uniform", "schedule": TO_LAST},
        {"mask_token": False},
        {"name": "uniform", "nfe": 3},
    ),
}
SPEC = DataSpec("tokens", {"tokens": Element((L,), "int32")}, vocab_size=V)


def built(name, **network):
    process, fields, method = METHODS[name]
    network = {"name": "ddit", **SMALL, **fields, **network}
    return builder.build_method({"process": process, "network": network, "method": method}, SPEC)


QUICK = ("sedd", "radd")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in METHODS]
)
def test_trains_and_samples(name):
    made = built(name, dropout=0.1).method
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (8, L)).astype(np.int32)
    tokens[:, 1] = tokens[:, 0]
    batch = {"tokens": tokens, "index": np.arange(8, dtype=np.int32)}
    key = jax.random.key(0)

    @quick_jit
    def step(params):
        loss = lambda p: made.loss(p, key, batch, Context(batch_size=8))[0]
        value, slope = jax.value_and_grad(loss)(params)
        length = jnp.sqrt(sum(jnp.vdot(g, g) for g in jax.tree.leaves(slope)))
        return value, jax.tree.map(lambda p, g: p - 0.01 / length * g, params, slope)

    first, params = step(quick_jit(made.init)(key, batch))
    assert float(step(params)[0]) < float(first)
    drawn = np.asarray(quick_jit(made.sample)(params, key, batch))
    assert drawn.shape == (8, L) and drawn.min() >= 0 and drawn.max() < V


def test_infinite_noise_cannot_be_told():
    with pytest.raises(
        builder.ConfigError, match="infinite at t = 1: give the schedule an eps_end"
    ):
        built("mdlm", time_conditioned=True)
    with pytest.raises(ValueError, match="DDiT is told the total noise, which this method has not"):
        Network.of(DDiT(V, **SMALL), SPEC)
