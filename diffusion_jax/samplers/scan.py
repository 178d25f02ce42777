"""`sample`: the only loop in the library that walks time, one `lax.scan`.

A `Sampler` is data: per-step inputs with a leading step axis, and the pure functions that read them.
One step is one network call. As a pytree its leaves are numbers, so samplers that differ in floats
only (schedule, grid, eta, solver coefficients of one structure) share one compiled program.
"""

import dataclasses
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import evaluate, evaluate_moments, evaluate_rows
from diffusion_jax.numerics import (
    batch_size,
    example_keys,
    fold_all,
    join_traced,
    renewed,
    split_traced,
)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Sampler:
    """A solver, ready to run.

    Attributes:
      init: `(rng, start, x) -> state`; a state is a pytree with an attribute `x`.
      step: `(call, rng, state, inputs) -> (state, x0_hat)`, calling `call(x, point)` exactly once, or
        `call.when(...)` where the step may do without (see `Call`); x0_hat may then be None.
      finish: `(state) -> x`.
      xs: per-step inputs, leading axis = step; `xs["point"]` is the `Point` of the call and
        `xs["next"]` that of the state after the step.
      start: inputs of `init`.
      nfe: network calls, the length of the scan plus what `init` and `finish` make.
      prepare: `(x_init) -> x`: checks and completes what the user hands in.
      stochastic: whether a step draws random numbers; if not, the program holds none.
      order: order of convergence, or None where none is claimed (not part of the pytree).
      name: for reports (not part of the pytree).
    """

    init: Callable
    step: Callable
    finish: Callable
    xs: Any
    start: Any
    nfe: int
    prepare: Callable
    stochastic: bool
    order: int | None = None
    name: str = ""

    def tree_flatten(self):
        static = (self.init, self.step, self.finish, self.nfe, self.prepare, self.stochastic)
        return (self.xs, self.start), static

    @classmethod
    def tree_unflatten(cls, static, children):
        init, step, finish, nfe, prepare, stochastic = static
        return cls(init, step, finish, *children, nfe, prepare, stochastic)

    @property
    def times(self) -> Any:
        """The times of the network calls, `[nfe]`."""
        return self.xs["point"]["t"]


class StepInfo(NamedTuple):
    """What a hook sees beside the state.

    Attributes:
      step: int32, index of the step just made.
      point: the `Point` of the state handed to the hook.
      x0_hat: the prediction made in this step, or None where the sampler hands on none.
      keys: keys `[B]` for the hook's own draws, or None for a deterministic call without a key.
    """

    step: Any
    point: Any
    x0_hat: Any
    keys: Any


_HOOK_STREAM = 0x5EED  # separates a hook's draws from the sampler's


class Call:
    """The network call of one step, handed to `Sampler.step`; the cache goes along.

    Attributes:
      cache: that of a stateful denoiser, after the call.
    """

    def __init__(self, denoise, cache):
        self._denoise = denoise
        self.cache = cache

    def __call__(self, x, point, rows=False):
        """The denoiser's output at `x`; with `rows` perhaps as `denoisers.LogitRows`."""
        run = evaluate_rows if rows else evaluate
        output, self.cache = run(self._denoise, x, point, self.cache)
        return output

    def moments(self, x, point):
        """`(x0_hat, v)` of a denoiser with a learned variance, see `denoisers.evaluate_moments`."""
        if self.cache is not None:
            raise ValueError("a learned variance and a cache exclude one another")
        return evaluate_moments(self._denoise, x, point)

    def when(self, needed, x, point, use, otherwise, rows=False):
        """`use(output)` where `needed` holds; where not, `otherwise`, and the network is not called.

        Args:
          needed: bool scalar, may be traced.
          use: `(output) -> pytree`.
          otherwise: a pytree of the same structure.
          rows: the output may be `denoisers.LogitRows`.
        """
        run = evaluate_rows if rows else evaluate

        def called():
            output, cache = run(self._denoise, x, point, self.cache)
            return use(output), cache

        result, self.cache = jax.lax.cond(needed, called, lambda: (otherwise, self.cache))
        return result


