"""The Inception-v3 of FID: torchvision's names, with the weights of December 2015.

The file is the one that pytorch-fid loads (`pt_inception-2015-12-05-6726825d.pth`); torchvision's own
Inception-v3 is another network under the same names and is refused, for it has 1000 classes.
"""

import os
import pathlib

import jax
import numpy as np

from diffusion_jax.array_files import read_arrays, write_arrays
from diffusion_jax.interop.files import read_state, without_prefix, write_state
from diffusion_jax.interop.mapping import (
    CONV,
    LINEAR,
    Leaf,
    Weights,
    export_state,
    import_state,
)
from diffusion_jax.networks.inception import InceptionV3
from diffusion_jax.registry import register

_CONVERTED = "diffusion_jax inception weights 1"
_THEIRS = {
    "kernel": (".conv.weight", CONV),
    "scale": (".bn.weight", None),
    "bias": (".bn.bias", None),
    "mean": (".bn.running_mean", None),
    "var": (".bn.running_var", None),
}


def abstract(module: InceptionV3 | None = None):
    """Shapes of the parameters."""
    module = module or InceptionV3()
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    return jax.eval_shape(module.init, jax.random.key(0), image)["params"]


@register("weights", "inception")
def inception(module: InceptionV3 | None = None) -> Weights:
    """The layout of pytorch-fid's state dict."""
    leaves = []
    for path, _ in jax.tree_util.tree_leaves_with_path(abstract(module)):
        *layer, name = (key.key for key in path)
        ours, theirs = "/".join([*layer, name]), ".".join(layer)
        if layer == ["fc"]:
            kind = {"kind": LINEAR} if name == "kernel" else {}
            leaves.append(Leaf(ours, "fc.weight" if name == "kernel" else "fc.bias", **kind))
            continue
        suffix, kind = _THEIRS[name]
        leaves.append(Leaf(ours, theirs + suffix, *([kind] if kind else [])))
    return Weights(tuple(leaves), ignored=(r".*\.bn\.num_batches_tracked",))


def read_inception(path: str | os.PathLike, *, progress: bool = False) -> dict:
    """The parameters in a file: pytorch-fid's `.pth`, the same as `.safetensors`, or a converted `.npz`.

    Raises:
      ValueError: no such file, a damaged one, one with code in it, or weights of another network
        (`files.FileError`, `mapping.WeightsError`).
      ImportError: a `.pth` file, and torch is missing.
    """
    path = pathlib.Path(path).expanduser()
    if path.suffix == ".npz":
        state = read_arrays(path, _CONVERTED, "converted Inception weights", lambda _, a: a)
    else:
        state = read_state(path, progress=progress)
    weights = inception()
    inside, outside = without_prefix(state, weights.names())
    return import_state(weights, state if outside else inside, abstract())


def write_inception(path: str | os.PathLike, params: dict) -> pathlib.Path:
    """Writes parameters as `.npz`, or `.safetensors` under pytorch-fid's names, which need no torch."""
    path = pathlib.Path(path).expanduser()
    state = export_state(inception(), params)
    if path.suffix == ".npz":
        return write_arrays(path, _CONVERTED, {}, state)
    return write_state(path, state)
