"""What a network learns: losses, one value an example, as pure functions."""

from diffusion_jax.objectives import consistency, divergence_instruct, times, weightings
from diffusion_jax.objectives.autoregressive import next_token_cross_entropy
from diffusion_jax.objectives.bayesian_flow import (
    continuous_flow_loss,
    discrete_flow_loss,
    discrete_reconstruction,
    discretised_reconstruction,
)
from diffusion_jax.objectives.block import (
    BLOCK_MASKINGS,
    block_cross_entropy,
    blockwise,
    check_clip,
    exact_block_bound,
    search_clip,
)
from diffusion_jax.objectives.bridge import bridge_denoising
from diffusion_jax.objectives.denoising import denoising
from diffusion_jax.objectives.interpolant import interpolant_losses
from diffusion_jax.objectives.learned_variance import learned_variance_denoising, variance_bound
from diffusion_jax.objectives.masked import (
    build_masking,
    masked_cross_entropy,
    masked_sum,
    score_offset,
    uniform_reconstruction,
)
from diffusion_jax.objectives.mmd import build_kernel, mmd2
from diffusion_jax.objectives.refine import correcting_cross_entropy, refining_cross_entropy
from diffusion_jax.objectives.score_entropy import (
    denoising_score_entropy,
    leave_one_out_bound,
    prior_kl,
    score_entropy,
)
from diffusion_jax.objectives.state_dependent import state_masked_loss
from diffusion_jax.objectives.token_cross_entropy import (
    chunked_cross_entropy,
    cross_entropy,
    reduced_logits,
    token_cross_entropy,
)
from diffusion_jax.objectives.transition_kl import (
    chain_losses,
    contrastive_losses,
    hybrid_loss,
    transition_kl,
)
from diffusion_jax.objectives.variational import (
    VariationalTerms,
    bits_per_dim,
    variational_bound,
    variational_terms,
)

__all__ = [
    "BLOCK_MASKINGS",
    "VariationalTerms",
    "bits_per_dim",
    "block_cross_entropy",
    "blockwise",
    "bridge_denoising",
    "build_kernel",
    "build_masking",
    "chain_losses",
    "check_clip",
    "chunked_cross_entropy",
    "consistency",
    "continuous_flow_loss",
    "contrastive_losses",
    "correcting_cross_entropy",
    "cross_entropy",
    "denoising",
    "denoising_score_entropy",
    "discrete_flow_loss",
    "discrete_reconstruction",
    "discretised_reconstruction",
    "divergence_instruct",
    "exact_block_bound",
    "hybrid_loss",
    "interpolant_losses",
    "learned_variance_denoising",
    "leave_one_out_bound",
    "masked_cross_entropy",
    "masked_sum",
    "mmd2",
    "next_token_cross_entropy",
    "prior_kl",
    "reduced_logits",
    "refining_cross_entropy",
    "score_entropy",
    "score_offset",
    "search_clip",
    "state_masked_loss",
    "times",
    "token_cross_entropy",
    "transition_kl",
    "uniform_reconstruction",
    "variance_bound",
    "variational_bound",
    "variational_terms",
    "weightings",
]
