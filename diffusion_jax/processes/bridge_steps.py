"""Steps of a bridge in closed form, for arrays and for the symbolic forms of a solver table alike.

With `x_t = a x1 + b x0 + c eps` and the schedule values of two times, `here` and `there`:
  (1) probability-flow ODE with x0 frozen, exact: x' = k x + (b' - k b) x0 + (a' - k a) x1, k = c' / c
  (2) noise added on the way to a later time, exact: x' = m x + (a' - m a) x1 + w z, m = b' / b,
      w^2 = c'^2 - m^2 c^2

(1) is the first-order step of DBIM at eta = 0 (arXiv 2405.15885) and of CDBM (arXiv 2410.22637, prop. 3.1).
(2) carries q(x_here | x0, x1) into q(x_there | x0, x1) whatever x0 is; from b = 1, a = c = 0 it is
q(x_there | x0, x1) itself.
"""

from typing import Any

from diffusion_jax.numerics import expand, namespace


def ode_step(x: Any, x0: Any, x1: Any, here: Any, there: Any) -> Any:
    """Step (1).

    Args:
      x, x0, x1: state, data estimate and source: arrays `[B, ...]`, or forms.
      here, there: points (`process.point`); values are scalars or `[B]`. c must be positive at `here`.
    """
    k = there["c"] / here["c"]
    values = k, there["b"] - k * here["b"], there["a"] - k * here["a"]
    k, of_data, of_source = (expand(v, x) for v in values)
    return k * x + of_data * x0 + of_source * x1


def renoise(x: Any, x1: Any, z: Any, here: Any, there: Any) -> Any:
    """Step (2), towards the source.

    Args:
      x, x1, z: state, source and standard normal noise: arrays `[B, ...]`, or forms.
      here, there: points; b must be positive at `here`.
    """
    m = there["b"] / here["b"]
    variance = there["c"] ** 2 - (m * here["c"]) ** 2
    xp = namespace(variance)
    values = m, there["a"] - m * here["a"], xp.sqrt(xp.maximum(variance, 0.0))
    m, of_source, w = (expand(v, x) for v in values)
    return m * x + of_source * x1 + w * z
