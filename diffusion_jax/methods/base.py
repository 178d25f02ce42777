"""What the training loop knows of a model family: `Method(init, loss, sample)`, three pure functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Context(NamedTuple):
    """What a loss may need beside the parameters and the batch.

    Attributes:
      step: int32 scalar, the training step.
      ema: averaged parameters (a pytree like `params`) or None.
      batch_size: size of the global batch, of which `batch` may be one device's shard.
      train: whether dropout and the like are on.
    """

    step: Any = 0
    ema: Any = None
    batch_size: int | None = None
    train: bool = True


class Method(NamedTuple):
    """A model family as pure functions.

    Attributes:
      init: `(key, batch) -> params`.
      loss: `(params, key, batch, context) -> (scalar, metrics)`: the mean over the examples in
        `batch`. Randomness is folded per example with `batch["index"]`, the position in the global
        batch, so every sharding of a batch gives the same loss.
      denoiser: `(params, batch, train=False, key=None) -> denoise`: the callable that samplers and
        objectives take, with the conditions of `batch` closed over.
      sample: `(params, key, batch, sampler=None, **options) -> samples`, one for each row of `batch`
        (which holds the conditions and `index`), through `default_sampler` unless another is given.
      default_sampler: the sampler used when none is named.
      build_sampler: `(name, nfe=None, **options) -> Sampler` on this method's process.
      process: the forward process.
    """

    init: Callable[..., Any]
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    denoiser: Callable[..., Callable]
    sample: Callable[..., Any]
    default_sampler: Any
    build_sampler: Callable[..., Any]
    process: Any
