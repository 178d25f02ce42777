"""Squared maximum mean discrepancy between two sets of vectors, as a loss (MMD-DDM, arXiv 2301.07969).

  (1) mmd2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
  (2) polynomial   k(x, y) = (gamma x . y + offset)^degree
  (3) rbf          k(x, y) = exp(-gamma |x - y|^2)

gamma is 1 / D unless given. (1) is unbiased for sets of independent vectors (Gretton et al., 2012): its
mean is exactly 0 for two sets of one law, so a value may be negative. It is a figure of the whole sets:
means over parts of a batch are another, noisier estimate, and a "batch" of one has none.

Kernels are functions of inner products, so that one definition serves gradients (JAX) and the float64
kernel distance of `evaluation` (NumPy).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.numerics import is_concrete, namespace, pytree_dataclass, static
from diffusion_jax.registry import check_choice


class Kernel:
    """`(products, left, right, dimension) -> k`, of x . y, |x|^2 and |y|^2; all broadcast."""

    translation_invariant = False


@pytree_dataclass
class polynomial(Kernel):
    """Kernel (2): the first `degree` moments decide whether two laws are told apart.

    degree 1 compares means (a linear kernel), 3 is the kernel distance of arXiv 1801.01401 and the
    default of MMD-DDM.

    Args:
      degree: positive int, static.
      gamma: None for 1 / D.
      offset: weighs lower against higher moments.
    Raises:
      ValueError: another degree.
    """

    degree: int = static(3)
    gamma: float | None = None
    offset: float = 1.0

    def __post_init__(self):
        if not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree must be a positive int, got {self.degree!r}")

    def __call__(self, products, left, right, dimension):
        gamma = 1.0 / dimension if self.gamma is None else self.gamma
        return (gamma * products + self.offset) ** self.degree


@pytree_dataclass
class rbf(Kernel):
    """Kernel (3), which tells any two laws apart.

    Args:
      gamma: positive, None for 1 / D.
    Raises:
      ValueError: gamma not positive.
    """

    gamma: float | None = None
    translation_invariant = True

    def __post_init__(self):
        if is_concrete(self.gamma) and not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def __call__(self, products, left, right, dimension):
        gamma = 1.0 / dimension if self.gamma is None else self.gamma
        return namespace(products).exp(-gamma * (left + right - 2.0 * products))


KERNELS = {"polynomial": polynomial, "rbf": rbf}


def build_kernel(name: str, **options: Any) -> Kernel:
    """A kernel by name: "polynomial" (degree, gamma, offset) or "rbf" (gamma).

    Raises:
      ValueError: an unknown name, or options it does not have.
    """
    check_choice("kernel", name, KERNELS)
    try:
        return KERNELS[name](**options)
    except TypeError as error:
        raise ValueError(f"kernel {name!r}: {error}") from error


def gram(kernel: Kernel, x: Any, y: Any) -> Any:
    """The matrix k(x_i, y_j) `[N, M]` of vectors `[N, D]` and `[M, D]`, NumPy or JAX."""
    xp = namespace(x, y)
    # full precision: accelerators would round the factors, and (1) is a difference of near equals
    dot = np.matmul if xp is np else lambda a, b: jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
    left, right = (x * x).sum(axis=1)[:, None], (y * y).sum(axis=1)[None]
    return kernel(dot(x, y.T), left, right, x.shape[1])


def diagonal(kernel: Kernel, x: Any) -> Any:
    """k(x_i, x_i) `[N]` of vectors `[N, D]`, NumPy or JAX."""
    squares = (x * x).sum(axis=1)
    return kernel(squares, squares, squares, x.shape[1])


def mmd2(x: jax.Array, y: jax.Array, kernel: Kernel | None = None) -> jax.Array:
    """The unbiased estimate (1), differentiable in both sets.

    Args:
      x: `[N, D]`, N >= 2; computed in float32 or better.
      y: `[M, D]`, M >= 2.
      kernel: default cubic, `polynomial(3)`.
    Returns:
      A scalar. Cost O((N + M)^2 D), memory O((N + M)^2).
    Raises:
      ValueError: other shapes, or fewer than two vectors of a side.
    """
    shapes = jnp.shape(x), jnp.shape(y)
    if any(len(s) != 2 for s in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"mmd2 takes vectors [N, D] and [M, D], got shapes {shapes[0]}, {shapes[1]}"
        )
    if min(shapes[0][0], shapes[1][0]) < 2:
        raise ValueError(
            f"mmd2 needs 2 vectors or more of each, got {shapes[0][0]}, {shapes[1][0]}"
        )
    kernel = polynomial() if kernel is None else kernel
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    x, y = jnp.asarray(x, dtype), jnp.asarray(y, dtype)
    if kernel.translation_invariant:  # |x|^2 + |y|^2 - 2 x . y cancels less near the origin
        centre = jax.lax.stop_gradient(y.mean(axis=0, keepdims=True))
        x, y = x - centre, y - centre

    def within(v):
        n = v.shape[0]
        pairs = jnp.where(jnp.eye(n, dtype=bool), 0.0, gram(kernel, v, v))
        return pairs.sum() / (n * (n - 1))

    return within(x) + within(y) - 2.0 * gram(kernel, x, y).mean()
