"""What losses and distances look through: the pixels themselves, or layers of a small image classifier.

The classifier is two 3x3 convolutions, one hidden layer and one linear read-out, as pure functions on a
pytree; `evaluation.classifier` trains it on the real images at hand and writes the file that `read`
reads. Its two feature spaces are described there: "features" (the hidden layer) and "texture".

Convolutions are written as matrix products of shifted slices: XLA's CPU convolutions inside a scan
run more than ten times slower than these.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.registry import check_choice

Params = dict[str, dict[str, jax.Array]]

FORMAT = 1
LAYERS = ("features", "texture")


def affine(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """`x kernel + bias` along the last axis."""
    # Full precision: accelerators round the factors otherwise, and the distances move with it.
    y = jnp.dot(x, layer["kernel"], precision=jax.lax.Precision.HIGHEST)
    return y + layer["bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def convolve(layer: Mapping[str, jax.Array], x: jax.Array, stride: int) -> jax.Array:
    """3x3 convolution with zero padding, [B, H, W, C] -> [B, ceil(H/stride), ceil(W/stride), O]."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    slices = [
        padded[:, i : i + height : stride, j : j + width : stride]
        for i in range(3)
        for j in range(3)
    ]
    return affine(layer, jnp.concatenate(slices, axis=-1))


def strides(height: int, width: int) -> tuple[int, int]:
    """Strides of the two convolutions for images of this size."""
    # Larger images are halved twice, so the hidden layer's weights stay of moderate size.
    return (1, 2) if min(height, width) < 16 else (2, 2)


def layers(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(texture, hidden), unscaled."""
    stride1, stride2 = strides(*x.shape[1:3])
    first = convolve(params["conv1"], x, stride1)
    texture = jnp.sqrt(jnp.mean(jnp.square(first), axis=(1, 2)) + 1e-12)
    second = jax.nn.gelu(convolve(params["conv2"], jax.nn.gelu(first), stride2))
    return texture, affine(params["hidden"], second.reshape(len(x), -1))


def read_out(params: Params, hidden: jax.Array) -> jax.Array:
    """Class scores [B, K] of the unscaled hidden layer."""
    return affine(params["head"], jax.nn.gelu(hidden))


def apply(params: Params, x: jax.Array) -> dict[str, jax.Array]:
    """The classifier as a pure function, for `jit`, `grad` and `vmap`.

    Args:
      params: of a trained classifier, with its group "scale".
      x: float32 [B, H, W, C], the shape and range it was trained on.

    Returns:
      {"features": [B, F], "texture": [B, T], "logits": [B, K]}, float32.
    """
    texture, hidden = layers(params, x)
    scale = params["scale"]
    return {
        "features": (hidden - scale["hidden_mean"][None]) / scale["hidden_std"][None],
        "texture": (texture - scale["texture_mean"][None]) / scale["texture_std"],
        "logits": read_out(params, hidden),
    }


def flatten(params: Params) -> dict[str, np.ndarray]:
    """Leaves by "group/name", as they stand in a file."""
    return {
        f"{group}/{name}": np.asarray(value)
        for group, members in sorted(params.items())
        for name, value in sorted(members.items())
    }


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """16 hexadecimal digits of the SHA-256 of named arrays."""
    sha = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        sha.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()[:16]


def read(path: str | os.PathLike) -> tuple[Params, dict[str, Any]]:
    """`(params, meta)` of a saved classifier; meta has `shape`, `recipe` and `checksum`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not such a file, another format, or contents that miss their checksum.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta: dict[str, Any] = json.loads(str(arrays.pop("__meta__")))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a saved classifier: {error}") from error
    if meta.get("format") != FORMAT:
        raise ValueError(f"{path} has format {meta.get('format')}, this code reads {FORMAT}")
    if digest(arrays) != meta["checksum"]:
        raise ValueError(f"{path} is damaged: its contents miss the checksum; delete the file")
    params: Params = {}
    for name, value in arrays.items():
        group, leaf = name.split("/")
        params.setdefault(group, {})[leaf] = jnp.asarray(value)
    return params, meta


class Features(NamedTuple):
    """A feature map: `apply(params, x) -> [B, D]`, where `load()` gives the parameters (None: it has none).

    Attributes:
      apply: a pure function of the parameters and of x `[B, ...]`.
      load: reads the parameters; called once when a run begins.
    """

    apply: Callable[[Any, jax.Array], jax.Array]
    load: Callable[[], Any]


def pixels() -> Features:
    """The data as vectors `[B, D]`; any shape."""
    return Features(lambda params, x: x.reshape(x.shape[0], -1), lambda: None)


def from_classifier(
    path: str | os.PathLike, layer: str = "features", shape: tuple[int, ...] | None = None
) -> Features:
    """A layer of a saved classifier; the file is read by `load` alone.

    Args:
      path: what `evaluation.classifier.Classifier.save` wrote.
      layer: "features" or "texture".
      shape: of the images that it will be given, checked by `load`.
    Raises:
      ValueError: an unknown layer; in `load`, a file that cannot be used or is missing.
    """
    check_choice("feature layer", layer, LAYERS)

    def load():
        try:
            params, meta = read(path)
        except FileNotFoundError as error:
            raise ValueError(
                f"no feature extractor {str(path)!r}; write one with evaluation.load_or_train"
            ) from error
        if shape is not None and tuple(meta["shape"]) != tuple(shape):
            raise ValueError(
                f"{path} sees images {tuple(meta['shape'])}, the data are {tuple(shape)}"
            )
        return params

    return Features(functools.partial(_layer_of, layer), load)


def _layer_of(layer, params, x):
    if params is None:
        raise ValueError(
            "a classifier's features need its parameters: the method's state (init_state)"
        )
    return apply(params, x)[layer]


def build_features(
    name: str | Features, layer: str = "features", shape: tuple[int, ...] | None = None
) -> Features:
    """A feature map from what a config says.

    Args:
      name: "pixels", the path of a saved classifier (`.npz`), or `Features` of one's own.
      layer, shape: of `from_classifier`.
    Raises:
      ValueError: none of these.
    """
    if isinstance(name, Features):
        return name
    if name == "pixels":
        return pixels()
    if not str(name).endswith(".npz"):
        raise ValueError(f"features are 'pixels' or the .npz file of a classifier, got {name!r}")
    return from_classifier(name, layer, shape)
