"""What a network learns: losses, one value an example, as pure functions."""

from diffusion_jax.objectives import times, weightings
from diffusion_jax.objectives.denoising import bridge_denoising, denoising
from diffusion_jax.objectives.masked import masked_cross_entropy, masked_sum

__all__ = [
    "bridge_denoising",
    "denoising",
    "masked_cross_entropy",
    "masked_sum",
    "times",
    "weightings",
]
