"""Parameters that are gathered where a module asks for them, and whose gradients are scattered there.

  forward    at rest (split over `fsdp`) -> in use (whole, but for the axis `model`)     all-gather
  backward   gradient of what was in use, summed over the batch -> at rest           reduce-scatter

The parameter is a Flax box, opened by `Module.param`: inside a scan over layers that is after the layer has
been sliced out of the stack, and inside a rematerialised block the backward pass gathers it again. A layer
that computes in bfloat16 rounds its kernel before the gather, which halves the traffic and changes nothing.
Without rematerialisation what was gathered is kept for the backward pass: all parameters of the network lie
whole on each device by then. "dots" (see `networks.remat`) costs little and avoids it.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from flax.core import meta
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax import placement

_DTYPE: contextvars.ContextVar[Any] = contextvars.ContextVar("compute_dtype", default=None)
_ROUNDED = (nn.Dense, nn.Conv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _moved(x: jax.Array, before: NamedSharding, after: NamedSharding) -> jax.Array:
    x = jax.lax.with_sharding_constraint(x, before)
    return jax.lax.with_sharding_constraint(x, after)


def _forward(x, before, after):
    return _moved(x, before, after), None


def _backward(before, after, _, gradient):
    return (jax.lax.with_sharding_constraint(gradient, before),)


_moved.defvjp(_forward, _backward)


@struct.dataclass
class Gathered(meta.AxisMetadata):
    """A parameter in a box.

    Attributes:
      value: the array.
      mesh: where it lives.
      spec: how it is split at rest.
      shape, dtype: of the array.
    """

    value: Any
    mesh: Mesh = struct.field(pytree_node=False)
    spec: tuple[Any, ...] = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return self.value.dtype

    def unbox(self) -> Any:
        """The parameter in use."""
        x, dtype = self.value, _DTYPE.get()
        if not hasattr(x, "dtype"):  # structures are mapped over too
            return x
        if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(dtype) if jnp.dtype(dtype).itemsize < x.dtype.itemsize else x
        before = NamedSharding(self.mesh, P(*self.spec))
        after = NamedSharding(self.mesh, P(*map(_without_fsdp, self.spec)))
        return _moved(x, before, after)

    def replace_boxed(self, val: Any) -> "Gathered":
        """The same box around another value."""
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Gathered":
        """A box with a new axis, which is not split."""
        spec = list(self.spec)
        spec.insert(index, None)
        return self.replace(spec=tuple(spec))

    def remove_axis(self, index: int, params: dict[Any, Any]) -> "Gathered":
        """The box of a slice along an axis."""
        spec = list(self.spec)
        del spec[index]
        return self.replace(spec=tuple(spec))


def _without_fsdp(axes: Any) -> Any:
    left = tuple(a for a in _names(axes) if a != "fsdp")
    return left if len(left) > 1 else left[0] if left else None


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def boxed(params: Any, mesh: Mesh, specs: Any) -> Any:
    """The parameters with those in boxes that are split.

    Args:
      params: pytree of arrays.
      mesh: the mesh.
      specs: a `PartitionSpec` for each.
    """

    def box(x: jax.Array, spec: P) -> Any:
        if not any(_names(axes) for axes in spec):
            return x
        return Gathered(x, mesh, (*spec, *[None] * (x.ndim - len(spec))))

    return jax.tree.map(box, params, specs)


def _with_dtype(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    """Runs a module's method; a linear layer's parameters are rounded to its dtype before they move."""
    rounds = isinstance(context.module, _ROUNDED) and context.method_name == "__call__"
    token = _DTYPE.set(context.module.dtype if rounds else None)
    try:
        return call(*args, **kwargs)
    finally:
        _DTYPE.reset(token)


@contextlib.contextmanager
def tracing(mesh: Mesh, specs_of: Callable[[Any], Any]) -> Iterator[None]:
    """While it lasts, modules gather the parameters they are applied to.

    Args:
      mesh: the mesh.
      specs_of: `params -> specs`, see `boxed`.
    """
    box = lambda params: boxed(params, mesh, specs_of(params))
    gather = lambda params: meta.unbox(box(params))
    # The mesh in JAX's own context keeps what functions are traced to apart from what they are elsewhere.
    with jax.set_mesh(mesh), placement.tracing(mesh, box, gather):
        with nn.intercept_methods(_with_dtype):
            yield
