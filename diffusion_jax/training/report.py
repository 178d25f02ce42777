"""What a run will cost, before it starts: parameters, FLOPs and memory of the compiled step."""

import math
from typing import Any

import jax

from diffusion_jax.training.parallel import Layout
from diffusion_jax.training.state import TrainState


def count(tree: Any) -> int:
    """Number of elements in a pytree of arrays or `ShapeDtypeStruct`s."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def describe(compiled: Any, state: TrainState, layout: Layout, seconds: float) -> dict[str, Any]:
    """A start report.

    Args:
      compiled: the compiled step.
      state: as `ShapeDtypeStruct`s with shardings.
      layout: see `parallel.Layout`.
      seconds: how long compiling took.

    Returns:
      JSON data: `parameters`; `state_bytes`; `flops_per_step` over all devices as XLA counts them
      (the body of a `lax.scan` counts once; None where the backend does not say);
      `bytes_per_device` at the peak of a step; and, of these, `temporary_bytes`; `devices`, `mesh`,
      `mode`, `processes`, `compile_seconds`.
    """
    costs = compiled.cost_analysis() or {}
    flops = costs.get("flops", -1.0)
    memory = compiled.memory_analysis()
    peak = temporary = None
    if memory is not None:
        temporary = memory.temp_size_in_bytes
        peak = memory.argument_size_in_bytes + memory.output_size_in_bytes
        peak += temporary - memory.alias_size_in_bytes
    device = layout.mesh.devices.flat[0]
    return {
        "parameters": count(state.params),
        "state_bytes": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state)),
        "flops_per_step": flops * layout.mesh.size if flops > 0 else None,
        "bytes_per_device": peak,
        "temporary_bytes": temporary,
        "devices": f"{layout.mesh.size} x {device.device_kind}",
        "mesh": dict(layout.mesh.shape),
        "mode": layout.mode,
        "processes": jax.process_count(),
        "compile_seconds": round(seconds, 3),
    }


def summary(report: dict[str, Any]) -> str:
    """A start report as one line."""
    mesh = " ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    flops, peak = report["flops_per_step"], report["bytes_per_device"]
    return (
        f"{_scaled(report['parameters'])} parameters, state {_scaled(report['state_bytes'])}B,"
        f" {_scaled(flops)}FLOP a step, {_scaled(peak)}B a device,"
        f" {report['devices']} ({report['mode']}, {mesh}), compiled in"
        f" {report['compile_seconds']:.1f} s"
    )


def _scaled(value: float | None) -> str:
    if value is None:
        return "? "
    power = min(int(math.log10(max(value, 1)) // 3), 5)
    return f"{value / 1000**power:.3g} {' kMGTP'[power].strip()}"
