import jax
import numpy as np
import pytest


@pytest.fixture(autouse=True)
def strict_and_quick_to_compile():
    """No implicit rank promotion; compiled code that runs a few times need not be fast."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with jax.numpy_rank_promotion("raise"):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def generic():
    """Parameters (NumPy) in general position, of a module called with `args`.

    At initialisation every network is zero and every block the identity, which hides mistakes.
    """

    def draw(module, *args, scale=0.3, seed=0, **kwargs):
        # The arguments are closed over: some are not arrays.
        shapes = jax.eval_shape(lambda key: module.init(key, *args, **kwargs), jax.random.key(0))
        rng = np.random.default_rng(seed)

        def values(path, leaf):
            mean = 1.0 if path[-1].key == "scale" else 0.0
            return (mean + scale * rng.standard_normal(leaf.shape)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(values, shapes["params"])

    return draw
