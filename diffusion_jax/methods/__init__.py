"""Model families: process, network, objective and sampler composed into `Method`."""

from diffusion_jax.methods.base import Context, Method
from diffusion_jax.methods.bayesian_flow import bayesian_flow
from diffusion_jax.methods.bridge import bridge
from diffusion_jax.methods.masked import masked
from diffusion_jax.methods.mmd import mmd
from diffusion_jax.methods.score import score
from diffusion_jax.methods.vdm import vdm

__all__ = ["Context", "Method", "bayesian_flow", "bridge", "masked", "mmd", "score", "vdm"]
