import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick_jit import quick_jit

from diffusion_jax.networks import UNet
from diffusion_jax.networks.layers import TransformerStack, rematerialised
from diffusion_jax.networks.remat import check_remat
from diffusion_jax.training.report import count_flops

POLICIES = ("full", "dots", "dots_no_batch")


def stack_loss(remat):
    stack = TransformerStack(2, heads=2, dropout=0.25, remat=remat)
    x, c = jax.random.normal(jax.random.key(1), (2, 5, 8)), jnp.ones((2, 8))

    def loss(params):
        rngs = {"dropout": jax.random.key(2)}
        return jnp.sum(stack.apply({"params": params}, x, c, None, True, rngs=rngs) ** 2)

    shapes = jax.eval_shape(lambda: stack.init(jax.random.key(0), x, c, None, False)["params"])
    draw = np.random.default_rng(0)
    return loss, jax.tree.map(lambda v: draw.normal(0.0, 0.3, v.shape).astype(v.dtype), shapes)


def flops(loss, params):
    return count_flops(jax.make_jaxpr(jax.value_and_grad(loss))(params))


def kept(loss, params):
    """Elements stored between the forward and the backward pass."""
    residuals = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
    return sum(x.size for x in residuals)


@pytest.fixture(scope="module")
def plain():
    loss, params = stack_loss(False)
    return quick_jit(jax.value_and_grad(loss))(params), flops(loss, params), kept(loss, params)


@pytest.mark.parametrize("remat", POLICIES)
def test_policies_change_neither_value_nor_gradient(remat, plain):
    loss, params = stack_loss(remat)
    (value, gradient), _, _ = plain
    found, found_gradient = quick_jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found_gradient), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_policies_trade_operations_for_memory(plain):
    _, flops_plain, kept_plain = plain
    found = {r: stack_loss(r) for r in POLICIES}
    done = {r: flops(*f) for r, f in found.items()}
    held = {r: kept(*f) for r, f in found.items()}
    assert flops_plain == done["dots"] < done["dots_no_batch"] < done["full"]
    assert held["full"] < held["dots_no_batch"] < held["dots"] < kept_plain
    # Of the products only the last one of a block is not needed again.
    assert done["full"] > 1.25 * flops_plain


def test_a_unet_keeps_its_convolutions():
    x, t = jnp.ones((1, 8, 8, 2)), jnp.ones(1)

    def loss(remat):
        module = UNet(channels=8, heads=1, remat=remat)
        return lambda params: jnp.sum(module.apply({"params": params}, x, t, train=True))

    module = UNet(channels=8, heads=1)
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t)["params"])
    done = {r: flops(loss(r), params) for r in (False, True, *POLICIES)}
    assert done[True] == done["full"] > 1.1 * done["dots"]
    assert done["dots"] == done[False] < done["dots_no_batch"]


@pytest.mark.parametrize(
    ("remat", "expected"),
    [
        (False, None),
        (None, None),
        ("none", None),
        (True, "full"),
        ("full", "full"),
        ("dots", "dots"),
    ],
)
def test_names(remat, expected):
    assert check_remat(remat) == expected
    module = rematerialised(nn.Dense, remat)
    assert (module is nn.Dense) == (expected is None)


@pytest.mark.parametrize("bad", ["dost", 2, "save_only_these_names", jax.checkpoint_policies])
def test_unknown_policies_are_refused(bad):
    with pytest.raises(
        ValueError, match="remat must be one of False, True, none, full, dots, "
    ) as error:
        stack_loss(bad)
    assert "\n" not in str(error.value)
    if bad == "dost":
        assert "did you mean 'dots'" in str(error.value)
