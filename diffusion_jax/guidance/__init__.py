"""Transforms denoiser -> denoiser: they act on x0_hat, before the solver sees it."""

from diffusion_jax.guidance.transforms import clip, guide, inpaint

__all__ = ["clip", "guide", "inpaint"]
