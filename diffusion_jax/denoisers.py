"""From a raw network to a denoiser, and the one place where a denoiser is called.

A denoiser is any callable `(x, t) -> x0_hat`. What this module builds also has `at(x, point)`, which
takes the schedule values of a step (computed on the host in float64) instead of deriving them from t
in float32.
"""

from collections.abc import Callable
from typing import Any

from diffusion_jax.numerics import expand, pytree_dataclass, static
from diffusion_jax.processes import PREDICTIONS, BridgeProcess, preconditioning, to_x0
from diffusion_jax.registry import closest

PARAMETERIZATIONS = (*PREDICTIONS, "edm", "ddbm")


def evaluate(denoise: Callable, x: Any, point: Any, cache: Any = None) -> tuple[Any, Any]:
    """One call of a denoiser at a point of the schedule: `(x0_hat, cache)`.

    `denoise.at(x, point)` is used where it exists, `denoise(x, t)` otherwise. With a cache the
    denoiser takes it as a third argument and returns `(x0_hat, cache)`.
    """
    at = getattr(denoise, "at", None)
    first = point if at is not None else point["t"]
    call = denoise if at is None else at
    return (call(x, first), None) if cache is None else call(x, first, cache)


@pytree_dataclass
class Denoiser:
    """A network as a denoiser: `x0_hat = to_x0(network(c_in x, c_noise))`.

    Args:
      network: `(x, t) -> prediction`, `[B, ...]`; a pytree such as `jax.tree_util.Partial(f, params)`
        keeps parameters out of the compiled program.
      process: the forward process, for calls by t alone.
      parameterization: one of `PREDICTIONS` (the network sees x and t), or "edm" / "ddbm" (it sees
        c_in x and c_noise, see `processes.preconditioning`).
      sigma_data, sigma_source, covariance: data statistics of "edm" and "ddbm".
    Raises:
      ValueError: unknown parameterization, or one that the process does not have.
    """

    network: Any
    process: Any
    parameterization: str = static("x0")
    sigma_data: float = 0.5
    sigma_source: float = 0.5
    covariance: float = 0.0

    def __post_init__(self):
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(
                f"unknown parameterization {self.parameterization!r}"
                f"{closest(self.parameterization, PARAMETERIZATIONS)}"
            )
        if isinstance(self.process, BridgeProcess) and self.parameterization not in ("x0", "ddbm"):
            raise ValueError(
                f"parameterization {self.parameterization!r} is not defined for a bridge; valid: ddbm, x0"
            )
        if not isinstance(self.process, BridgeProcess) and self.parameterization == "ddbm":
            raise ValueError("parameterization 'ddbm' needs a bridge process")

    def __call__(self, x, t):
        return self.at(x, self.process.point(t))

    def preconditioning(self, point):
        """The `Preconditioning` at a point (parameterizations "edm" and "ddbm")."""
        if self.parameterization == "edm":
            return preconditioning.edm(point, self.sigma_data)
        return preconditioning.ddbm(
            point,
            self.sigma_data,
            self.sigma_source,
            self.covariance,
            self.process.clock_scale,
        )

    def at(self, x, point):
        """x0_hat `[B, ...]` at a `Point`."""
        if self.parameterization in PREDICTIONS:
            return to_x0(self.parameterization, self.network(x, point["t"]), x, point)
        c = self.preconditioning(point)
        raw = self.network(expand(c.c_in, x) * x, c.c_noise)
        return expand(c.c_skip, x) * x + expand(c.c_out, x) * raw
