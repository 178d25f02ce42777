import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.networks import DiT

KEY = jax.random.key(0)


def count(tree):
    return sum(a.size for a in jax.tree.leaves(tree))


def test_has_the_parameters_of_the_paper():
    # DiT-XL/2 of facebookresearch/DiT holds 675,129,632 numbers (1000 classes, learned variance),
    # of which 256 x 1152 are the fixed position table, computed here.
    net = DiT(
        patch_size=2,
        width=1152,
        depth=28,
        heads=16,
        out_channels=8,
        num_classes=1000,
        time_features=256,
    )
    shapes = jax.eval_shape(net.init, KEY, jnp.zeros((1, 32, 32, 4)), jnp.zeros(1))
    assert count(shapes) == 675_129_632 - 256 * 1152


def test_parameters_serve_every_size(generic):
    net = DiT(width=16, depth=1, heads=2, out_channels=2)
    params = generic(net, jnp.zeros((1, 4, 4, 3)), 0.5)
    for height, width in ((4, 4), (2, 8), (10, 6)):
        x = jax.random.normal(KEY, (2, height, width, 3))
        y = jax.jit(net.apply)({"params": params}, x, 0.5)
        assert y.shape == (2, height, width, 2) and np.isfinite(y).all()


def test_output_patches_lie_on_input_patches(generic):
    # With closed gates the network maps every patch by itself, so a changed
    # pixel must change its own patch and no other.
    net = DiT(patch_size=2, width=16, depth=2, heads=2)
    x = jax.random.normal(KEY, (1, 6, 4, 1))
    params = generic(net, x, 0.5)
    modulation = params["blocks"]["block"]["modulation"]["linear"]
    modulation |= jax.tree.map(np.zeros_like, modulation)
    apply = jax.jit(net.apply)
    y = apply({"params": params}, x, 0.5)
    z = apply({"params": params}, x.at[0, 4, 1].add(1.0), 0.5)
    changed = np.asarray(np.abs(y - z)[0, :, :, 0] > 1e-4)
    expected = np.zeros((6, 4), bool)
    expected[4:6, 0:2] = True
    np.testing.assert_array_equal(changed, expected)


def test_errors():
    with pytest.raises(ValueError, match="width = 6 must be divisible by patch_size = 4"):
        jax.eval_shape(DiT(patch_size=4).init, KEY, jnp.zeros((1, 8, 6, 1)), 0.5)
    with pytest.raises(ValueError, match="width divisible by 4, got 6"):
        jax.eval_shape(DiT(width=6, heads=2).init, KEY, jnp.zeros((1, 8, 8, 1)), 0.5)
