"""A checksum of an array that does not depend on how the array is split over devices.

It is a sum in integers of the bits, in 32-bit words (smaller ones for smaller dtypes), weighted by
position:

  (1) c = sum_i (2 i + 1) bits_i  mod 2^32.

Any change of a single word changes it: an odd number has an inverse modulo 2^32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksum(x: jax.Array) -> int:
    """Equation (1) of an array of numbers, in [0, 2^32)."""
    if getattr(x, "is_fully_addressable", True) and _on_host(x):
        return int(_weighted_sum(np.asarray(x), np))
    return int(device_sum(x))


def _on_host(x: Any) -> bool:
    return not isinstance(x, jax.Array) or next(iter(x.devices())).platform == "cpu"


def _weighted_sum(x: Any, xp: Any) -> Any:
    if x.dtype == bool:
        x = x.astype(xp.uint8)
    words = xp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")
    if xp is np:
        bits = np.ascontiguousarray(x).reshape(-1).view(words)
    else:
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            x = jnp.stack([x.real, x.imag], axis=-1)
        bits = jax.lax.bitcast_convert_type(x, words)
    weights, stride = xp.ones((), xp.uint32), 2
    for axis in reversed(range(bits.ndim)):
        place = xp.arange(bits.shape[axis], dtype=xp.uint32) * xp.uint32(stride % 2**32)
        weights = weights + place.reshape((-1,) + (1,) * (bits.ndim - 1 - axis))
        stride *= bits.shape[axis]
    return xp.sum(bits.astype(xp.uint32) * weights, dtype=xp.uint32)


@jax.jit
def device_sum(x: jax.Array) -> jax.Array:
    """Equation (1) computed where the array lies: uint32 scalar."""
    return _weighted_sum(x, jnp)
