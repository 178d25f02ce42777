"""What a run needs before its first step: placements, the compiled step, the initial state."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.methods.base import Method
from diffusion_jax.training.config import TrainConfig
from diffusion_jax.training.optim import make_optimizer
from diffusion_jax.training.parallel import make_layout
from diffusion_jax.training.report import describe
from diffusion_jax.training.state import TrainState, create_state
from diffusion_jax.training.step import make_train_step


class Trainer:
    """Everything `train` prepares, usable alone: placements, the compiled step, states.

    Args:
      method: the model family.
      batch: a host's first batch, dict of NumPy arrays [batch_size / hosts, ...].
      config: see `TrainConfig`.
      devices: default all.

    Attributes:
      layout: see `parallel.Layout`.
      key: the base key, a global array.
      abstract: the state as `ShapeDtypeStruct`s with shardings.
      names: of the entries of the metrics vector.
      report: what `describe` says.
      compiled: the compiled step, as JAX gives it.
    """

    def __init__(
        self,
        method: Method,
        batch: Mapping[str, Any],
        config: TrainConfig,
        devices: Sequence[jax.Device] | None = None,
    ):
        layout = make_layout(config.parallel, devices)
        layout.check_batch(batch, config.batch_size)
        self.layout = layout.for_microbatches(config.batch_size, config.microbatches)
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.key = self.layout.put_key(config.seed)
        self._create = lambda key, batch, params=None: create_state(
            method, optimizer, config.ema, key, batch, params
        )
        global_batch = self.layout.put_batch(batch)
        shapes = jax.eval_shape(self._create, self.key, global_batch)
        self._shardings = self.layout.state_sharding(shapes)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, self._shardings
        )
        train_step = make_train_step(
            method,
            optimizer,
            batch_size=config.batch_size,
            decays=config.ema,
            ema_warmup=config.ema_warmup,
            microbatches=config.microbatches,
            axis_name=self.layout.axis_name,
        )
        names: list[str] = []

        # One vector, so that reading the metrics of a step back is one transfer.
        def packed(state: TrainState, batch: Any, key: jax.Array):
            state, metrics = train_step(state, batch, key)
            names[:] = metrics
            return state, jnp.stack(list(metrics.values()))

        begin = time.perf_counter()
        step_batch = self.layout.put_step_batch(batch)
        abstract = self.layout.device_abstract(self.abstract)
        self.compiled, jaxpr = self.layout.compile(packed, abstract, step_batch, self.key)
        self.names = tuple(names)
        seconds = time.perf_counter() - begin
        self.report = describe(self.compiled, jaxpr, self.abstract, self.layout, seconds)

    def create(self, batch: Mapping[str, Any], params: Any = None) -> TrainState:
        """The initial state, of global arrays.

        Args:
          batch: batch 0.
          params: parameters to start from, global arrays like `abstract.params`; None: fresh ones.
        """
        build = jax.jit(self._create, out_shardings=self._shardings)
        return build(self.key, self.layout.put_batch(batch), params)

    def step(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, jax.Array]:
        """One step.

        Args:
          state: as `layout.to_device` gives it; donated.
          batch: a host's batch.

        Returns:
          `(state, metrics)`: metrics float32 [len(names)], still on the device.

        Raises:
          ValueError: a batch of other shapes or dtypes than the first.
        """
        try:
            return self.compiled(state, self.layout.put_step_batch(batch), self.key)
        except TypeError as error:
            raise ValueError(f"a batch differs from the first one: {error}") from error
