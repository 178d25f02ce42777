"""What every network begins with: its inputs checked, and the condition made of time and label."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_jax.networks.checks import check_inputs
from diffusion_jax.networks.layers import Condition


def enter(
    module: nn.Module,
    network: str,
    layout: str,
    x: Any,
    t: Any,
    label: Any,
    source: Any,
    train: bool,
    *,
    width: int,
    dtype: Any,
    **options: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """To be called in a network's compact `__call__`.

    Args:
      module: the network: its fields `num_classes`, `time_features`, `time_scale` and, where it has
        them, `source_channels` and `time_conditioned` are used.
      network, layout, x, t, label, source, train: see `checks.check_inputs`.
      width: of the condition.
      dtype: compute dtype.
      options: further ones of `layers.Condition`.
    Returns:
      x in the compute dtype with the source behind its channels (tokens and weights: as they are), and
      the condition [B, width], None for a network without time and label.
    Raises:
      ValueError: as `checks.check_inputs`.
    """
    x, t, label, source = check_inputs(
        network,
        layout,
        x,
        t,
        label=label,
        source=source,
        num_classes=module.num_classes,
        source_channels=getattr(module, "source_channels", 0),
        uses_time=getattr(module, "time_conditioned", True),
        train=train,
    )
    condition = Condition(
        width,
        module.num_classes,
        module.time_features,
        module.time_scale,
        dtype,
        name="condition",
        **options,
    )(t, label)
    if layout in ("points", "image"):
        parts = [x] if source is None else [x, source]
        x = jnp.concatenate([part.astype(dtype) for part in parts], axis=-1)
    return x, condition
