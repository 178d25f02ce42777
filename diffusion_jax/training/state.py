"""The training state: everything a step changes, and how the averages in it move."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.methods.base import Method
from diffusion_jax.numerics import pytree_dataclass
from diffusion_jax.registry import check_choice
from diffusion_jax.training.optim import Optimizer
from diffusion_jax.training.power_ema import power_rate

# Data folded into the base key for what is not a training step (steps count up from 0).
INIT_FOLD = 2**32 - 1
SAMPLE_FOLD = 2**32 - 2

RUNNING, BAD_GRADIENT, BAD_UPDATE = 0, 1, 2


@pytree_dataclass
class TrainState:
    """A pytree; no key is in it, since step `n` uses `fold_in(base key, n)`.

    Attributes:
      step: int32 scalar, number of steps done; also the number of the next batch.
      params: what the method's `init` gave.
      ema: name of the decay (`ema_name`) -> averaged parameters.
      opt_state: of the optimiser.
      method_state: pytree of the method's own (a frozen teacher, running statistics), or None.
      halt: int32 scalar. `RUNNING`; `BAD_GRADIENT` when the loss or the gradient of step `step` was
        not finite (the state is the one before that step); `BAD_UPDATE` when the norm of the
        parameters after it is not. A halted state is left as it is by further steps.
    """

    step: jax.Array
    params: Any
    ema: dict[str, Any]
    opt_state: Any
    method_state: Any
    halt: jax.Array

    def replace(self, **changes: Any) -> "TrainState":
        """A copy with some fields replaced."""
        return dataclasses.replace(self, **changes)


def ema_name(decay: float) -> str:
    """Key of a decay in `TrainState.ema`: 0.999 -> "0.999"."""
    return str(float(decay))


def create_state(
    method: Method,
    optimizer: Optimizer,
    decays: tuple[float, ...],
    key: jax.Array,
    batch: Any,
    params: Any = None,
) -> TrainState:
    """The state before the first step; averages start at the parameters.

    Parameters that the method wants projected (`Method.project`) are.

    Pure, so it can be run under `jax.eval_shape` and under `jax.jit` with `out_shardings`. A method
    may have `init_state(key, params, batch) -> pytree` beside `init`; it gives `method_state`.

    Args:
      method: the model family.
      optimizer: see `make_optimizer`.
      decays: of the averages.
      key: the base key of the run.
      batch: dict of arrays [B, ...], the first batch.
      params: parameters to start from; None: those of `method.init`.
    """
    init_key, state_key = jax.random.split(jax.random.fold_in(key, INIT_FOLD))
    params = method.init(init_key, batch) if params is None else params
    project = getattr(method, "project", None)
    params = params if project is None else project(params)
    init_state = getattr(method, "init_state", None)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema={ema_name(d): params for d in decays},
        opt_state=optimizer.init(params),
        method_state=None if init_state is None else init_state(state_key, params, batch),
        halt=jnp.full((), RUNNING, jnp.int32),
    )


def ema_rate(decay: float, count: Any, warmup: bool | str = False) -> Any:
    """`1 - decay`, the weight of the new parameters in the update that follows `count` others.

    With `warmup` the decay is min(decay, (1 + count) / (10 + count)), so that a long average forgets
    the initial parameters early on. With "power" it goes on growing for the whole run, and `decay` is the
    relative width of the average's profile (`power_ema`).

    Raises:
      ValueError: another `warmup`, or a width that no such profile has.
    """
    check_choice("ema_warmup", warmup, (False, True, "power"))
    if warmup == "power":
        return power_rate(decay, count)
    if not warmup:
        return 1.0 - decay
    return jnp.maximum(1.0 - decay, 9.0 / (10.0 + jnp.asarray(count, jnp.float32)))


def update_ema(ema: Any, params: Any, rate: Any) -> Any:
    """`ema + rate * (params - ema)`, leaf by leaf.

    In this form equal parameters are a fixed point. `(1 - rate) * ema + rate * params`, the same on
    paper, is not: in float32 at a decay of 0.99999 its weights miss 1 by enough to shrink or stretch
    the average by 0.1 %.

    Args:
      ema: averaged parameters.
      params: the new parameters; leaves that are not floating are taken as they are.
      rate: scalar in [0, 1].
    """

    def blend(old: jax.Array, new: jax.Array) -> jax.Array:
        if not jnp.issubdtype(new.dtype, jnp.inexact):
            return new
        return (old + rate * (new - old)).astype(old.dtype)

    return jax.tree.map(blend, ema, params)
