"""Score, bridge and discrete diffusion models in JAX.

    import diffusion_jax as dj
    process = dj.processes.VP()
    sampler = dj.samplers.dpm_solver_pp(process, num_steps=10, order=2)
    x = dj.sample(sampler, denoise, key, x_init)        # denoise(x, t) -> x0_hat

Subpackages load on first use.
"""

import importlib

__version__ = "0.1.0"

_MODULES = (
    "data",
    "denoisers",
    "evaluation",
    "guidance",
    "methods",
    "networks",
    "numerics",
    "objectives",
    "oracles",
    "processes",
    "registry",
    "samplers",
    "training",
)
_NAMES = {
    "Denoiser": "diffusion_jax.denoisers",
    "Sampler": "diffusion_jax.samplers",
    "sample": "diffusion_jax.samplers",
}

__all__ = [*_MODULES, *_NAMES, "__version__"]


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"diffusion_jax.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'diffusion_jax' has no attribute {name!r}")


def __dir__():
    return __all__
