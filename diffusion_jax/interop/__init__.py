"""Official weights: published PyTorch state dicts to our parameters and back.

`mapping` says how two layouts differ; there is one module for each network that has official weights.
`python -m diffusion_jax.interop.import_torch` makes a run folder of a file.
"""

from diffusion_jax.interop import (
    adm_unet,
    ddit,
    dit,
    edm2_unet,
    gpt2,
    inception,
    song_unet,
    uvit,
)
from diffusion_jax.interop.mapping import (
    CONV,
    LINEAR,
    SAME,
    Kind,
    Leaf,
    Weights,
    WeightsError,
    export_state,
    import_state,
    linear,
    stacked,
    transposed,
)

__all__ = [
    "CONV",
    "LINEAR",
    "SAME",
    "Kind",
    "Leaf",
    "Weights",
    "WeightsError",
    "adm_unet",
    "ddit",
    "dit",
    "edm2_unet",
    "export_state",
    "gpt2",
    "import_state",
    "inception",
    "linear",
    "song_unet",
    "stacked",
    "transposed",
    "uvit",
]
