"""What a run will cost, before it starts: parameters, FLOPs and memory of the compiled step."""

import math
from typing import Any

import jax

from diffusion_jax.training.parallel import Layout
from diffusion_jax.training.state import TrainState


def count(tree: Any) -> int:
    """Number of elements in a pytree of arrays or `ShapeDtypeStruct`s."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


def count_flops(jaxpr: Any) -> int:
    """Floating-point operations of the matrix products and convolutions in a jaxpr.

    Counted here because XLA's own analysis takes the body of a `lax.scan` once, and blocks of a
    network are often scanned over; it also differs between backends. A `lax.while_loop` counts as
    one pass, a `lax.cond` as its most expensive branch; what is computed again in the backward pass
    (rematerialisation) counts again. Elementwise operations and custom kernels do not count.

    Args:
      jaxpr: a `Jaxpr` or `ClosedJaxpr`.
    """
    return sum(_flops_of(eqn) for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _flops_of(eqn: Any) -> int:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel, features = eqn.invars[1].aval.shape, params["dimension_numbers"].rhs_spec[0]
        products = math.prod(eqn.outvars[0].aval.shape) * math.prod(kernel) // kernel[features]
        return 2 * products // math.prod(params["lhs_dilation"])  # the zeros between are skipped
    inner = [
        count_flops(sub)
        for value in params.values()
        for sub in (value if isinstance(value, list | tuple) else [value])
        if hasattr(getattr(sub, "jaxpr", sub), "eqns")
    ]
    if name == "cond":
        return max(inner)
    times = params["length"] if name == "scan" else 1
    times = params["mesh"].size if name == "shard_map" else times  # the inside is of one device
    return times * sum(inner)


def describe(
    compiled: Any, jaxpr: Any, state: TrainState, layout: Layout, seconds: float
) -> dict[str, Any]:
    """A start report.

    Args:
      compiled: the compiled step.
      jaxpr: of the step on the global batch.
      state: as `ShapeDtypeStruct`s with shardings.
      layout: see `parallel.Layout`.
      seconds: how long compiling took.

    Returns:
      JSON data: `parameters`; `state_bytes`; `flops_per_step` over all devices (`count_flops`);
      `bytes_per_device` at the peak of a step, by XLA's plan of its buffers, and of these
      `temporary_bytes` (both None where the backend does not say); `devices`, `mesh`, `mode`,
      `processes`, `compile_seconds`.
    """
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
        "flops_per_step": count_flops(jaxpr),
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
