"""Official weights: published PyTorch state dicts to our parameters and back.

`mapping` says how two layouts differ; there is one module for each network that has official weights.
`python -m diffusion_jax.interop.import_torch` makes a run folder of a file.
"""

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
    "export_state",
    "import_state",
    "linear",
    "stacked",
    "transposed",
]
