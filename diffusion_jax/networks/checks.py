"""The boundary of every network: shapes, dtypes and conditions are checked here, once.

Inside the networks everything is known to be well formed: `x` has the layout of the network, `t` is
float32 `[B]`, `label` is int32 `[B]` (the null class where nothing was given) or None, and `source`
has the channels the network was built for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_LAYOUTS = {"points": "[B, D]", "image": "[B, H, W, C]", "tokens": "[B, L]", "weights": "[B, L, V]"}
_MIN_TIME_BITS = 32


class Inputs(NamedTuple):
    """Checked inputs of a network.

    Attributes:
      x: the state, in the layout of the network and in its own dtype.
      t: float32 [B], or None for a network without time.
      label: int32 [B], or None for an unconditional network.
      source: the conditioning array, or None for a network without source.
    """

    x: jax.Array
    t: jax.Array | None
    label: jax.Array | None
    source: jax.Array | None


def check_inputs(
    network: str,
    layout: str,
    x: Any,
    t: Any,
    *,
    label: Any = None,
    source: Any = None,
    num_classes: int | None = None,
    source_channels: int = 0,
    uses_time: bool = True,
    train: bool = False,
) -> Inputs:
    """Checks and normalises what a network was called with.

    Args:
      network: name used in messages.
      layout: "points" for float x [B, D], "image" for float x [B, H, W, C], "tokens" for int x
        [B, L], "weights" for float x [B, L, V].
      x: the state.
      t: real number or [B]; a scalar is broadcast. Ignored if not `uses_time`.
      label: integer [B] with values 0..num_classes, of which `num_classes` is the null class, or
        None. None means the null class; it is refused in training, where a forgotten label would
        silently train an unconditional network.
      source: float array shaped like x but for `source_channels` in the last axis.
      num_classes: number of classes, None or 0 for an unconditional network.
      source_channels: last axis of the source, 0 for a network without source.
      uses_time: whether the network reads t.
      train: whether this is a training call.

    Returns:
      Inputs.

    Raises:
      ValueError: a shape, dtype or condition does not fit the network.
    """
    x = _check_state(network, layout, jnp.asarray(x))
    batch = x.shape[0]
    return Inputs(
        x,
        _check_time(network, t, batch) if uses_time else None,
        _check_label(network, label, batch, num_classes, train),
        _check_source(network, source, x, source_channels),
    )


def _check_state(network: str, layout: str, x: jax.Array) -> jax.Array:
    if x.ndim != len(_LAYOUTS[layout].split(",")):
        raise ValueError(f"{network}: x must be {_LAYOUTS[layout]}, got shape {x.shape}")
    kind, wanted = (
        (jnp.floating, "a floating") if layout != "tokens" else (jnp.integer, "an integer")
    )
    if not jnp.issubdtype(x.dtype, kind):
        raise ValueError(f"{network}: x must have {wanted} dtype, got {x.dtype}")
    return x


def _check_time(network: str, t: Any, batch: int) -> jax.Array:
    if t is None:
        raise ValueError(f"{network}: t is missing; pass a scalar or an array [B] = ({batch},)")
    t = jnp.asarray(t)
    if jnp.issubdtype(t.dtype, jnp.floating):
        if jnp.finfo(t.dtype).bits < _MIN_TIME_BITS:
            raise ValueError(
                f"{network}: t is {t.dtype}, in which neighbouring times collapse; pass float32"
            )
    elif not jnp.issubdtype(t.dtype, jnp.integer):
        raise ValueError(f"{network}: t must be a real number, got dtype {t.dtype}")
    if t.shape not in ((), (batch,)):
        raise ValueError(f"{network}: t must be a scalar or [B] = ({batch},), got shape {t.shape}")
    return jnp.broadcast_to(t.astype(jnp.float32), (batch,))


def _check_label(
    network: str, label: Any, batch: int, num_classes: int | None, train: bool
) -> jax.Array | None:
    if not num_classes:
        if label is not None:
            raise ValueError(
                f"{network}: a label was given to an unconditional network; build it with "
                "num_classes=..., or pass label=None"
            )
        return None
    if label is None:
        if train:
            raise ValueError(
                f"{network}: label is missing in training of a network with {num_classes} classes; "
                f"pass integers [B], or the null class {num_classes} to train without condition"
            )
        return jnp.full((batch,), num_classes, jnp.int32)
    label = jnp.asarray(label)
    if not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(f"{network}: label must have an integer dtype, got {label.dtype}")
    if label.shape != (batch,):
        raise ValueError(f"{network}: label must be [B] = ({batch},), got shape {label.shape}")
    return label.astype(jnp.int32)


def _check_source(
    network: str, source: Any, x: jax.Array, source_channels: int
) -> jax.Array | None:
    if not source_channels:
        if source is not None:
            raise ValueError(
                f"{network}: a source was given to a network built without one; build it with "
                "source_channels=..., or pass source=None"
            )
        return None
    shape = (*x.shape[:-1], source_channels)
    if source is None:
        raise ValueError(f"{network}: source is missing; the network was built for {shape}")
    source = jnp.asarray(source)
    if source.shape != shape:
        raise ValueError(f"{network}: source must have shape {shape}, got {source.shape}")
    if not jnp.issubdtype(source.dtype, jnp.floating):
        raise ValueError(f"{network}: source must have a floating dtype, got {source.dtype}")
    return source


def check_dtype(network: str, dtype: Any) -> Any:
    """The compute dtype of a network as a dtype object; names such as "bfloat16" are understood.

    Raises:
      ValueError: not the name of a floating dtype.
    """
    try:
        dtype = jnp.dtype(dtype)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{network}: dtype must be a floating dtype; valid: float32, bfloat16")
    return dtype


def check_positive(network: str, **sizes: int) -> None:
    """Refuses sizes that are not positive integers.

    Raises:
      ValueError: names the field and its value.
    """
    for field, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{network}: {field} must be a positive integer, got {value!r}")


def check_rate(network: str, field: str, rate: float) -> None:
    """Refuses a dropout rate outside [0, 1).

    Raises:
      ValueError: names the field and its value.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"{network}: {field} must be in [0, 1), got {rate!r}")


def check_divides(network: str, divisor: str, divisor_value: int, field: str, value: int) -> None:
    """Refuses a size that another one does not divide.

    Raises:
      ValueError: names both fields and their values.
    """
    if value % divisor_value:
        raise ValueError(
            f"{network}: {field} = {value} must be divisible by {divisor} = {divisor_value}"
        )


def check_levels(network: str, channel_mults: Any) -> None:
    """Raises ValueError unless a U-Net has levels, each with a positive multiplier."""
    if not channel_mults:
        raise ValueError(
            f"{network}: channel_mults must name one multiplier for each level, got ()"
        )
    check_positive(network, **{f"channel_mults[{i}]": m for i, m in enumerate(channel_mults)})


def check_sides(network: str, x: jax.Array, levels: int) -> None:
    """Raises ValueError unless an image [B, H, W, C] can be halved from level to level."""
    for field, size in (("height", x.shape[1]), ("width", x.shape[2])):
        check_divides(network, "2**(levels - 1)", 2 ** (levels - 1), field, size)
