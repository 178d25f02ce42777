"""Rematerialisation: what a block keeps for its backward pass, and what it computes again.

  "none", False    everything is kept
  "full", True     the block's inputs; the rest is computed again (arXiv 1604.06174)
  "dots"           inputs and results of all matrix products and convolutions; what is computed
                   again are norms, activations and modulations, which cost memory but little time
  "dots_no_batch"  the same without products that have a batch axis: attention weights [B, heads, L, L]
                   and, in a U-Net, the convolutions are computed again

The policies of `jax.checkpoint_policies` that need no argument go by their own names as well.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from diffusion_jax.registry import check_choice

_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_saveable": jax.checkpoint_policies.dots_saveable,
    "dots_with_no_batch_dims_saveable": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing_saveable": jax.checkpoint_policies.nothing_saveable,
    "everything_saveable": jax.checkpoint_policies.everything_saveable,
}


def check_remat(remat: Any) -> str | None:
    """The name of a policy, None for no rematerialisation.

    Args:
      remat: False, None or "none", True (the same as "full"), or the name of a policy.

    Raises:
      ValueError: none of these.
    """
    if remat is None or isinstance(remat, bool):
        return "full" if remat else None
    check_choice("remat", remat, (False, True, "none", *_POLICIES))
    return None if remat == "none" else remat


def rematerialised(
    block: Callable[..., Any],
    remat: Any,
    static_argnums: int | tuple[int, ...] = (),
    *,
    prevent_cse: bool = True,
) -> Callable[..., Any]:
    """A module class, or a function of modules, that keeps for the backward pass what `remat` says.

    Args:
      block: a `flax.linen.Module` class, or a function whose first argument is a module.
      remat: see the top of this file.
      static_argnums: arguments of `__call__` (0 is the module) that are no arrays, such as `train`.
      prevent_cse: False inside a scan, where XLA cannot undo the recomputation and is told less.

    Returns:
      What can be used as `block` is; `block` itself without rematerialisation.

    Raises:
      ValueError: see `check_remat`.
    """
    name = check_remat(remat)
    if name is None:
        return block
    return nn.remat(
        block, policy=_POLICIES[name], static_argnums=static_argnums, prevent_cse=prevent_cse
    )
