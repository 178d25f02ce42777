"""Model families: process, network, objective and sampler composed into `Method`."""

from diffusion_jax.methods.autoregressive import autoregressive
from diffusion_jax.methods.base import Context, Method
from diffusion_jax.methods.bayesian_flow import bayesian_flow
from diffusion_jax.methods.block_diffusion import block_diffusion
from diffusion_jax.methods.bridge import bridge
from diffusion_jax.methods.consistency_bridge import consistency_bridge
from diffusion_jax.methods.d3pm import d3pm
from diffusion_jax.methods.dida import dida
from diffusion_jax.methods.didi_instruct import critic_of, didi_instruct
from diffusion_jax.methods.genmd4 import genmd4
from diffusion_jax.methods.interpolant import interpolant
from diffusion_jax.methods.masked import masked
from diffusion_jax.methods.mmd import mmd
from diffusion_jax.methods.refine import refine
from diffusion_jax.methods.score import score
from diffusion_jax.methods.score_entropy import score_entropy
from diffusion_jax.methods.tts import bridge_tts, grad_tts
from diffusion_jax.methods.uniform import uniform
from diffusion_jax.methods.vdm import vdm

__all__ = [
    "Context",
    "Method",
    "autoregressive",
    "bayesian_flow",
    "block_diffusion",
    "bridge",
    "bridge_tts",
    "consistency_bridge",
    "critic_of",
    "d3pm",
    "dida",
    "didi_instruct",
    "genmd4",
    "grad_tts",
    "interpolant",
    "masked",
    "mmd",
    "refine",
    "score",
    "score_entropy",
    "uniform",
    "vdm",
]
