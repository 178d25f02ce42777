"""Scaling laws: how the loss falls with the compute that training spends.

(1) compute C = 6 N D of N parameters and D tokens (arXiv 2001.08361)
(2) at equal compute, loss as a parabola in log N: its vertex is the best size (arXiv 2203.15556)
(3) the best losses of several budgets on a line: log L = slope log C + intercept (SMDM, arXiv 2410.18514)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PowerLaw(NamedTuple):
    """`L = exp(intercept) C^slope`.

    Attributes:
      slope: of log L in log C; negative where more compute helps.
      intercept: log L at C = 1.
      slope_error: standard error of the slope from the scatter about the line; NaN for two points.
      points: number of points that it was fitted to.
    """

    slope: float
    intercept: float
    slope_error: float
    points: int

    def loss(self, compute):
        """L at a compute, any shape."""
        return np.exp(self.intercept) * np.asarray(compute, np.float64) ** self.slope

    def compute(self, loss):
        """C that reaches a loss, any shape; log C where the slope is flat would be no number."""
        return np.exp((np.log(np.asarray(loss, np.float64)) - self.intercept) / self.slope)


def _positive(**named) -> list[np.ndarray]:
    arrays = [np.asarray(v, np.float64) for v in named.values()]
    for name, values in zip(named, arrays):
        if values.ndim != 1 or values.shape != arrays[0].shape:
            raise ValueError(f"{name} must be a vector as long as the others, got {values.shape}")
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name} must be positive and finite, got {values}")
    return arrays


def fit_power_law(compute, loss) -> PowerLaw:
    """Least squares of log L on log C.

    Args:
      compute, loss: `[n]`, positive, n >= 2 with at least two values of compute.
    Raises:
      ValueError: other shapes or values.
    """
    compute, loss = _positive(compute=compute, loss=loss)
    if len(set(compute)) < 2:
        raise ValueError(f"a slope needs two values of compute, got {compute}")
    x, y = np.log(compute), np.log(loss)
    centred = x - x.mean()
    spread = (centred**2).sum()
    slope = (centred * y).sum() / spread
    intercept = y.mean() - slope * x.mean()
    free = len(x) - 2
    rest = ((y - slope * x - intercept) ** 2).sum()
    error = np.sqrt(rest / free / spread) if free else np.nan
    return PowerLaw(float(slope), float(intercept), float(error), len(x))


def slope_ratio(first: PowerLaw, second: PowerLaw) -> tuple[float, float]:
    """`first.slope / second.slope` and its standard error, to first order in those of the slopes."""
    ratio = first.slope / second.slope
    relative = np.hypot(first.slope_error / first.slope, second.slope_error / second.slope)
    return ratio, float(abs(ratio) * relative)


def loss_at(compute, curve_compute, curve_loss):
    """A training curve read at other compute, linear in the logarithms; NaN outside the curve.

    Args:
      compute: `[m]`.
      curve_compute, curve_loss: `[n]`, increasing compute.
    Returns:
      `[m]`.
    """
    x, y = _positive(curve_compute=curve_compute, curve_loss=curve_loss)
    if (np.diff(x) <= 0).any():
        raise ValueError(f"the compute of a curve must increase, got {x}")
    # a budget that the last checkpoint meets but for rounding is met
    at = np.asarray(compute, np.float64)
    near = np.clip(at, x[0], x[-1])
    at = np.where(np.isclose(at, near, rtol=1e-6), near, at)
    return np.exp(np.interp(np.log(at), np.log(x), np.log(y), left=np.nan, right=np.nan))


class Optimum(NamedTuple):
    """The best size at one budget: `params`, `loss`, and whether it lies between the sizes tried."""

    params: float
    loss: float
    inside: bool


def best_size(params: Sequence[float], loss: Sequence[float]) -> Optimum:
    """The vertex of the parabola of loss in log N through the best size tried and its neighbours.

    Where the best size tried is the smallest or the largest, or there are fewer than three, it is taken as
    it is, and `inside` is False.

    Args:
      params, loss: `[n]`, one pair a size; NaN losses are left out.
    Raises:
      ValueError: no finite loss, or sizes that are not positive or not distinct.
    """
    params, loss = np.asarray(params, np.float64), np.asarray(loss, np.float64)
    known = np.isfinite(loss)
    if not known.any():
        raise ValueError("no size has a loss at this budget")
    order = np.argsort(params[known])
    (params,) = _positive(params=params[known][order])
    loss = loss[known][order]
    if (np.diff(params) == 0).any():
        raise ValueError(f"sizes must differ, got {params}")
    i = int(np.argmin(loss))
    if i in (0, len(loss) - 1):
        return Optimum(float(params[i]), float(loss[i]), False)
    x = np.log(params[i - 1 : i + 2])
    bend, tilt, level = np.polyfit(x - x[1], loss[i - 1 : i + 2], 2)
    at = -tilt / (2.0 * bend)
    return Optimum(float(np.exp(x[1] + at)), float(level - tilt**2 / (4.0 * bend)), True)
