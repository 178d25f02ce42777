"""Methods of discrete chains: bounds in nats, guidance, prompts, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax import methods
from diffusion_jax.data import digits, digits_tokens
from diffusion_jax.networks import TokenTransformer
from diffusion_jax.processes import (
    Absorbing,
    GeometricSchedule,
    LinearSchedule,
    Uniform,
    ctmc,
    d3pm,
    mask_replace,
)

DATA = digits_tokens("train")
tiny = functools.partial(
    TokenTransformer, vocab_size=17, width=16, depth=1, heads=1, num_classes=10
)
MASKED = Absorbing(17, LinearSchedule(eps_end=1e-6))
MADE = {
    "score_entropy": lambda **o: methods.score_entropy(MASKED, tiny(), DATA.spec, nfe=4, **o),
    "uniform": lambda **o: methods.uniform(Uniform(17), tiny(), DATA.spec, nfe=4, **o),
    "ctmc": lambda **o: methods.uniform(
        ctmc(17, "nearest_neighbour", GeometricSchedule(1e-5, 5.0)), tiny(), DATA.spec, nfe=4, **o
    ),
    "d3pm": lambda **o: methods.d3pm(Uniform(17), tiny(), DATA.spec, num_steps=5, nfe=5, **o),
    "cdcd": lambda **o: methods.d3pm(
        mask_replace(17, 4),
        tiny(),
        DATA.spec,
        contrast=1e-3,
        contrast_options={"num_negatives": 2},
        **o,
    ),
}


def batch(num=16):
    rows = DATA.take(np.arange(num)) | {"index": np.arange(num, dtype=np.int32)}
    return {k: jnp.asarray(v) for k, v in rows.items()}


def zeros(method):
    shapes = jax.eval_shape(method.init, jax.random.key(0), batch())
    return jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)


@pytest.mark.parametrize("name", ("score_entropy", "uniform", "ctmc", "d3pm"))
def test_a_network_that_knows_nothing_costs_log_v(name):
    """Its chain is the exact one of uniform tokens, so the bound is tight: 64 log 17 on average."""
    method = MADE[name]()
    params, data = zeros(method), batch()
    bound = quick_jit(lambda key: method.bound(params, key, data).mean())
    values = np.array([bound(jax.random.key(i)) for i in range(80)], np.float64)
    error = 4.0 * values.std() / np.sqrt(len(values))
    assert error < 12.0
    assert values.mean() == pytest.approx(64 * np.log(17), abs=error + 0.1)


@pytest.mark.parametrize("name", ("score_entropy", "uniform", "cdcd"))
def test_guided_samples_with_a_prompt(name):
    """Guided by labels and held to the prompt, whatever the chain."""
    method = MADE[name](guidance=2.0)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda v: jnp.asarray(0.3 * rng.standard_normal(v.shape), v.dtype), zeros(method)
    )
    data = batch(4)
    tokens = data.pop("tokens")
    data["prompt"] = tokens.at[:, 20:].set(17)
    out = np.asarray(quick_jit(lambda: method.sample(params, jax.random.key(0), data))())
    np.testing.assert_array_equal(out[:, :20], tokens[:, :20])
    assert out.shape == (4, 64) and out.min() >= 0 and out.max() < 17


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: methods.score_entropy(Absorbing(17), tiny(), DATA.spec),
            r"finite total noise, but alpha\(1\) = 0",
        ),
        (
            lambda: methods.score_entropy(d3pm(17), tiny(), DATA.spec),
            "needs an Absorbing or Uniform process, got D3PM",
        ),
        (
            lambda: methods.uniform(Absorbing(17), tiny(), DATA.spec),
            "needs a Uniform process or a CTMC, got Absorbing",
        ),
        (
            lambda: methods.uniform(ctmc(17, "absorbing"), tiny(), DATA.spec),
            "the chain has 18 states for 17 tokens",
        ),
        (
            lambda: methods.uniform(Uniform(17), tiny(), DATA.spec, parameterization="full"),
            "parameterization must be one of",
        ),
        (lambda: methods.uniform(Uniform(16), tiny(), DATA.spec), "vocab_size 16, the data has 17"),
        (lambda: methods.d3pm(Uniform(17), tiny(), DATA.spec), "num_steps = None must be"),
        (
            lambda: methods.d3pm(mask_replace(17, 4), tiny(), digits().spec),
            "needs tokens, the data is of kind 'image'",
        ),
        (
            lambda: methods.score_entropy(MASKED, tiny(), DATA.spec, sampler="masked_ancestral"),
            "needs a model that returns x0, this one returns score",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
