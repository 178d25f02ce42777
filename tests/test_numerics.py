"""Helpers shared by every layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax import numerics, processes, samplers


def test_namespace_follows_the_arguments():
    assert numerics.namespace(1.0, np.ones(2)) is np
    assert numerics.namespace(1.0, jnp.ones(2)) is jnp
    seen = []
    jax.jit(lambda v: seen.append(numerics.namespace(0.5, v)))(1.0)
    assert seen == [jnp]


def test_as_time_on_the_host_is_float64():
    for value in (1, 0.5, np.float32(0.5), [0, 1], np.arange(3)):
        xp, t = numerics.as_time(value)
        assert xp is np and t.dtype == np.float64 and np.shape(t) == np.shape(value)


def test_as_time_on_the_device_keeps_floats_and_converts_integers():
    for value, dtype in (
        (jnp.ones(2), jnp.float32),
        (jnp.ones(2, jnp.bfloat16), jnp.bfloat16),
        (jnp.arange(2), jnp.float32),
    ):
        xp, t = numerics.as_time(value)
        assert xp is jnp and t.dtype == dtype
    xp, t = numerics.as_time(0.5, 1.0, jnp.ones(()))  # a traced parameter is enough
    assert xp is jnp and t == 0.5


def test_expand():
    x = np.zeros((3, 4, 5))
    assert numerics.expand(2.0, x) == 2.0
    assert numerics.expand(np.float64(2.0), x) == 2.0
    assert numerics.expand(np.arange(3), x).shape == (3, 1, 1)
    assert numerics.expand(np.zeros((3, 4)), x).shape == (3, 4, 1)


def test_sum_per_example():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(numerics.sum_per_example(x), [66.0, 210.0])


def test_an_example_key_depends_on_key_and_index_alone():
    key = jax.random.key(0)
    keys = numerics.example_keys(key, jnp.array([5, 2, 5]))
    assert keys.shape == (3,)
    data = jax.random.key_data(keys)
    np.testing.assert_array_equal(data[0], jax.random.key_data(jax.random.fold_in(key, 5)))
    np.testing.assert_array_equal(data[0], data[2])
    assert (data[0] != data[1]).any()
    again = jax.random.key_data(numerics.fold_all(keys, 7))
    np.testing.assert_array_equal(again[1], jax.random.key_data(jax.random.fold_in(keys[1], 7)))


def test_normal_per_example():
    keys = numerics.example_keys(jax.random.key(1), jnp.arange(4000))
    z = numerics.normal_per_example(keys, jnp.zeros((4000, 2)))
    np.testing.assert_allclose(z.mean(0), 0.0, atol=4 / np.sqrt(4000))
    np.testing.assert_allclose(np.cov(np.asarray(z).T), np.eye(2), atol=4 * np.sqrt(2 / 4000))
    part = numerics.normal_per_example(keys[10:13], jnp.zeros((3, 2)))
    np.testing.assert_array_equal(part, z[10:13])


def test_normal_per_example_of_a_pytree():
    keys = numerics.example_keys(jax.random.key(1), jnp.arange(3))
    like = {"a": jnp.zeros((3, 4)), "b": jnp.zeros((3, 4)), "c": jnp.zeros((3,), jnp.bfloat16)}
    z = numerics.normal_per_example(keys, like)
    assert {k: (v.shape, v.dtype) for k, v in z.items()} == {
        k: (v.shape, v.dtype) for k, v in like.items()
    }
    assert (z["a"] != z["b"]).all()  # leaves of one shape draw different numbers
    np.testing.assert_array_equal(
        numerics.normal_per_example(keys[1:2], jax.tree.map(lambda v: v[1:2], like))["b"],
        z["b"][1:2],
    )


def test_batch_size():
    assert numerics.batch_size({"a": np.zeros((3, 2)), "b": np.zeros(3)}) == 3
    for wrong in ({"a": np.zeros((3, 2)), "b": np.zeros(4)}, np.zeros(()), {}):
        with pytest.raises(ValueError, match="share a leading batch axis"):
            numerics.batch_size(wrong)


def test_pytree_dataclass():
    @numerics.pytree_dataclass
    class Point:
        x: float
        y: float = 2.0
        name: str = numerics.static("p")

    point = Point(1.0)
    leaves, tree = jax.tree.flatten(point)
    assert leaves == [1.0, 2.0]
    assert tree.unflatten([3.0, 4.0]) == Point(3.0, 4.0, "p")
    with pytest.raises(AttributeError):
        point.x = 3.0
    traces = []

    @jax.jit
    def total(p):
        traces.append(p.name)
        return p.x + p.y

    assert [total(Point(1.0)), total(Point(5.0)), total(Point(1.0, 2.0, "q"))] == [3.0, 7.0, 3.0]
    assert traces == ["p", "q"]  # numbers are leaves, static fields are structure


def test_classes_of_as_many_numbers_are_different_structures():
    """JAX takes registered dataclasses of one shape for equal: `jit` may run the one for the other."""
    first, second = processes.VEBridge(), processes.BrownianBridge()
    assert len(jax.tree.leaves(first)) == len(jax.tree.leaves(second))
    assert jax.tree.structure(first) != jax.tree.structure(second)
    assert jax.tree.structure(second) == jax.tree.structure(processes.BrownianBridge(1.3))


def test_is_concrete():
    assert numerics.is_concrete(1, 2.0, np.float32(3.0))
    assert not numerics.is_concrete(1, jnp.ones(()))
    assert not numerics.is_concrete(object())


@pytest.mark.parametrize("wide_first", (True, False))
def test_a_numpy_array_serves_programs_of_both_precisions(wide_first):
    """What JAX made of the array in one precision stays alive here while the other one is asked for."""
    weights = np.arange(1.0, 4.0)
    model = jax.tree_util.Partial(lambda w, x, t: x * w, weights)
    sampler = samplers.ddim(processes.VP(), 3)

    def run(wide):
        with jax.enable_x64(wide):
            held = jax.make_jaxpr(lambda: jnp.sin(weights))()
            x = samplers.sample(sampler, model, None, jnp.ones((2, 3)))
        return held, x

    first, second = run(wide_first), run(not wide_first)
    assert first[1].dtype != second[1].dtype
    np.testing.assert_allclose(first[1], second[1], rtol=1e-5)