def _walk(denoise, sampler, key, x, index, cache, hook, trajectory, remat):
    keys = None if key is None else example_keys(key, index)

    def body(carry, scanned):
        state, cache = carry
        i, inputs = scanned
        call = Call(denoise, cache)
        state, x0_hat = sampler.step(call, lambda: fold_all(keys, i + 1), state, inputs)
        if hook is not None:
            own = None if keys is None else fold_all(fold_all(keys, _HOOK_STREAM), i)
            state = hook(state, StepInfo(i, inputs["next"], x0_hat, own))
        return (state, call.cache), state.x if trajectory else None

    if remat:
        body = jax.checkpoint(body, policy=None if remat is True else remat)
    state = sampler.init(lambda: fold_all(keys, 0), sampler.start, x)
    steps = jax.tree.leaves(sampler.xs)[0].shape[0]
    (last, _), path = jax.lax.scan(
        body, (state, cache), (jnp.arange(steps, dtype=jnp.int32), sampler.xs)
    )
    if not trajectory:
        return sampler.finish(last)
    path = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), state.x, path)
    return sampler.finish(last), path


_walk_static = jax.jit(
    lambda arrays, static, *rest: _walk(join_traced(arrays, static), *rest),
    static_argnums=(1, 7, 8, 9),
)
# A compiled program holds what its denoiser closes over. Keyed weakly by the function, it goes when
# the function goes: a loop that samples with a fresh closure each time does not pile up programs.
_walk_of: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _walk_function(denoise, *rest):
    if denoise not in _walk_of:
        reference = weakref.ref(denoise)
        _walk_of[denoise] = jax.jit(
            lambda *args: _walk(reference(), *args), static_argnums=(5, 6, 7)
        )
    return _walk_of[denoise](*rest)


def check_key(key):
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    legacy = getattr(key, "dtype", None) == np.uint32
    if not typed and not legacy:
        raise ValueError(
            f"key must be made by jax.random.key(seed); got {type(key).__name__} {key!r}"
        )
    if key.ndim != (0 if typed else 1):
        raise ValueError(
            f"key must be a single key; got keys of shape {key.shape} (examples differ by index)"
        )


def sample(
    sampler: Sampler,
    denoise: Callable,
    key: Any,
    x_init: Any,
    *,
    index: Any = None,
    trajectory: bool = False,
    hook: Callable | None = None,
    cache: Any = None,
    remat: Any = False,
) -> Any:
    """Runs a sampler.

    Args:
      sampler: from one of the constructors of `diffusion_jax.samplers`.
      denoise: any callable `(x, t) -> x0_hat` (tokens: `-> logits [B, L, V]`), see `typing.Denoise`.
        A pytree (an Equinox module, `jax.tree_util.Partial(f, params)`, `Denoiser`) is traced by its
        arrays; a plain function is compiled once for as long as it lives.
      key: a `jax.random.key`; None for a deterministic sampler.
      x_init: where to start, leading axis = examples: noise (`process.prior(...)`) or an x at the
        sampler's first time; the source of a bridge; tokens `[B, L]` with masks, or the number of
        sequences.
      index: int `[B]`, the examples' numbers (default 0..B-1). Example i depends on `key` and
        `index[i]` alone: the same image whatever the batch size or mesh.
      trajectory: also return the states, `[steps + 1, B, ...]`, the start first. Costs steps times
        the memory.
      hook: `(state, StepInfo) -> state` after each step (overwrite known regions, project, resample);
        `state.x` is the iterate: `state._replace(x=...)`.
      cache: initial cache of a stateful denoiser, carried through the scan.
      remat: True or a `jax.checkpoint` policy: recompute the steps in the backward pass.
    Returns:
      x `[B, ...]`, or `(x, trajectory)`.
    Raises:
      ValueError: `x_init` of the wrong kind for this sampler, a missing key or one that is
        none, index of another length.
    """
    if not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be a diffusion_jax.samplers.Sampler, got {type(sampler)}")
    if not callable(denoise):
        raise TypeError(f"denoise must be callable, got {type(denoise)}")
    if sampler.stochastic and key is None:
        raise ValueError(f"sampler {sampler.name!r} draws random numbers: it needs a key, got None")
    if key is not None:
        check_key(key)
    x = sampler.prepare(x_init)
    size = batch_size(x)
    index = jnp.arange(size, dtype=jnp.int32) if index is None else jnp.asarray(index, jnp.int32)
    if index.shape != (size,):
        raise ValueError(f"index has shape {index.shape}; x_init holds {size} examples")
    # coefficients are float64 on the host; see `renewed` for why they are copied here
    sampler = jax.tree.map(lambda v: renewed(v) if isinstance(v, np.ndarray) else v, sampler)
    rest = (sampler, key, x, index, cache, hook, bool(trajectory), remat)
    if isinstance(denoise, types.FunctionType):
        return _walk_function(denoise, *rest)
    arrays, static = split_traced(denoise)
    return _walk_static(arrays, static, *rest)
