"""Optimisers and learning-rate schedules from plain mappings.

A chain is: clip by global norm -> the named optax optimiser with its schedule -> accumulation over
several batches. Any optax (or `contrib.*`) optimiser that is built from a learning rate is known by
its name.

Schedules, with peak rate r, warm-up of w updates from 0 and t counted in updates:
  (1) constant   r
  (2) cosine     r (e + (1 - e) (1 + cos(pi (t - w) / (T - w))) / 2)      e = end_factor, T = steps
  (3) linear     r (1 - (1 - e) (t - w) / (T - w))
  (4) rsqrt      r / sqrt(max(t / timescale, 1)) min(t / w, 1)            arXiv 2312.02696, eq. 67
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.registry import check_choice
from diffusion_jax.training.config import check_keys

SCHEDULES = {
    "constant": ("warmup_steps",),
    "warmup": ("warmup_steps",),
    "cosine": ("warmup_steps", "steps", "end_factor"),
    "linear": ("warmup_steps", "steps", "end_factor"),
    "rsqrt": ("warmup_steps", "timescale"),
    "step": ("warmup_steps", "every", "factor"),
}

_OWN_KEYS = ("name", "learning_rate", "schedule", "weight_decay", "clip_norm", "accumulate")
# They need the loss value, a line search, a Hessian estimate or a key beside the gradient.
_UNFIT = {"lbfgs", "noisy_sgd", "contrib.momo", "contrib.momo_adam", "contrib.sophia"}


class Optimizer(NamedTuple):
    """An optax `GradientTransformation` (`init`, `update`) and what the loop reports about it.

    Attributes:
      init: `params -> opt_state`.
      update: `(grads, opt_state, params, **extra) -> (updates, opt_state)`; `grad_norm=` hands the
        clipping a norm of `grads` that is known already.
      learning_rate: `number of updates done -> learning rate of the next one`.
      accumulate: batches per update; in between, `update` returns zeros.
    """

    init: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]
    learning_rate: Callable[[Any], Any]
    accumulate: int = 1


@functools.cache
def optimizer_names() -> tuple[str, ...]:
    """Names `make_optimizer` knows: optax functions built from a learning rate alone."""
    found = []
    for module, prefix in ((optax, ""), (optax.contrib, "contrib.")):
        for name, build in inspect.getmembers(module, inspect.isfunction):
            fields = inspect.signature(build).parameters
            needed = {
                n
                for n, p in fields.items()
                if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            }
            private = name.startswith(("_", "scale_by_"))
            if "learning_rate" in fields and needed <= {"learning_rate"} and not private:
                found.append(prefix + name)
    return tuple(sorted(set(found) - _UNFIT))


def make_schedule(
    learning_rate: float,
    schedule: str | Mapping[str, Any] = "constant",
    total_steps: int | None = None,
) -> Callable[[Any], Any]:
    """A learning rate as a function of the number of updates done.

    Args:
      learning_rate: the peak.
      schedule: a name, or a mapping with `name` and its options: `warmup_steps` for all,
        `steps` (default `total_steps`) and `end_factor` (default 0) for cosine and linear,
        `timescale` (default the warm-up, at least 1) for rsqrt, whose warm-up may be a fraction of
        updates too, `every` and `factor` for step (the rate
        is multiplied by `factor` after each `every` updates).
      total_steps: length of the run in updates.

    Returns:
      `count -> rate`; count int scalar (Python, NumPy or JAX), rate a float32 JAX scalar or a float.

    Raises:
      ValueError: unknown schedule or option, or a decay whose length is not known or too short.
    """
    options = {"name": schedule} if isinstance(schedule, str) else dict(schedule)
    name = options.pop("name", "constant")
    check_choice("schedule", name, SCHEDULES)
    check_keys(f"option of schedule {name!r}", options, SCHEDULES[name])
    warmup = int(options.get("warmup_steps", 0))
    if name in ("cosine", "linear"):
        steps = options.get("steps") or total_steps
        if steps is None or steps <= warmup:
            raise ValueError(f"schedule {name!r} needs steps > warmup_steps={warmup}; got {steps}")
        end = float(options.get("end_factor", 0.0))
        if name == "cosine":
            body = optax.cosine_decay_schedule(learning_rate, steps - warmup, alpha=end)
        else:
            body = optax.linear_schedule(learning_rate, learning_rate * end, steps - warmup)
    elif name == "rsqrt":
        ramp = float(options.get("warmup_steps", 0))
        timescale = float(options.get("timescale") or max(ramp, 1.0))
        rise = lambda t: jnp.minimum(t / ramp, 1.0) if ramp else 1.0
        return lambda t: rise(t) * learning_rate / jnp.sqrt(jnp.maximum(t / timescale, 1.0))
    elif name == "step":
        every, factor = int(options.get("every", 0)), float(options.get("factor", 0.1))
        if every < 1 or factor <= 0:
            raise ValueError(
                f"schedule 'step' needs every >= 1 and factor > 0; got {every} and {factor}"
            )
        body = optax.exponential_decay(learning_rate, every, factor, staircase=True)
    else:
        body = optax.constant_schedule(learning_rate)
    if not warmup:
        return body
    return optax.join_schedules([optax.linear_schedule(0.0, learning_rate, warmup), body], [warmup])


def global_norm(tree: Any) -> jax.Array:
    """L2 norm over all leaves, as a float32 scalar."""
    return optax.global_norm(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree))


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scales gradients down to a global norm of at most `max_norm`.

    `optax.clip_by_global_norm`, but for a norm that may be given as `grad_norm=`.
    """

    def update(grads: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **extra: Any):
        del params, extra
        norm = global_norm(grads) if grad_norm is None else grad_norm
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), grads), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to: those of two or more dimensions."""
    return jax.tree.map(lambda p: np.ndim(p) > 1, params)


def make_optimizer(config: Mapping[str, Any], total_steps: int | None = None) -> Optimizer:
    """An optimiser from a mapping.

    Args:
      config: `name` (see `optimizer_names`; default adam), `learning_rate`, `schedule` (see
        `make_schedule`), `weight_decay` (never on parameters of fewer than two dimensions; left
        out, optax's own default), `clip_norm` (0 or None: no clipping), `accumulate` (batches per
        update, averaged), and any other argument of the optax function (`b1`, `eps`, ...).
      total_steps: length of the run in batches, for schedules that decay to its end.

    Raises:
      ValueError: unknown name or option (with the nearest match), or a weight decay for an
        optimiser that has none.
    """
    config = dict(config)
    name = config.get("name", "adam")
    check_choice("optimizer", name, optimizer_names())
    build = getattr(optax.contrib if name.startswith("contrib.") else optax, name.split(".")[-1])
    fields = set(inspect.signature(build).parameters) - {"learning_rate", "mask"}
    check_keys(f"option of optimizer {name!r}", config, sorted(fields | set(_OWN_KEYS)))
    if "learning_rate" not in config:
        raise ValueError("the optimizer config needs a learning_rate")

    accumulate = int(config.get("accumulate") or 1)
    updates = None if total_steps is None else max(total_steps // accumulate, 1)
    rate, schedule = float(config["learning_rate"]), config.get("schedule", "constant")
    learning_rate = make_schedule(rate, schedule, updates)
    options = {k: v for k, v in config.items() if k not in _OWN_KEYS}
    chain = [clip_by_norm(float(config["clip_norm"]))] if config.get("clip_norm") else []
    decay, decays = config.get("weight_decay"), _decay_arguments(build)
    if decays:
        options[decays[1]] = decay_mask
        if decay is not None:
            options[decays[0]] = decay
    elif name == "sgd" and decay:
        chain.append(optax.add_decayed_weights(decay, mask=decay_mask))
    elif decay:
        able = [
            "sgd",
            *(n for n in optimizer_names() if "." not in n and _decay_arguments(getattr(optax, n))),
        ]
        raise ValueError(
            f"optimizer {name!r} takes no weight_decay; these do: {', '.join(sorted(able))}"
        )
    # A plain number keeps optimisers usable that do not take schedules.
    chain.append(build(learning_rate=rate if _is_constant(schedule) else learning_rate, **options))
    tx = optax.with_extra_args_support(optax.chain(*chain))
    if accumulate > 1:
        tx = optax.MultiSteps(tx, every_k_schedule=accumulate).gradient_transformation()
    return Optimizer(tx.init, tx.update, learning_rate, accumulate)


def _decay_arguments(build: Callable) -> tuple[str, str] | None:
    """Names of the weight decay and of its mask among the arguments of an optax function."""
    fields = inspect.signature(build).parameters
    for decay in ("weight_decay", "weight_decay_rate"):
        for mask in ("mask", "weight_decay_mask"):
            if decay in fields and mask in fields:
                return decay, mask
    return None


def _is_constant(schedule: str | Mapping[str, Any]) -> bool:
    options = {"name": schedule} if isinstance(schedule, str) else schedule
    return options.get("name", "constant") in ("constant", "warmup") and not options.get(
        "warmup_steps"
    )
