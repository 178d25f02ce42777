"""How to walk back: solvers as tables, and the one scan that runs them."""

from diffusion_jax.samplers.bayesian_flow import bfn, bfn_continuous
from diffusion_jax.samplers.bfn_solver import bfn_solver, bfn_solver_discrete
from diffusion_jax.samplers.block_decoding import (
    block_decoding,
    left_to_right,
    semi_autoregressive,
)
from diffusion_jax.samplers.bridge_ancestral import bridge_tts, bridge_tts_ode, i2sb
from diffusion_jax.samplers.bridge_euler import bridge_euler, bridge_ode
from diffusion_jax.samplers.bridge_latent import dbim_encode, interpolate_latents
from diffusion_jax.samplers.build import build_sampler
from diffusion_jax.samplers.chain_steps import Prompt
from diffusion_jax.samplers.confidence import confidence, llada, maskgit, top_k_margin
from diffusion_jax.samplers.consistency import consistency_bridge
from diffusion_jax.samplers.ctmc import (
    discrete_ancestral,
    discrete_euler,
    score_analytic,
    score_euler,
    tau_leaping,
)
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
from diffusion_jax.samplers.fit_lsd import LSDReport, fit_lsd
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
from diffusion_jax.samplers.lsd import LearnedSteps, load_lsd, lsd, save_lsd, sequence_entropy
from diffusion_jax.samplers.masked_ancestral import expected_nfe, masked_ancestral, radd
from diffusion_jax.samplers.model_statistics import ModelStatistics, model_statistics
from diffusion_jax.samplers.predictor_corrector import (
    euler_maruyama,
    predictor_corrector,
    reverse_diffusion,
)
from diffusion_jax.samplers.probability_flow import FlowInfo, decode, encode, log_prob, ode_solve
from diffusion_jax.samplers.remasking import remasking_probs, remdm
from diffusion_jax.samplers.reward_guided import RewardCalls, reward_calls, reward_guided
from diffusion_jax.samplers.saved_table import load_table, save_table
from diffusion_jax.samplers.scan import Sampler, StepInfo, sample
from diffusion_jax.samplers.state_masking import state_masked_ancestral
from diffusion_jax.samplers.time_grids import (
    align_your_steps,
    arctan,
    build_times,
    cosine,
    entries,
    karras,
    leading,
    log_snr,
    quadratic,
    shifted,
    trailing,
    uniform,
)
from diffusion_jax.samplers.token_states import CountedCalls
from diffusion_jax.samplers.transport import TransportMap, semi_discrete_transport
from diffusion_jax.samplers.unipc import unipc

__all__ = [
    "CountedCalls",
    "FitReport",
    "FlowInfo",
    "Form",
    "GaussianPath",
    "LSDReport",
    "LearnedSteps",
    "ModelStatistics",
    "Pinned",
    "Prompt",
    "RewardCalls",
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
    "block_decoding",
    "bridge_euler",
    "bridge_ode",
    "bridge_tts",
    "bridge_tts_ode",
    "build_sampler",
    "build_times",
    "confidence",
    "consistency_bridge",
    "cosine",
    "dbim",
    "dbim_encode",
    "ddbm_heun",
    "ddim",
    "ddpm",
    "decode",
    "deis",
    "discrete_ancestral",
    "discrete_euler",
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
    "expected_nfe",
    "first_hitting",
    "fit_lsd",
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
    "left_to_right",
    "llada",
    "lms",
    "load_lsd",
    "load_table",
    "log_prob",
    "log_snr",
    "lsd",
    "masked_ancestral",
    "maskgit",
    "midpoint",
    "model_statistics",
    "ode_solve",
    "official_flags",
    "predictor_corrector",
    "quadratic",
    "radd",
    "remasking_probs",
    "remdm",
    "reverse_diffusion",
    "reward_calls",
    "reward_guided",
    "sample",
    "save_lsd",
    "save_table",
    "score_analytic",
    "score_euler",
    "sde_dpm_solver_pp",
    "semi_autoregressive",
    "semi_discrete_transport",
    "sequence_entropy",
    "shifted",
    "singlestep_plan",
    "state_masked_ancestral",
    "tau_leaping",
    "top_k_margin",
    "trailing",
    "transport_sampler",
    "uniform",
    "unipc",
    "with_noise",
]
