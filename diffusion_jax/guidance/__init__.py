"""Transforms denoiser -> denoiser: they act on x0_hat, before the solver sees it."""

from diffusion_jax.guidance.consistency import bridge_consistency, bridge_ode_map
from diffusion_jax.guidance.discrete import guide_steps, steer
from diffusion_jax.guidance.prompts import guide_prompt
from diffusion_jax.guidance.transforms import clip, dynamic_threshold, guide, inpaint

__all__ = [
    "bridge_consistency",
    "bridge_ode_map",
    "clip",
    "dynamic_threshold",
    "guide",
    "guide_prompt",
    "guide_steps",
    "inpaint",
    "steer",
]
