"""How to walk back: solvers as tables, and the one scan that runs them."""

from diffusion_jax.samplers.build import build_sampler
from diffusion_jax.samplers.dbim import dbim
from diffusion_jax.samplers.ddbm import ddbm_heun
from diffusion_jax.samplers.dpm_solver import (
    dpm_solver,
    dpm_solver_pp,
    sde_dpm_solver_pp,
    singlestep_plan,
)
from diffusion_jax.samplers.first_order import ddim, ddpm, euler
from diffusion_jax.samplers.gaussian_path import GaussianPath, gaussian_path
from diffusion_jax.samplers.heun import edm_heun, heun, midpoint
from diffusion_jax.samplers.linear import Form, Rows, with_noise
from diffusion_jax.samplers.masked import first_hitting, masked_ancestral
from diffusion_jax.samplers.scan import Sampler, StepInfo, sample
from diffusion_jax.samplers.time_grids import (
    align_your_steps,
    arctan,
    build_times,
    karras,
    leading,
    log_snr,
    quadratic,
    shifted,
    trailing,
    uniform,
)

__all__ = [
    "Form",
    "GaussianPath",
    "Rows",
    "Sampler",
    "StepInfo",
    "align_your_steps",
    "arctan",
    "build_sampler",
    "build_times",
    "dbim",
    "ddbm_heun",
    "ddim",
    "ddpm",
    "dpm_solver",
    "dpm_solver_pp",
    "edm_heun",
    "euler",
    "first_hitting",
    "gaussian_path",
    "heun",
    "karras",
    "leading",
    "log_snr",
    "masked_ancestral",
    "midpoint",
    "quadratic",
    "sample",
    "sde_dpm_solver_pp",
    "shifted",
    "singlestep_plan",
    "trailing",
    "uniform",
    "with_noise",
]
