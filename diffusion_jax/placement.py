"""What a network tells the compiler about a mesh while a step is traced for one.

Left alone, XLA may take a parameter that is split over `fsdp` for one that is split for its own sake, and
gather the activations of the whole batch instead of the parameter. So, inside `tracing`,

  parameters   the parameters that a module is applied to come as boxes: the parameter is gathered where the
               module asks for it, layer by layer, and again in the backward pass of what is rematerialised
  constrain    an activation lies where it is said to
  per_shard    a function of parameters and of a batch works on each shard of the batch by itself

Outside `tracing`, and on one device, they change nothing.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH = ("data", "fsdp")


class _Active(NamedTuple):
    mesh: Mesh
    box: Callable[[Any], Any]
    gather: Callable[[Any], Any]


_ACTIVE: contextvars.ContextVar[_Active | None] = contextvars.ContextVar("placement", default=None)


@contextlib.contextmanager
def tracing(mesh: Mesh, box: Callable[[Any], Any], gather: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, what is traced is meant for a mesh with the axes `data`, `fsdp`, `model`.

    Args:
      mesh: the mesh.
      box: `parameters -> parameters` in boxes that a module opens.
      gather: `parameters -> parameters`, those split over `fsdp` gathered.
    """
    token = _ACTIVE.set(_Active(mesh, box, gather))
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def parameters(params: Any) -> Any:
    """The parameters that a module is to be applied to."""
    active = _ACTIVE.get()
    return params if active is None else active.box(params)


def gathered(params: Any) -> Any:
    """The parameters of a module, those that are split over `fsdp` gathered: for use outside a module."""
    active = _ACTIVE.get()
    return params if active is None else active.gather(params)


def ways(axis: str | tuple[str, ...]) -> int:
    """In how many parts a mesh axis, or several, split an array; 1 outside `tracing`."""
    active = _ACTIVE.get()
    if active is None:
        return 1
    parts = 1
    for name in (axis,) if isinstance(axis, str) else axis:
        parts *= active.mesh.shape[name]
    return parts


def constrain(x: jax.Array, *axes: Any) -> jax.Array:
    """x with each of its axes split over the named mesh axes, None: whole on every device.

    Axes that the mesh does not divide are left to the compiler.

    Args:
      x: an array.
      axes: one for each axis of x: the name of a mesh axis, several (`BATCH`), None, or
        `PartitionSpec.UNCONSTRAINED`.
    """
    active = _ACTIVE.get()
    if active is None or active.mesh.size == 1:
        return x
    spec = [
        P.UNCONSTRAINED if isinstance(axis, str | tuple) and size % ways(axis) else axis
        for axis, size in zip(axes, x.shape, strict=True)
    ]
    return jax.lax.with_sharding_constraint(x, NamedSharding(active.mesh, P(*spec)))


def per_shard(function: Callable[..., Any], params: Any, *batched: jax.Array) -> Any:
    """`function(params, *batched)`, of each shard of the batch with its own copy of the parameters.

    What the function does in a loop to its part of a batch then needs no exchange in that loop: the
    parameters are gathered before it, and their gradients summed over the devices after it.

    Args:
      function: of parameters and arrays [b, ...], row by row; gives a pytree of arrays [b, ...].
      params: pytree of arrays, see `gathered`.
      batched: arrays [B, ...].
    """
    shards = ways(BATCH)
    if shards == 1 or any(not x.ndim or x.shape[0] % shards for x in batched):
        return function(params, *batched)

    def copies(x: jax.Array) -> jax.Array:
        many = jnp.broadcast_to(x, (shards, *x.shape))
        return constrain(many, BATCH, *[P.UNCONSTRAINED] * x.ndim)

    def split(x: jax.Array) -> jax.Array:
        parts = x.reshape(shards, x.shape[0] // shards, *x.shape[1:])
        return constrain(parts, BATCH, *[None] * x.ndim)

    own = jax.tree.map(copies, params)
    found = jax.vmap(function)(own, *map(split, batched))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
