"""Transforms denoiser -> denoiser: they act on x0_hat, before the solver sees it."""

from diffusion_jax.guidance.transforms import clip, dynamic_threshold, guide, inpaint

__all__ = ["clip", "dynamic_threshold", "guide", "inpaint"]
