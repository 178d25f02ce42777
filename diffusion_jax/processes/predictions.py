"""The linear maps between what networks predict: x0, eps, v, score and velocity.

With x = alpha x0 + sigma eps:
  (1) score = -eps / sigma
  (2) v = alpha eps - sigma x0, hence x0 = (alpha x - sigma v) / (alpha^2 + sigma^2) for any schedule
      (Salimans and Ho, arXiv 2202.00512, write it for alpha^2 + sigma^2 = 1)
  (3) velocity = alpha' x0 + sigma' eps, the probability-flow velocity dx/dt
All are evaluated in the dtype of x.
"""

from diffusion_jax.numerics import expand
from diffusion_jax.registry import check_choice

PREDICTIONS = ("x0", "eps", "v", "score", "velocity")


def to_x0(kind, value, x, point):
    """The x0 that a prediction means.

    Args:
      kind: one of `PREDICTIONS`.
      value: the prediction, shape of `x` `[B, ...]`.
      point: `process.point(t)`; entries scalar or `[B]`.
    Raises:
      ValueError: unknown kind.
    """
    check_choice("prediction", kind, PREDICTIONS)
    if kind == "x0":
        return value
    alpha, sigma = expand(point["alpha"], x), expand(point["sigma"], x)
    if kind == "eps":
        return (x - sigma * value) / alpha
    if kind == "score":
        return (x + sigma**2 * value) / alpha
    if kind == "v":
        return (alpha * x - sigma * value) / (alpha**2 + sigma**2)
    dalpha, dsigma = expand(point["dalpha"], x), expand(point["dsigma"], x)
    return (sigma * value - dsigma * x) / (sigma * dalpha - alpha * dsigma)


def from_x0(kind, x0, x, point):
    """The prediction of a kind that means this x0: inverse of `to_x0`, same arguments."""
    check_choice("prediction", kind, PREDICTIONS)
    if kind == "x0":
        return x0
    alpha, sigma = expand(point["alpha"], x), expand(point["sigma"], x)
    eps = (x - alpha * x0) / sigma
    if kind == "eps":
        return eps
    if kind == "score":
        return -eps / sigma
    if kind == "v":
        return alpha * eps - sigma * x0
    return expand(point["dalpha"], x) * x0 + expand(point["dsigma"], x) * eps


def convert(value, x, point, source, target):
    """A prediction of kind `source` as one of kind `target`; arguments as in `to_x0`."""
    check_choice("prediction", target, PREDICTIONS)
    return value if source == target else from_x0(target, to_x0(source, value, x, point), x, point)
