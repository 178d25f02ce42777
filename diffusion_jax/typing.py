"""Shared type names. Shapes are batch-first and channels-last; keys are `jax.random.key` keys."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np

Array = jax.Array | np.ndarray
Key = jax.Array
PyTree = Any

# The schedule values at one time: `t` and, by family, `alpha, sigma, dalpha, dsigma` (Gaussian),
# `a, b, c` (bridges) or `alpha` (discrete). Scalars, or one value an example.
Point = Mapping[str, Array]


class Denoise(Protocol):
    """Any callable `(x, t) -> x0_hat`; for tokens `(tokens, t) -> logits [B, L, V]`.

    `t` is a scalar or `[B]`. Conditions (labels, a source image, parameters) are closed over.
    A callable with a method `at(x, point)` is given the whole `Point` of a step instead, computed
    on the host in float64. A *stateful* denoiser takes a third argument, its cache, and returns
    `(x0_hat, cache)`; `sample(..., cache=...)` carries it along.
    """

    def __call__(self, x: Array, t: Array) -> Array: ...


Transform = Callable[[Denoise], Denoise]
