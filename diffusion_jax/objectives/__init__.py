"""What a network learns: losses, one value an example, as pure functions."""

from diffusion_jax.objectives import consistency, times, weightings
from diffusion_jax.objectives.bayesian_flow import (
    continuous_flow_loss,
    discrete_flow_loss,
    discrete_reconstruction,
    discretised_reconstruction,
)
from diffusion_jax.objectives.bridge import bridge_denoising
from diffusion_jax.objectives.denoising import denoising
from diffusion_jax.objectives.interpolant import interpolant_losses
from diffusion_jax.objectives.masked import masked_cross_entropy, masked_sum
from diffusion_jax.objectives.mmd import build_kernel, mmd2
from diffusion_jax.objectives.variational import (
    VariationalTerms,
    bits_per_dim,
    variational_bound,
    variational_terms,
)

__all__ = [
    "VariationalTerms",
    "bits_per_dim",
    "bridge_denoising",
    "build_kernel",
    "consistency",
    "continuous_flow_loss",
    "denoising",
    "discrete_flow_loss",
    "discrete_reconstruction",
    "discretised_reconstruction",
    "interpolant_losses",
    "masked_cross_entropy",
    "masked_sum",
    "mmd2",
    "times",
    "variational_bound",
    "variational_terms",
    "weightings",
]
