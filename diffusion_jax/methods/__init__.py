"""Model families: process, network, objective and sampler composed into `Method`."""

from diffusion_jax.methods.base import Context, Method
from diffusion_jax.methods.bayesian_flow import bayesian_flow
from diffusion_jax.methods.bridge import bridge
from diffusion_jax.methods.consistency_bridge import consistency_bridge
from diffusion_jax.methods.interpolant import interpolant
from diffusion_jax.methods.masked import masked
from diffusion_jax.methods.mmd import mmd
from diffusion_jax.methods.score import score
from diffusion_jax.methods.tts import bridge_tts, grad_tts
from diffusion_jax.methods.vdm import vdm

__all__ = [
    "Context",
    "Method",
    "bayesian_flow",
    "bridge",
    "bridge_tts",
    "consistency_bridge",
    "grad_tts",
    "interpolant",
    "masked",
    "mmd",
    "score",
    "vdm",
]
