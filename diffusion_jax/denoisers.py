"""From a raw network to a denoiser, and the one place where a denoiser is called.

A denoiser is any callable `(x, t) -> x0_hat`. What this module builds also has `at(x, point)`, which
takes the schedule values of a step (computed on the host in float64) instead of deriving them from t
in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion_jax.numerics import expand, pytree_dataclass, static
from diffusion_jax.processes import (
    PREDICTIONS,
    BridgeProcess,
    SDEBridge,
    preconditioning,
    to_x0,
)
from diffusion_jax.registry import closest

BRIDGE_PARAMETERIZATIONS = ("x0", "ddbm", "i2sb", "eps")
PARAMETERIZATIONS = tuple(dict.fromkeys((*PREDICTIONS, "edm", *BRIDGE_PARAMETERIZATIONS)))


def evaluate(denoise: Callable, x: Any, point: Any, cache: Any = None) -> tuple[Any, Any]:
    """One call of a denoiser at a point of the schedule: `(x0_hat, cache)`.

    `denoise.at(x, point)` is used where it exists, `denoise(x, t)` otherwise. With a cache the
    denoiser takes it as a third argument and returns `(x0_hat, cache)`.
    """
    at = getattr(denoise, "at", None)
    first = point if at is not None else point["t"]
    call = denoise if at is None else at
    return (call(x, first), None) if cache is None else call(x, first, cache)


def evaluate_moments(denoise: Callable, x: Any, point: Any) -> tuple[Any, Any]:
    """`(x0_hat, v)` of a denoiser that has learned the variance of its reverse steps, both like x.

    Raises:
      ValueError: one that has not.
    """
    made = getattr(denoise, "moments", None)
    x0_hat, v = made(x, point) if made is not None else (None, None)
    if v is None:
        raise ValueError("the model has no learned variance (method.learned_variance)")
    return x0_hat, v


class LogitRows:
    """Logits `[B, L, V]` that are made where they are asked for: most samplers read a few rows of them.

    Args:
      hidden: `[B, L, C]`, what the last layer reads.
      head: `[B, n, C] -> logits [B, n, V]`, position by position.
    """

    def __init__(self, hidden: jax.Array, head: Callable):
        self._hidden, self._head = hidden, head
        shape = jax.eval_shape(head, hidden)
        self.shape, self.dtype = shape.shape, shape.dtype

    def rows(self, position):
        """Logits `[B, n, V]` at positions int `[B, n]`; one outside the sequence is taken to its end."""
        position = position[..., None]
        return self._head(jnp.take_along_axis(self._hidden, position, axis=1, mode="clip"))

    def all(self):
        """Logits `[B, L, V]`."""
        return self._head(self._hidden)


def evaluate_rows(denoise: Callable, x: Any, point: Any, cache: Any = None) -> tuple[Any, Any]:
    """`evaluate`, but `LogitRows` from a denoiser that has `logit_rows(x, t)` and no cache."""
    made = getattr(denoise, "logit_rows", None)
    if made is None or cache is not None:
        return evaluate(denoise, x, point, cache)
    return made(x, point["t"]), None


@pytree_dataclass
class Denoiser:
    """A network as a denoiser: `x0_hat = to_x0(network(c_in x, c_noise))`.

    Bridges: "x0"; "ddbm"; "i2sb", the noise of the base diffusion (x - alpha x0) / (alpha rho), which is
    I2SB's residual (arXiv 2302.05872, eq. 12) and Bridge-TTS's noise prediction (arXiv 2312.03491);
    "eps", the bridge's own noise (x - a x1 - b x0) / c, undefined at the source itself, where b = 0.

    Args:
      network: `(x, t) -> prediction`, `[B, ...]`; a pytree such as `jax.tree_util.Partial(f, params)`
        keeps parameters out of the compiled program.
      process: the forward process, for calls by t alone.
      parameterization: one of `PREDICTIONS` (the network sees x and t), or "edm" / "ddbm" (it sees
        c_in x and c_noise, see `processes.preconditioning`).
      sigma_data, sigma_source, covariance: data statistics of "edm" and "ddbm".
      source: x1 `[B, ...]`, for "eps" of a bridge.
      learned_variance: the network has as many channels again for the v of `processes.reverse_step`.
    Raises:
      ValueError: unknown parameterization, one that the process does not have, or "eps" of a bridge
        without its source.
    """

    network: Any
    process: Any
    parameterization: str = static("x0")
    sigma_data: float = 0.5
    sigma_source: float = 0.5
    covariance: float = 0.0
    source: Any = None
    learned_variance: bool = static(False)

    def __post_init__(self):
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(
                f"unknown parameterization {self.parameterization!r}"
                f"{closest(self.parameterization, PARAMETERIZATIONS)}"
            )
        is_bridge = isinstance(self.process, BridgeProcess)
        if is_bridge and self.parameterization not in BRIDGE_PARAMETERIZATIONS:
            raise ValueError(
                f"parameterization {self.parameterization!r} is not defined for a bridge; valid: "
                f"{', '.join(sorted(BRIDGE_PARAMETERIZATIONS))}"
            )
        if not is_bridge and self.parameterization in ("ddbm", "i2sb"):
            raise ValueError(f"parameterization {self.parameterization!r} needs a bridge process")
        if self.parameterization == "i2sb" and not isinstance(self.process, SDEBridge):
            raise ValueError(
                "parameterization 'i2sb' needs the bridge of an SDE, got "
                f"{type(self.process).__name__}"
            )
        if is_bridge and self.parameterization == "eps" and self.source is None:
            raise ValueError("parameterization 'eps' of a bridge needs its source")

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

    def output_scale(self, point):
        """What multiplies the network's output in x0_hat: the error of x0_hat over that of the network.

        A scalar or `[B]`. Raises ValueError for parameterizations of Gaussian processes other than "x0"
        and "edm" (their weights are in `objectives.weightings`).
        """
        if self.parameterization in ("edm", "ddbm"):
            return self.preconditioning(point).c_out
        if self.parameterization == "x0":
            return 1.0
        if not isinstance(self.process, BridgeProcess):
            raise ValueError(f"no output_scale for parameterization {self.parameterization!r}")
        if self.parameterization == "i2sb":
            return point["sigma"] / point["alpha"]
        return point["c"] / point["b"]

    def at(self, x, point):
        """x0_hat `[B, ...]` at a `Point`."""
        return self.moments(x, point)[0]

    def moments(self, x, point):
        """x0_hat and v, both `[B, ...]`; v is None where no variance is learned."""
        if self.parameterization in ("edm", "ddbm"):
            c = self.preconditioning(point)
            raw, v = self._split(self.network(expand(c.c_in, x) * x, c.c_noise), x)
            return expand(c.c_skip, x) * x + expand(c.c_out, x) * raw, v
        out, v = self._split(self.network(x, point["t"]), x)
        return self._x0(out, x, point), v

    def _split(self, out, x):
        channels = x.shape[-1] if self.learned_variance else None
        if channels is None:
            return out, None
        if out.shape[-1] != 2 * channels:
            raise ValueError(
                f"learned_variance needs a network of {2 * channels} output channels, got"
                f" {out.shape[-1]}"
            )
        return out[..., :channels], out[..., channels:]

    def _x0(self, out, x, point):
        if not isinstance(self.process, BridgeProcess):
            return to_x0(self.parameterization, out, x, point)
        if self.parameterization == "x0":
            return out
        if self.parameterization == "i2sb":
            return (x - expand(point["sigma"], x) * out) / expand(point["alpha"], x)
        a, b, c = (expand(point[name], x) for name in "abc")
        return (x - a * self.source - c * out) / b
