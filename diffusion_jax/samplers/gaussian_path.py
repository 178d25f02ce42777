"""A time grid with the schedule on it: what the builders of Gaussian solvers read."""

from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.processes import GaussianProcess
from diffusion_jax.samplers.time_grids import build_times


class GaussianPath(NamedTuple):
    """Host float64 arrays `[n + 1]` along decreasing times.

    Attributes:
      process: the forward process.
      t, alpha, sigma, lam: the schedule; lam is infinite where alpha or sigma is 0.
    """

    process: Any
    t: np.ndarray
    alpha: np.ndarray
    sigma: np.ndarray
    lam: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.t) - 1

    def point(self, i: int) -> dict:
        """The `Point` at grid index i."""
        return self.process.point(self.t[i])

    def clean_point(self) -> dict:
        """The point after the network's own x0_hat was taken: alpha = 1, sigma = 0."""
        return self.process.point(self.t[-1]) | {"t": 0.0, "alpha": 1.0, "sigma": 0.0}


def check_gaussian(process: Any) -> None:
    """Raises ValueError for anything but a Gaussian process."""
    if not isinstance(process, GaussianProcess):
        raise ValueError(f"this sampler needs a Gaussian process, got {type(process).__name__}")


def check_order(order: int, steps: int) -> None:
    """Raises ValueError where a multistep order can never be reached in so few steps."""
    if order > steps:
        raise ValueError(
            f"order {order} needs at least {order} steps, got {steps}: take more steps or a lower order"
        )


def gaussian_path(
    process, num_steps, grid=None, t_start=None, t_end=None, default_steps=None
) -> GaussianPath:
    """The path of a solver; arguments as `time_grids.build_times`.

    Raises:
      ValueError: not a Gaussian process, or a bad grid.
    """
    check_gaussian(process)
    t = build_times(process, num_steps, grid, t_start, t_end, default_steps)
    alpha, sigma = np.asarray(process.alpha(t)), np.asarray(process.sigma(t))
    with np.errstate(divide="ignore"):
        lam = np.asarray(process.lam(t))
    return GaussianPath(process, t, alpha, sigma, lam)
