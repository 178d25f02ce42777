"""How to walk back: solvers as tables, and the one scan that runs them."""

from diffusion_jax.samplers.bayesian_flow import bfn, bfn_continuous
from diffusion_jax.samplers.bfn_solver import bfn_solver, bfn_solver_discrete
from diffusion_jax.samplers.bridge_ancestral import bridge_tts, bridge_tts_ode, i2sb
from diffusion_jax.samplers.bridge_euler import bridge_euler, bridge_ode
from diffusion_jax.samplers.bridge_latent import dbim_encode, interpolate_latents
from diffusion_jax.samplers.build import build_sampler
from diffusion_jax.samplers.consistency import consistency_bridge
from diffusion_jax.samplers.dbim import dbim
from diffusion_jax.samplers.ddbm import ddbm_heun
from diffusion_jax.samplers.deis import deis
from diffusion_jax.samplers.dpm_ot import (
    annealed_langevin,
    dpm_ot,
    late_states,
    transport_sampler,
)
from diffusion_jax.samplers.dpm_solver import (
    dpm_solver,
    dpm_solver_pp,
    sde_dpm_solver_pp,
    singlestep_plan,
)
from diffusion_jax.samplers.dpm_solver_v3 import dpm_solver_v3, official_flags
from diffusion_jax.samplers.dualfast import dualfast
from diffusion_jax.samplers.evodiff import evodiff
from diffusion_jax.samplers.first_hitting import first_hitting
from diffusion_jax.samplers.first_order import ddim, ddpm, euler
from diffusion_jax.samplers.fit_table import FitReport, fit_table
from diffusion_jax.samplers.gaussian_path import GaussianPath, gaussian_path
from diffusion_jax.samplers.heun import edm_heun, heun, midpoint
from diffusion_jax.samplers.interpolant import interpolant_euler, interpolant_heun
from diffusion_jax.samplers.k_diffusion import (
    dpm_2,
    dpm_2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    lms,
)
from diffusion_jax.samplers.linear import Form, Pinned, Rows, with_noise
from diffusion_jax.samplers.masked_ancestral import masked_ancestral
from diffusion_jax.samplers.model_statistics import ModelStatistics, model_statistics
from diffusion_jax.samplers.predictor_corrector import (
    euler_maruyama,
    predictor_corrector,
    reverse_diffusion,
)
from diffusion_jax.samplers.probability_flow import FlowInfo, decode, encode, log_prob, ode_solve
from diffusion_jax.samplers.saved_table import load_table, save_table
from diffusion_jax.samplers.scan import Sampler, StepInfo, sample
from diffusion_jax.samplers.time_grids import (
    align_your_steps,
    arctan,
    build_times,
    entries,
    karras,
    leading,
    log_snr,
    quadratic,
    shifted,
    trailing,
    uniform,
)
from diffusion_jax.samplers.transport import TransportMap, semi_discrete_transport
from diffusion_jax.samplers.unipc import unipc

__all__ = [
    "FitReport",
    "FlowInfo",
    "Form",
    "GaussianPath",
    "ModelStatistics",
    "Pinned",
    "Rows",
    "Sampler",
    "StepInfo",
    "TransportMap",
    "align_your_steps",
    "annealed_langevin",
    "arctan",
    "bfn",
    "bfn_continuous",
    "bfn_solver",
    "bfn_solver_discrete",
    "bridge_euler",
    "bridge_ode",
    "bridge_tts",
    "bridge_tts_ode",
    "build_sampler",
    "build_times",
    "consistency_bridge",
    "dbim",
    "dbim_encode",
    "ddbm_heun",
    "ddim",
    "ddpm",
    "decode",
    "deis",
    "dpm_2",
    "dpm_2_ancestral",
    "dpm_ot",
    "dpm_solver",
    "dpm_solver_pp",
    "dpm_solver_v3",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dualfast",
    "edm_heun",
    "encode",
    "entries",
    "euler",
    "euler_maruyama",
    "evodiff",
    "first_hitting",
    "fit_table",
    "gaussian_path",
    "heun",
    "i2sb",
    "interpolant_euler",
    "interpolant_heun",
    "interpolate_latents",
    "karras",
    "late_states",
    "leading",
    "lms",
    "load_table",
    "log_prob",
    "log_snr",
    "masked_ancestral",
    "midpoint",
    "model_statistics",
    "ode_solve",
    "official_flags",
    "predictor_corrector",
    "quadratic",
    "reverse_diffusion",
    "sample",
    "save_table",
    "sde_dpm_solver_pp",
    "semi_discrete_transport",
    "shifted",
    "singlestep_plan",
    "trailing",
    "transport_sampler",
    "uniform",
    "unipc",
    "with_noise",
]
