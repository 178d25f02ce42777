"""Where arrays live and how the one training step is run: `jit` over a mesh, or `pmap`.

Mesh axes: the batch is split over `data` and `fsdp`; parameters, averages and optimiser state are
split over `fsdp` (each on its largest divisible axis) and, by `sharding_rules`, over `model`. This is the only
module that builds meshes or starts `jax.distributed`.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion_jax.registry import check_choice
from diffusion_jax.training.config import check_keys
from diffusion_jax.training.gathering import tracing
from diffusion_jax.training.processes import HEARTBEAT, find_watch, joining
from diffusion_jax.training.sharding_rules import AXES, Rules, automatic, param_spec, parse_rules
from diffusion_jax.training.state import TrainState

_LOG = logging.getLogger(__name__)
MODES = ("jit", "pmap")
_BATCH = P(("data", "fsdp"))
_KEYS = (*AXES, "mode", "rules", "min_size", "distributed")


def leaf_names(tree: Any) -> list[str]:
    """Slash-separated names of the leaves of a pytree, in flattening order."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def initialize_distributed(distributed: bool | str | Mapping[str, Any] = False) -> int:
    """Starts `jax.distributed`; call it before anything else touches the devices.

    Args:
      distributed: False: nothing; True: arguments found by JAX (Slurm, TPU pods, ...); "auto": the
        same, and a single process where JAX finds no cluster; a mapping: the arguments of
        `jax.distributed.initialize` (`coordinator_address`, `num_processes`, `process_id`; what is
        left out is found by JAX). Its `heartbeat_timeout_seconds` (default 60) is the time after
        which a process that gives no sign of life counts as lost (see `processes`).

    Returns:
      The number of processes.

    Raises:
      ValueError: True on a machine that is no part of a cluster, or an unknown argument.
    """
    if distributed and not jax.distributed.is_initialized():
        if not (isinstance(distributed, Mapping) or distributed == "auto" or distributed is True):
            raise ValueError(
                f"distributed is False, True, 'auto' or a mapping; got {distributed!r}"
            )
        options = dict(distributed) if isinstance(distributed, Mapping) else {}
        takes = inspect.signature(jax.distributed.initialize).parameters
        check_keys("option of parallel.distributed", options, takes)
        heartbeat = options.pop("heartbeat_timeout_seconds", HEARTBEAT)
        patience = options.get("initialization_timeout", takes["initialization_timeout"].default)
        try:  # JAX aborts a process with a dump of its stack: the watch should come first
            with joining(options.get("coordinator_address"), patience):
                late = int(heartbeat + max(heartbeat, 30))
                jax.distributed.initialize(**options, heartbeat_timeout_seconds=late)
        except ValueError:
            if distributed != "auto":
                raise
        find_watch(heartbeat)
    return jax.process_count()


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, the mode of running on it, and the placement of every array.

    Attributes:
      mesh: with the axes `data`, `fsdp`, `model`.
      mode: "jit" or "pmap".
      per_device: in mode "jit", whether a step is written for one device, with `axis_name="data"`, as
        in mode "pmap". On a mesh of the axis `data` alone this sums the gradients of microbatches on
        each device, and over the devices once. Dropout then draws for each device apart.
      rules: ordered; each a `Rule`, or (regular expression on the parameter's name, partition spec or
        None for the automatic rule). The first whose expression is found in the name decides.
      min_size: arrays, and vectors of a stack of them, of fewer elements are not split over `fsdp`.
    """

    mesh: Mesh
    mode: str = "jit"
    per_device: bool = False
    rules: Rules = ()
    min_size: int = 2**14

    def for_microbatches(self, batch_size: int, microbatches: int) -> "Layout":
        """This layout, `per_device` where that saves traffic and the sizes allow it."""
        only_data = self.mode == "jit" and self.mesh.shape["data"] == self.mesh.size > 1
        fits = batch_size % (self.mesh.size * microbatches) == 0
        return dataclasses.replace(self, per_device=only_data and microbatches > 1 and fits)

    @property
    def axis_name(self) -> str | None:
        """The axis that a step takes means over, None where it is written for the global batch."""
        return "data" if self.mode == "pmap" or self.per_device else None

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, P())

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch: its leading axis over `data` and `fsdp`."""
        return NamedSharding(self.mesh, _BATCH)

    @property
    def batch_shards(self) -> int:
        """Number of parts the batch is split in."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    @functools.cached_property
    def host(self) -> tuple[int, int]:
        """`(index, count)`: which of `count` equal parts of the global batch this process loads.

        Processes that hold the same part (a `model` axis across hosts) get the same index.
        """
        rows = self.batch_sharding.addressable_devices_indices_map((self.batch_shards,)).values()
        starts = sorted({(row[0].start or 0) for row in rows})
        count, rest = divmod(self.batch_shards, len(starts))
        index, offset = divmod(starts[0], len(starts))
        if rest or offset or starts[-1] - starts[0] != len(starts) - 1:
            raise ValueError(
                f"mesh {dict(self.mesh.shape)} gives process {jax.process_index()} the batch parts"
                f" {starts} of {self.batch_shards}; make data * fsdp a multiple of the processes"
            )
        return index, count

    @property
    def max_in_flight(self) -> int:
        """Steps that may be queued behind the running one.

        Bounds the batches waiting in device memory. Several CPU devices share one thread pool, in
        which two programs with collectives can wait for each other for ever: none may be queued.
        """
        return 0 if self.mesh.devices.flat[0].platform == "cpu" and self.mesh.size > 1 else 2

    def check_batch(self, batch: Mapping[str, Any], batch_size: int) -> None:
        """Raises ValueError unless a host's batch is its part of a global batch of `batch_size`."""
        if batch_size % self.batch_shards:
            raise ValueError(
                f"batch_size {batch_size} is not a multiple of data * fsdp = {self.batch_shards}"
                f" of the mesh {dict(self.mesh.shape)}"
            )
        index, count = self.host
        for name, value in batch.items():
            shape = np.shape(value)
            if not shape or shape[0] * count != batch_size:
                raise ValueError(
                    f"batch[{name!r}] has shape {shape}; host {index} of {count} must load"
                    f" {batch_size // count} rows of the global batch of {batch_size}"
                )

    def put_batch(self, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        """A host's batch of NumPy arrays as global arrays [batch_size, ...]."""
        return _put(batch, self.batch_sharding)

    def put_key(self, seed: int) -> jax.Array:
        """The base key of a seed, as a global array."""
        return jax.jit(lambda: jax.random.key(seed), out_shardings=self.replicated)()

    def state_sharding(self, state: TrainState) -> TrainState:
        """A sharding for every leaf of a state (arrays or `ShapeDtypeStruct`s).

        Averages and optimiser moments follow the parameter whose name theirs ends with.

        Raises:
          ValueError: a rule's spec does not fit a parameter.
        """
        specs = self._param_specs(state.params)
        self._check_model_axis(specs)

        def place(name: str, leaf: Any) -> NamedSharding:
            parts = name.split("/")
            for start in range(1, len(parts)):
                shape, spec = specs.get("/".join(parts[start:]), (None, None))
                if shape == leaf.shape:
                    return NamedSharding(self.mesh, spec)
            return NamedSharding(self.mesh, self._automatic(leaf.shape))

        leaves, tree = jax.tree.flatten(state)
        placed = [place(n, leaf) for n, leaf in zip(leaf_names(state), leaves, strict=True)]
        return jax.tree.unflatten(tree, placed)

    def _automatic(self, shape: Sequence[int]) -> P:
        return automatic(shape, self.mesh.shape["fsdp"], self.min_size)

    def _param_specs(self, params: Any) -> dict[str, tuple[tuple[int, ...], P]]:
        """Name of a parameter -> its shape and how it is split."""
        leaves = jax.tree.leaves(params)
        return {
            n: (leaf.shape, self._param_spec(n, leaf.shape))
            for n, leaf in zip(leaf_names(params), leaves, strict=True)
        }

    def _param_spec(self, name: str, shape: Sequence[int]) -> P:
        return param_spec(self.rules, name, shape, self.mesh.shape, self.min_size)

    def _check_model_axis(self, specs: Mapping[str, tuple[Sequence[int], P]]) -> None:
        ways = self.mesh.shape["model"]
        if ways > 1 and not any("model" in str(spec) for _, spec in specs.values()):
            _LOG.warning(
                "parallel.model = %d splits no parameter of this network: %d devices do the work of"
                " one; use fsdp, or rules for its names",
                ways,
                ways,
            )

    def tracing(self, params: Any) -> contextlib.AbstractContextManager:
        """While it lasts, a loss is traced for this mesh, see `placement`.

        Args:
          params: all parameters of the method, anything with shapes.
        """
        if self.mode == "pmap" or self.mesh.size == 1 or self.per_device:
            return contextlib.nullcontext()
        known = self._param_specs(params)

        def specs_of(part: Any) -> Any:
            leaves, tree = jax.tree.flatten(part)
            return tree.unflatten(
                self._known_spec(known, name, leaf.shape)
                for name, leaf in zip(leaf_names(part), leaves, strict=True)
            )

        return tracing(self.mesh, specs_of)

    def _known_spec(self, known: Mapping[str, Any], name: str, shape: Sequence[int]) -> P:
        """Of a parameter by its name within a network: all parameters may hold several networks."""
        for full, (size, spec) in known.items():
            if size == shape and (full == name or full.endswith(f"/{name}")):
                return spec
        return self._param_spec(name, shape)

    # pmap keeps one copy a device along a leading axis; checkpoints, samples and everything else see
    # the same global arrays in both modes.

    def to_device(self, state: TrainState) -> TrainState:
        """A state of global arrays in the form that the compiled step takes."""
        if self.mode == "jit":
            return state

        def stack(x: jax.Array) -> jax.Array:
            shards = [s.data[None] for s in x.addressable_shards]
            shape = (self.mesh.size, *x.shape)
            return jax.make_array_from_single_device_arrays(shape, self._stacked, shards)

        return jax.tree.map(stack, state)

    def device_abstract(self, state: TrainState) -> TrainState:
        """`to_device` for `ShapeDtypeStruct`s."""
        if self.mode == "jit":
            return state
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (self.mesh.size, *x.shape), x.dtype, sharding=self._stacked
            ),
            state,
        )

    def to_global(self, state: TrainState) -> TrainState:
        """Inverse of `to_device`."""
        if self.mode == "jit":
            return state

        def first(x: jax.Array) -> jax.Array:
            shards = [s.data.reshape(x.shape[1:]) for s in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape[1:], self.replicated, shards)

        return jax.tree.map(first, state)

    @property
    def _stacked(self) -> NamedSharding:
        return NamedSharding(Mesh(self.mesh.devices.reshape(-1), ("data",)), P("data"))

    def put_step_batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A host's batch in the form that the compiled step takes."""
        if self.mode == "pmap":
            ways = self.mesh.size // self.host[1]
            split = {k: np.reshape(v, (ways, -1, *np.shape(v)[1:])) for k, v in batch.items()}
            return _put(split, self._stacked)
        # One device takes NumPy arrays as they are, in a fraction of the time of `device_put`.
        return dict(batch) if self.mesh.size == 1 else self.put_batch(batch)

    def compile(self, step: Callable, state: TrainState, batch: Any, key: jax.Array):
        """Compiles `step(state, batch, key) -> (state, metrics)`, which donates the state.

        Args:
          step: as `make_train_step` gives it with the `axis_name` of this layout.
          state: what `to_device` gives, or the same as `ShapeDtypeStruct`s with shardings.
          batch: what `put_step_batch` gives, likewise.
          key: the base key, a global array.

        Returns:
          `(compiled, jaxpr)`; the jaxpr is that of the step on the global batch.
        """
        if self.mode == "pmap":
            whole = jax.vmap(step, in_axes=(0, 0, None), axis_name="data")
            shapes = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
            jaxpr = jax.make_jaxpr(whole)(*jax.tree.map(shapes, (state, batch, key)))
            if jax.process_count() > 1:  # there pmap lowers for nothing but arrays and its own keys
                placed = jax.tree.map(lambda x: x.sharding, state)
                zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
                state, key = jax.jit(zeros, out_shardings=placed)(), jax.random.key(0)
            mapped = jax.pmap(
                step,
                axis_name="data",
                in_axes=(0, 0, None),
                out_axes=(0, None),
                donate_argnums=0,
                devices=list(self.mesh.devices.flat),
            )
            return mapped.lower(state, batch, key).compile(), jaxpr
        placed = jax.tree.map(lambda x: x.sharding, state)
        if self.per_device:
            step = jax.shard_map(
                step,
                mesh=self.mesh,
                in_specs=(P(), _BATCH, P()),
                out_specs=(P(), P()),
                check_vma=False,
            )
        jitted = jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(placed, self.batch_sharding, self.replicated),
            out_shardings=(placed, self.replicated),
        )
        with self.tracing(state.params):
            traced = jitted.trace(state, batch, key)
        return traced.lower().compile(), traced.jaxpr


