"""Forward processes: how data is destroyed. Schedules, conversions between predictions, preconditioning."""

from diffusion_jax.processes import preconditioning, scores
from diffusion_jax.processes.bayesian_flow import ContinuousBFN, DiscreteBFN
from diffusion_jax.processes.bridge import BridgeProcess, SDEBridge
from diffusion_jax.processes.bridge_schedules import (
    I2SB,
    BrownianBridge,
    GmaxBridge,
    HTransform,
    VEBridge,
    VPBridge,
)
from diffusion_jax.processes.ctmc import CTMC, ctmc
from diffusion_jax.processes.d3pm import D3PM, MaskReplace, d3pm, mask_replace
from diffusion_jax.processes.discrete import Absorbing, DiscreteProcess, Uniform
from diffusion_jax.processes.discrete_time import DiscreteVP, discrete_vp
from diffusion_jax.processes.gaussian import (
    EDM,
    VE,
    VP,
    Cosine,
    GaussianProcess,
    RectifiedFlow,
    SubVP,
)
from diffusion_jax.processes.interpolants import Interpolant
from diffusion_jax.processes.log_snr import LinearLogSNR, LogSNRProcess
from diffusion_jax.processes.mask_schedules import (
    CosineAlphaSchedule,
    CosineSchedule,
    GeometricSchedule,
    LinearSchedule,
    MaskSchedule,
    PolynomialSchedule,
)
from diffusion_jax.processes.predictions import PREDICTIONS, convert, from_x0, to_x0
from diffusion_jax.processes.state_masking import StateMasking

__all__ = [
    "CTMC",
    "D3PM",
    "EDM",
    "I2SB",
    "PREDICTIONS",
    "VE",
    "VP",
    "Absorbing",
    "BridgeProcess",
    "BrownianBridge",
    "ContinuousBFN",
    "Cosine",
    "CosineAlphaSchedule",
    "CosineSchedule",
    "DiscreteBFN",
    "DiscreteProcess",
    "DiscreteVP",
    "GaussianProcess",
    "GeometricSchedule",
    "GmaxBridge",
    "HTransform",
    "Interpolant",
    "LinearLogSNR",
    "LinearSchedule",
    "LogSNRProcess",
    "MaskReplace",
    "MaskSchedule",
    "PolynomialSchedule",
    "RectifiedFlow",
    "SDEBridge",
    "StateMasking",
    "SubVP",
    "Uniform",
    "VEBridge",
    "VPBridge",
    "convert",
    "ctmc",
    "d3pm",
    "discrete_vp",
    "from_x0",
    "mask_replace",
    "preconditioning",
    "scores",
    "to_x0",
]
