"""Model families: process, network, objective and sampler composed into `Method`."""

from diffusion_jax.methods.base import Context, Method
from diffusion_jax.methods.bridge import bridge
from diffusion_jax.methods.masked import masked
from diffusion_jax.methods.score import score

__all__ = ["Context", "Method", "bridge", "masked", "score"]
