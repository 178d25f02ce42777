"""Host and device helpers shared by every layer: NumPy-or-JAX dispatch, broadcasting, per-example keys."""

import dataclasses
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np


def namespace(*values: Any):
    """`jax.numpy` if any value is a JAX array or tracer, else `numpy`.

    Schedules are written once with the namespace of their arguments: with Python or NumPy numbers
    they run on the host in float64, with JAX arrays they are traced in the dtype of the argument.
    """
    return jnp if any(isinstance(v, jax.Array) for v in values) else np


def as_time(t: Any, *fields: Any):
    """`(xp, t)` with `t` a float64 NumPy array on the host, or the JAX array it is.

    `fields` are schedule parameters which may be traced too (a jitted function of a process).
    """
    xp = namespace(t, *fields)
    if xp is np:
        return np, np.asarray(t, np.float64)
    t = jnp.asarray(t)
    return jnp, t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.result_type(float))


def expand(v: Any, x: Any):
    """Appends axes to `v` (scalar, or one value an example) until it broadcasts against `x`."""
    ndim = getattr(v, "ndim", 0)
    return v if ndim == 0 else v.reshape(v.shape + (1,) * (x.ndim - ndim))


def sum_per_example(x: jax.Array) -> jax.Array:
    """Sum over all axes but the first: `[B, ...] -> [B]`."""
    return x.reshape(x.shape[0], -1).sum(axis=1)


def example_keys(key: jax.Array, index: jax.Array) -> jax.Array:
    """One key an example: `fold_in(key, index[i])`, `index` int `[B]` -> keys `[B]`.

    An example's randomness then depends on its own index alone, not on the batch it stands in.
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def fold_all(keys: jax.Array, data: Any) -> jax.Array:
    """`fold_in` of the same data into each key: keys `[B]` -> keys `[B]`."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def normal_per_example(keys: jax.Array, like: Any):
    """Standard normal of the shape and dtype of `like` (a pytree, leading axis = examples)."""
    leaves, tree = jax.tree.flatten(like)

    def draw(n: int, leaf: jax.Array) -> jax.Array:
        own = keys if len(leaves) == 1 else fold_all(keys, n)
        dtype = jnp.promote_types(leaf.dtype, jnp.float32)
        z = jax.vmap(lambda k: jax.random.normal(k, leaf.shape[1:], dtype))(own)
        return z.astype(leaf.dtype)

    return jax.tree.unflatten(tree, [draw(n, leaf) for n, leaf in enumerate(leaves)])


def batch_size(x: Any) -> int:
    """Leading-axis length shared by the leaves of a pytree.

    Raises:
      ValueError: no leaf, a scalar leaf, or leaves of different length.
    """
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(x)}
    if len(sizes) != 1 or None in sizes:
        shapes = [leaf.shape for leaf in jax.tree.leaves(x)]
        raise ValueError(f"arrays must share a leading batch axis; got shapes {shapes}")
    return sizes.pop()


@dataclass_transform(frozen_default=True)
def pytree_dataclass(cls):
    """A frozen dataclass that is a pytree: numbers are leaves (sweeping one never re-traces).

    Fields made with `static(...)` are structure: part of the tree definition. So is the class:
    `jax.tree_util.register_dataclass` leaves it out of the comparison of tree definitions (jax 0.10 to
    0.12), and one time in a hundred `jit` then runs one process's program with another's numbers.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    meta = [f.name for f in fields if f.metadata.get("static")]
    data = [f.name for f in fields if not f.metadata.get("static")]
    keys = [jax.tree_util.GetAttrKey(name) for name in data]

    def flatten(value):
        return [getattr(value, n) for n in data], (cls, *(getattr(value, n) for n in meta))

    def flatten_with_keys(value):
        leaves, structure = flatten(value)
        return list(zip(keys, leaves, strict=True)), structure

    def unflatten(structure, leaves):
        return cls(
            **dict(zip(meta, structure[1:], strict=True)), **dict(zip(data, leaves, strict=True))
        )

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field of a `pytree_dataclass` that is structure, not a leaf."""
    return dataclasses.field(default=default, metadata={"static": True})


def is_concrete(*values: Any) -> bool:
    """Whether all values are plain numbers that can be checked on the host."""
    return all(isinstance(v, int | float | np.number) for v in values)


def check_times(process: Any) -> None:
    """Raises ValueError unless `0 <= t_min < t_max <= 1`, where both are plain numbers."""
    low, high = process.t_min, process.t_max
    if is_concrete(low, high) and not 0.0 <= low < high <= 1.0:
        raise ValueError(
            f"{type(process).__name__}: need 0 <= t_min < t_max <= 1, got t_min = {low}, t_max = {high}"
        )


class _Same:
    """Makes any object a dictionary key: by value where it hashes, by identity where not."""

    def __init__(self, value):
        self.value = value
        try:
            self.hash = hash(value)
        except TypeError:
            self.hash = None

    def __hash__(self):
        return id(self.value) if self.hash is None else self.hash

    def __eq__(self, other):
        if self.value is other.value:
            return True
        return None not in (self.hash, other.hash) and bool(self.value == other.value)


def _node_types(treedef):
    """Types of the nodes, root first: JAX takes others' dataclasses of as many fields for the same."""
    node = treedef.node_data()
    return (node and node[0], *(_node_types(child) for child in treedef.children()))


_WIDE = tuple(np.dtype(name) for name in ("int64", "uint64", "float64", "complex128"))


def renewed(v: np.ndarray | np.generic) -> np.ndarray | np.generic:
    """A NumPy array for `jit`: one of 64 bits as a copy in the precision that JAX works in now.

    JAX remembers by the identity of an array what it made of it, whatever `jax.enable_x64` says since:
    the array itself may reach a float32 program as a float64 buffer.
    """
    return np.array(v, jax.dtypes.canonicalize_dtype(v.dtype)) if v.dtype in _WIDE else v


def split_traced(tree: Any) -> tuple[list, Any]:
    """A pytree as arguments of `jit`: `(arrays, static)`.

    `arrays` holds its arrays and floats (None elsewhere), to be traced; `static` everything else and
    the structure, hashable.
    """
    leaves, treedef = jax.tree.flatten(tree)
    traced = [isinstance(v, jax.Array | np.ndarray | np.generic | float) for v in leaves]
    arrays = [
        renewed(v) if isinstance(v, np.ndarray | np.generic) else v if is_array else None
        for v, is_array in zip(leaves, traced)
    ]
    static = (
        treedef,
        _node_types(treedef),
        tuple(None if is_array else _Same(v) for v, is_array in zip(leaves, traced)),
    )
    return arrays, static


def join_traced(arrays: Any, static: Any) -> Any:
    """The pytree that `split_traced` took apart."""
    treedef, _, others = static
    return treedef.unflatten(
        [a if o is None else o.value for a, o in zip(arrays, others, strict=True)]
    )