def _put(batch: Mapping[str, Any], sharding: NamedSharding) -> dict[str, jax.Array]:
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), sharding)
    return {
        k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()
    }


def put_local(tree: Any, split: bool = False) -> Any:
    """Arrays on all devices of this process: whole on each, or split along the leading axis."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return jax.device_put(tree, devices[0])
    types = (AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=types, devices=devices)
    return jax.device_put(tree, NamedSharding(mesh, P("data") if split else P()))


def make_layout(
    config: Mapping[str, Any] | None = None, devices: Sequence[jax.Device] | None = None
) -> Layout:
    """A layout from a mapping.

    Args:
      config: `mode` ("jit" or "pmap"); mesh sizes `data` (default -1: what is left of the devices),
        `fsdp` and `model` (default 1); `rules`: what is split over `model`, "auto" (the default: by
        the names of the parameters), "transformer" or "unet" (see `sharding_rules`), or a list of
        such names and of (regular expression on the parameter's name, spec), a spec being a list with
        one entry an axis (None, the name of a mesh axis or a list of names), "replicated" or "fsdp";
        `min_size`: arrays of fewer elements are not split over `fsdp`; `distributed` belongs to
        `initialize_distributed`.
      devices: default all.

    Raises:
      ValueError: unknown key, mode or axis, or sizes that do not fit the devices.
    """
    config = dict(config or {})
    check_keys("parallel option", config, _KEYS)
    mode = config.get("mode", "jit")
    check_choice("parallel mode", mode, MODES)
    devices = list(jax.devices() if devices is None else devices)
    sizes = {name: int(config.get(name, -1 if name == "data" else 1)) for name in AXES}
    if mode == "pmap" and (sizes["fsdp"], sizes["model"]) != (1, 1):
        raise ValueError(
            "parallel mode 'pmap' has only the data axis; use mode 'jit' for fsdp, model"
        )
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed < 1 or len(devices) % fixed:
        raise ValueError(f"mesh {sizes} does not fit {len(devices)} devices")
    for name in free:
        sizes[name] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise ValueError(f"mesh {sizes} does not fill {len(devices)} devices; use data=-1")
    shape = tuple(sizes.values())
    types = (AxisType.Auto,) * len(AXES)
    if mode == "pmap":  # its devices stay in the order in which the processes hold them
        mesh = Mesh(np.array(devices).reshape(shape), AXES, axis_types=types)
    else:
        mesh = jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
    rules, min_size = parse_rules(config.get("rules")), int(config.get("min_size", 2**14))
    return Layout(mesh, mode, rules=rules, min_size=min_size)
