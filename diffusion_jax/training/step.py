"""The one training step, written once for every method and every kind of parallelism."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion_jax.methods.base import Context, Method
from diffusion_jax.training.optim import Optimizer, global_norm
from diffusion_jax.training.state import (
    BAD_GRADIENT,
    BAD_UPDATE,
    RUNNING,
    TrainState,
    ema_name,
    ema_rate,
    update_ema,
)

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    method: Method,
    optimizer: Optimizer,
    *,
    batch_size: int,
    decays: tuple[float, ...] = (),
    ema_warmup: bool | str = False,
    microbatches: int = 1,
    axis_name: str | None = None,
) -> TrainStep:
    """The pure function `(state, batch, base key) -> (state, metrics)`.

    The loss gets the key `fold_in(base key, state.step)` and a context with the step, the average
    of the first decay (None without one), the global batch size and the method state. What a loss
    returns among its metrics as "method_state" is the next method state.

    Metrics are float32 scalars: those of the method, `loss`, `grad_norm` (before clipping),
    `param_norm` (after the update), `learning_rate`, and `halt`, see `TrainState`. A step whose loss
    or gradient is not finite changes nothing but `halt`.

    Args:
      method: the model family.
      optimizer: see `make_optimizer`.
      batch_size: size of the global batch.
      decays: of the averages in the state, in the config's order.
      ema_warmup: see `ema_rate`.
      microbatches: parts that the batch is computed in, one after the other.
      axis_name: the mapped axis under `jax.pmap`, over which loss and gradient are averaged.
    """

    def loss_fn(params: Any, state: TrainState, batch: Any, key: jax.Array):
        ema = state.ema[ema_name(decays[0])] if decays else None
        context = Context(step=state.step, ema=ema, state=state.method_state, batch_size=batch_size)
        loss, metrics = method.loss(params, key, batch, context)
        if jnp.shape(loss) != ():
            raise ValueError(f"the loss of a method is a scalar; got shape {jnp.shape(loss)}")
        metrics = dict(metrics)
        method_state = metrics.pop("method_state", state.method_state)
        for name, value in metrics.items():
            if jnp.shape(value) != ():
                raise ValueError(f"metric {name!r} must be a scalar; got shape {jnp.shape(value)}")
        return loss, (metrics | {"loss": loss}, method_state)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    project = getattr(method, "project", None) or (lambda params: params)

    def gradient(state: TrainState, batch: Any, key: jax.Array):
        if microbatches == 1:
            (_, (metrics, method_state)), grads = grad_fn(state.params, state, batch, key)
            return grads, metrics, method_state

        # Every n-th example, so that each part is spread over the devices as the whole batch is.
        def split(x: jax.Array) -> jax.Array:
            return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)

        def body(carry, part):
            total, method_state = carry
            part_state = state.replace(method_state=method_state)
            (_, (metrics, method_state)), grads = grad_fn(state.params, part_state, part, key)
            return (jax.tree.map(jnp.add, total, grads), method_state), metrics

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        (grads, method_state), metrics = jax.lax.scan(
            body, (zeros, state.method_state), jax.tree.map(split, batch)
        )
        mean = lambda x: jnp.mean(x, axis=0, dtype=jnp.float32)
        return (
            jax.tree.map(lambda g: g / microbatches, grads),
            jax.tree.map(mean, metrics),
            method_state,
        )

    def train_step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Metrics]:
        grads, metrics, method_state = gradient(state, batch, jax.random.fold_in(key, state.step))
        if axis_name is not None:
            grads, metrics, method_state = _mean_over(axis_name, (grads, metrics, method_state))
        grad_norm = global_norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
        ok = finite & (state.halt == RUNNING)
        updates_done = state.step // optimizer.accumulate
        moves = (state.step + 1) % optimizer.accumulate == 0

        # An accumulated gradient has another norm than this batch's.
        known = {"grad_norm": grad_norm} if optimizer.accumulate == 1 else {}

        def update(old: _Moving) -> _Moving:
            updates, opt_state = optimizer.update(grads, old.opt_state, old.params, **known)
            params = project(optax.apply_updates(old.params, updates))
            ema = {}
            for d in decays:
                rate = ema_rate(d, updates_done, ema_warmup)
                if optimizer.accumulate > 1:
                    rate = jnp.where(moves, rate, 0.0)
                ema[ema_name(d)] = update_ema(old.ema[ema_name(d)], params, rate)
            return _Moving(params, ema, opt_state, method_state)

        old = _Moving(state.params, state.ema, state.opt_state, state.method_state)
        new = _update_if(ok, update, old)
        param_norm = global_norm(new.params)
        bad = jnp.where(jnp.isfinite(param_norm), RUNNING, BAD_UPDATE)
        bad = jnp.where(finite, bad, BAD_GRADIENT)
        halt = jnp.where(state.halt == RUNNING, bad, state.halt).astype(jnp.int32)
        new_state = TrainState(step=state.step + ok.astype(jnp.int32), halt=halt, **new._asdict())
        metrics |= {
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": optimizer.learning_rate(updates_done),
            "halt": halt,
        }
        return new_state, {k: jnp.asarray(v, jnp.float32) for k, v in metrics.items()}

    return train_step


class _Moving(NamedTuple):
    """The part of a state that a good step replaces."""

    params: Any
    ema: Any
    opt_state: Any
    method_state: Any


def _update_if(ok: jax.Array, update: Callable[[_Moving], _Moving], old: _Moving) -> _Moving:
    """`update(old)` where `ok`, else `old`, in place when `old` is donated.

    On CPU a selection would cost a copy of each optimiser moment and a branch costs nothing; on an
    accelerator a branch would make the host wait for the flag and the selection is fused.
    """

    def branch(ok: jax.Array, old: _Moving) -> _Moving:
        return jax.lax.cond(ok, update, lambda kept: kept, old)

    def select(ok: jax.Array, old: _Moving) -> _Moving:
        return jax.tree.map(lambda n, o: jnp.where(ok, n, o), update(old), old)

    return jax.lax.platform_dependent(ok, old, cpu=branch, default=select)


def _mean_over(axis_name: str, tree: Any) -> Any:
    """`lax.pmean` of the floating leaves; others are equal on all devices already."""
    return jax.tree.map(
        lambda x: jax.lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.inexact) else x, tree
    )
