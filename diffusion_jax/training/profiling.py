"""What a run can be told about its programs: a trace of a few steps, a cache of compiled programs."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from diffusion_jax.training.config import profile_options

FOLDER = "profile"


class Profile:
    """Traces some steps with `jax.profiler` into `profile` in the run folder.

    There are a trace that TensorBoard's profile plugin shows (`plugins/profile`) and one for
    ui.perfetto.dev (`perfetto_trace.json.gz`). Processes beside the first write into
    `profile/process_<i>`.

    Args:
      options: `first`, the steps after the start (or the resumption) that are not traced, since
        they compile and warm up; `steps`, how many are traced, 0 for none; `processes`, "first" or
        "all".
      workdir: the run folder.
      start: the first step of this start.
    """

    def __init__(self, options: Mapping[str, Any], workdir: pathlib.Path, start: int):
        options = profile_options(options)
        process = jax.process_index()
        self._begin = start + options["first"]
        self._end = self._begin + options["steps"]
        self._tracing = False
        if process and options["processes"] == "first":
            self._end = self._begin
        self.folder = workdir / FOLDER
        if process:
            self.folder = self.folder / f"process_{process}"

    def step(self, step: int) -> jax.profiler.StepTraceAnnotation:
        """The context that a step runs in."""
        if step == self._begin < self._end:
            self.folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._tracing = True
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def after(self, step: int, result: jax.Array) -> None:
        """Ends the trace after its last step, when its result is there."""
        if self._tracing and step + 1 == self._end:
            result.block_until_ready()
            self.close()

    def close(self) -> None:
        """Ends a running trace."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs in a folder, for the next start; empty: as JAX is set up.

    What takes less than JAX's `jax_persistent_cache_min_compile_time_secs` (1 s) to compile is not
    kept.
    """
    if not folder:
        return
    path = str(pathlib.Path(folder).expanduser())
    if jax.config.jax_compilation_cache_dir != path:
        jax.config.update("jax_compilation_cache_dir", path)
        compilation_cache.reset_cache()  # JAX looks up once whether there is one
