import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import MLP


def test_output_width_is_free():
    x = jnp.ones((2, 3))
    network = MLP(width=8, depth=1, out_features=5)
    y, _ = jax.eval_shape(network.init_with_output, jax.random.key(0), x, 0.5)
    assert y.shape == (2, 5)


def test_source_is_part_of_the_input(generic):
    # The network of (x, source) is the network of their concatenation.
    x, source = jax.random.normal(jax.random.key(0), (2, 4, 3))
    joint = MLP(width=8, depth=2, out_features=3)
    params = generic(joint, jnp.concatenate([x, source], -1), 0.5)
    split = MLP(width=8, depth=2, source_channels=3)
    np.testing.assert_allclose(
        jax.jit(split.apply)({"params": params}, x, 0.5, source=source),
        jax.jit(joint.apply)({"params": params}, jnp.concatenate([x, source], -1), 0.5),
        rtol=1e-6,
    )
