"""Denoiser transforms: clipping, classifier-free guidance, overwriting what is known.

Each returns a pytree whose leaves are the inner denoisers' arrays and the transform's own numbers, so
sweeping a guidance weight never re-traces. They compose, and they serve bridges and Gaussian processes
alike; `guide` also mixes logits.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.denoisers import evaluate, evaluate_moments
from diffusion_jax.numerics import expand, pytree_dataclass, static


class _Transform:
    """A denoiser made of denoisers: a subclass gives `at(x, point)`."""

    def __call__(self, x, t):
        return self.at(x, {"t": t})


def _inner(denoise, x, point):
    """Calls an inner denoiser with the whole point where it is known, with t alone otherwise."""
    if len(point) == 1:
        return denoise(x, point["t"])
    return evaluate(denoise, x, point)[0]


@pytree_dataclass
class clip(_Transform):
    """Clips x0_hat to [low, high] (static thresholding).

    With `straight_through` its gradient is that of the identity, for losses that are to see what
    sampling sees: clipped values do not move, and a value outside can still be called back.
    """

    denoise: Any
    low: float = -1.0
    high: float = 1.0
    straight_through: bool = static(False)

    def at(self, x, point):
        """x0_hat `[B, ...]`, clipped."""
        return self._clipped(_inner(self.denoise, x, point))

    def moments(self, x, point):
        """x0_hat, clipped, and the v of a learned variance as it is."""
        x0, v = evaluate_moments(self.denoise, x, point)
        return self._clipped(x0), v

    def _clipped(self, x0):
        clipped = jnp.clip(x0, self.low, self.high)
        if not self.straight_through:
            return clipped
        return x0 + jax.lax.stop_gradient(clipped - x0)


@pytree_dataclass
class dynamic_threshold(_Transform):
    """Dynamic thresholding (Saharia et al., arXiv 2205.11487): for pixels under strong guidance.

    Each example's x0_hat is clipped to [-s, s] and divided by s / `limit`, s the `quantile` of its
    absolute values and at least `limit`.
    """

    denoise: Any
    quantile: float = 0.995
    limit: float = 1.0

    def at(self, x, point):
        """x0_hat `[B, ...]`, within [-limit, limit]."""
        x0 = _inner(self.denoise, x, point)
        s = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), self.quantile, axis=1)
        s = expand(jnp.maximum(s, self.limit), x0).astype(x0.dtype)
        return jnp.clip(x0, -s, s) * (self.limit / s)


@pytree_dataclass
class guide(_Transform):
    """Classifier-free guidance (Ho and Salimans, arXiv 2207.12598): `u + weight (c - u)`.

    weight 1 is the conditional model, 0 the unconditional one; diffusers calls it guidance_scale.
    U-ViT's s (arXiv 2209.12152) is weight - 1. Costs two network calls a step. For tokens it mixes
    logits, which is the same rule on log p.

    Args:
      conditional, unconditional: the two denoisers, or raw networks.
      weight: of the conditional one.
      channels: how many channels are guided, the first ones; the others are those of the conditional
        model. DiT (arXiv 2212.09748) was published with 3 of its 4 latent channels. None: all.
    Raises:
      ValueError: channels that are not a positive int, or more than there are.
    """

    conditional: Any
    unconditional: Any
    weight: float = 1.0
    channels: int | None = static(None)

    def __post_init__(self):
        wrong = isinstance(self.channels, bool) or not isinstance(self.channels, int | None)
        if wrong or (self.channels is not None and self.channels < 1):
            raise ValueError(f"channels must be a positive int or None, got {self.channels!r}")

    def at(self, x, point):
        """x0_hat `[B, ...]` of the guided model."""
        base, told = (_inner(d, x, point) for d in (self.unconditional, self.conditional))
        return self._guided(base, told)

    def moments(self, x, point):
        """x0_hat of the guided model, and the v of a learned variance of the conditional one."""
        base, _ = evaluate_moments(self.unconditional, x, point)
        told, v = evaluate_moments(self.conditional, x, point)
        return self._guided(base, told), v

    def _guided(self, base, told):
        # where both are -inf (a token that cannot be) the difference would be NaN
        guided = jnp.where(base == told, told, base + self.weight * (told - base))
        if self.channels is None:
            return guided
        if self.channels > told.shape[-1]:
            raise ValueError(
                f"{self.channels} channels cannot be guided: there are {told.shape[-1]}"
            )
        return jnp.concatenate([guided[..., : self.channels], told[..., self.channels :]], axis=-1)


@pytree_dataclass
class inpaint(_Transform):
    """Replaces x0_hat by the known values where `unknown` is 0 (DBIM's inpainting, arXiv 2405.15885).

    Args:
      denoise: the inner denoiser.
      known: `[B, ...]`, the values to keep.
      unknown: 1 where the network decides, 0 where `known` stands; broadcasts against `known`.
    Raises:
      ValueError: a NumPy mask with other values than 0 and 1.
    """

    denoise: Any
    known: Any
    unknown: Any

    def __post_init__(self):
        if isinstance(self.unknown, np.ndarray) and not np.isin(self.unknown, (0, 1)).all():
            wrong = self.unknown[~np.isin(self.unknown, (0, 1))].flat[0]
            raise ValueError(f"a mask holds 0 (known) and 1 (unknown) only, got {wrong}")

    def at(self, x, point):
        """x0_hat `[B, ...]` with the known region written in."""
        return _inner(self.denoise, x, point) * self.unknown + self.known * (1.0 - self.unknown)
