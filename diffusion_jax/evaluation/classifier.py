"""A small image classifier whose layers serve as feature space for distribution distances.

Two 3x3 convolutions, one hidden layer, one linear read-out; plain functions on a pytree. It is
trained on the real images at hand, in seconds, so no weights have to be fetched and the features fit
any small image set. Two feature spaces:

- `features`: the hidden layer before its nonlinearity. Sees what is drawn: class, strokes, shape.
- `texture`: root-mean-square response of each filter of the first layer. Sees how it is drawn: left-
  over noise, blur; blind to the arrangement.

Both are scaled by their statistics on the training images (each hidden unit to variance 1, the
texture as a whole to mean variance 1), so distances do not depend on the scale of the weights.
They do depend on the weights: distances compare only under one checksum. The same key, data and
machine give the same bits; another machine may round differently and then has another checksum.

The network itself is in `objectives.features`, where losses can look through it too.
"""

import io
import json
import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_jax.evaluation.files import write_atomically
from diffusion_jax.objectives.features import (
    FORMAT,
    Params,
    apply,
    digest,
    flatten,
    layers,
    read,
    read_out,
    strides,
)

_CHUNK = 256
_LABEL_SMOOTHING = 0.05
_WEIGHT_DECAY = 1e-3


@dataclass(frozen=True)
class Settings:
    """Size and training of the classifier.

    Attributes:
      features: dimension of the hidden layer; keep it well below the number of samples to judge.
      channels: of the two convolutions; `texture` has the first's dimension.
      steps: of AdamW with a cosine schedule.
      batch_size: images per step (at most all of them).
      learning_rate: at the first step.
    """

    features: int = 48
    channels: tuple[int, int] = (24, 48)
    steps: int = 450
    batch_size: int = 100
    learning_rate: float = 3e-3

    def __post_init__(self):
        sizes = (self.features, *self.channels, self.steps, self.batch_size)
        if len(self.channels) != 2 or min(sizes) < 1 or not self.learning_rate > 0:
            raise ValueError(f"sizes must be positive and channels a pair, got {self}")


def _init(key: jax.Array, shape: tuple[int, int, int], classes: int, settings: Settings) -> Params:
    height, width, colours = shape
    shrink = math.prod(strides(height, width))
    first, second = settings.channels
    cells = -(-height // shrink) * -(-width // shrink)
    sizes = {
        "conv1": (9 * colours, first),
        "conv2": (9 * first, second),
        "hidden": (cells * second, settings.features),
        "head": (settings.features, classes),
    }
    return {
        name: {
            "kernel": jax.random.normal(layer_key, size, jnp.float32) * math.sqrt(2.0 / size[0]),
            "bias": jnp.zeros(size[1], jnp.float32),
        }
        for layer_key, (name, size) in zip(jax.random.split(key, len(sizes)), sizes.items())
    }


@partial(jax.jit, static_argnames=("classes", "settings"))
def _train(images, labels, key, *, classes: int, settings: Settings) -> Params:
    count = len(images)
    batch = min(settings.batch_size, count)
    per_epoch = count // batch
    epochs = -(-settings.steps // per_epoch)
    init_key, order_key = jax.random.split(key)
    params = _init(init_key, images.shape[1:], classes, settings)
    schedule = optax.cosine_decay_schedule(settings.learning_rate, settings.steps)
    optimiser = optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)
    shuffle = jax.vmap(lambda k: jax.random.permutation(k, count)[: per_epoch * batch])
    order = shuffle(jax.random.split(order_key, epochs)).reshape(-1, batch)[: settings.steps]

    def loss(params, x, y):
        logits = read_out(params, layers(params, x)[1])
        targets = optax.smooth_labels(
            jax.nn.one_hot(y, classes, dtype=jnp.float32), _LABEL_SMOOTHING
        )
        return jnp.mean(optax.softmax_cross_entropy(logits, targets))

    def step(carry, rows):
        params, state = carry
        gradient = jax.grad(loss)(params, images[rows], labels[rows])
        updates, state = optimiser.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimiser.init(params)), order)
    return params


_apply_jit = jax.jit(apply)


def _apply_all(params: Params, images: np.ndarray) -> dict[str, np.ndarray]:
    """`apply` on any number of images in chunks of one size, so that it compiles once."""
    parts = []
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK]
        padded = np.pad(chunk, ((0, _CHUNK - len(chunk)), (0, 0), (0, 0), (0, 0)))
        output = jax.device_get(_apply_jit(params, padded))
        parts.append({name: value[: len(chunk)] for name, value in output.items()})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _check_images(images, shape: tuple[int, ...] | None = None) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be a non-empty [B, H, W, C], got shape {images.shape}")
    if shape is not None and images.shape[1:] != shape:
        raise ValueError(f"the classifier takes images {shape}, got {images.shape[1:]}")
    images = images.astype(np.float32)
    bad = np.count_nonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if bad:
        raise ValueError(f"{bad} of {len(images)} images hold NaN or infinity")
    return images


def check_labels(labels, count: int) -> np.ndarray:
    """Labels as int32 [count].

    Raises:
      ValueError: not `count` integers, or a negative one.
    """
    labels = np.asarray(labels)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be {count} integers, got {labels.dtype} {labels.shape}")
    if labels.min() < 0:
        raise ValueError(f"labels must be 0 or more, got {labels.min()}")
    return labels.astype(np.int32)


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network; methods take any number of images and return NumPy arrays.

    Attributes:
      params: {"conv1", "conv2", "hidden", "head": {"kernel", "bias"}, "scale": {...}}, float32;
        for `apply` inside a compiled function.
      shape: (H, W, C) of its images.
      recipe: digest of what it was trained from (images, labels, key, settings).
    """

    params: Params
    shape: tuple[int, int, int]
    recipe: str = ""

    @property
    def checksum(self) -> str:
        """16 hexadecimal digits of the parameters' SHA-256; names the feature space."""
        return digest(flatten(self.params))

    @property
    def classes(self) -> int:
        """Number of classes K."""
        return self.params["head"]["bias"].shape[0]

    def outputs(self, images) -> dict[str, np.ndarray]:
        """All of {"features": [B, F], "texture": [B, T], "logits": [B, K]}, float32.

        Args:
          images: [B, H, W, C] in the range of the training images.

        Raises:
          ValueError: another image shape, no images, or values that are not finite.
        """
        return _apply_all(self.params, _check_images(images, self.shape))

    def features(self, images) -> np.ndarray:
        """Hidden layer, standardised on the training images, float32 [B, F]; see `outputs`."""
        return self.outputs(images)["features"]

    def texture(self, images) -> np.ndarray:
        """Strength of each first-layer filter, scaled, float32 [B, T]; see `outputs`."""
        return self.outputs(images)["texture"]

    def logits(self, images) -> np.ndarray:
        """Class scores, float32 [B, K]; see `outputs`."""
        return self.outputs(images)["logits"]

    def accuracy(self, images, labels) -> float:
        """Share of images whose largest logit is their label.

        Raises:
          ValueError: as `outputs`, or labels that are not B integers.
        """
        predicted = self.logits(images).argmax(axis=-1)
        return float(np.mean(predicted == check_labels(labels, len(predicted))))

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the parameters and their checksum as .npz, without pickle, atomically."""
        meta = {
            "format": FORMAT,
            "shape": self.shape,
            "recipe": self.recipe,
            "checksum": self.checksum,
        }
        buffer = io.BytesIO()
        np.savez(buffer, __meta__=np.array(json.dumps(meta)), **flatten(self.params))
        return write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Classifier":
        """Reads what `save` wrote.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not such a file, another format, or contents that miss their checksum.
        """
        params, meta = read(path)
        return cls(params, tuple(meta["shape"]), meta["recipe"])


def _recipe(images, labels, key, classes: int, settings: Settings) -> str:
    arrays = {
        "images": images,
        "labels": labels,
        "key": np.asarray(jax.random.key_data(key)),
        f"{FORMAT} {jax.random.key_impl(key)} {classes} {settings}": np.zeros(0),
    }
    return digest(arrays)


def _prepare(images, labels, key, classes: int | None):
    images = _check_images(images)
    labels = check_labels(labels, len(images))
    if not jnp.issubdtype(jnp.asarray(key).dtype, jax.dtypes.prng_key):
        raise ValueError("key must be a typed key: jax.random.key(seed)")
    classes = int(labels.max()) + 1 if classes is None else classes
    if classes < 2 or labels.max() >= classes or len(images) < 2:
        raise ValueError(
            f"need two images, two classes or more, and labels below classes={classes}; "
            f"got {len(images)} images and labels up to {labels.max()}"
        )
    return images, labels, classes


def train_classifier(
    images, labels, key: jax.Array, *, classes: int | None = None, settings: Settings | None = None
) -> Classifier:
    """Trains on real images: one compilation, one call, the same bits for the same key.

    Args:
      images: [N, H, W, C], any fixed range (this library: [-1, 1]).
      labels: integers [N] in 0 .. K-1.
      key: typed key; decides the initial weights and the order of the images.
      classes: K; None is the largest label plus one.
      settings: sizes and training; the default takes a few seconds for 1,500 digits of 8x8 on two
        cores, one of them training and the rest compilation.

    Raises:
      ValueError: shapes, labels or a key as described that are not so; values that are not finite.
    """
    images, labels, classes = _prepare(images, labels, key, classes)
    settings = settings or Settings()
    params = _train(images, labels, key, classes=classes, settings=settings)
    unscaled = {
        "hidden_mean": jnp.zeros(settings.features, jnp.float32),
        "hidden_std": jnp.ones(settings.features, jnp.float32),
        "texture_mean": jnp.zeros(settings.channels[0], jnp.float32),
        "texture_std": jnp.ones((), jnp.float32),
    }
    outputs = _apply_all({**params, "scale": unscaled}, images)
    hidden, texture = (outputs[name].astype(np.float64) for name in ("features", "texture"))
    # A unit that never moves would otherwise be blown up to variance one by its rounding errors.
    smallest = 1e-3 * np.sqrt(hidden.var(axis=0).mean()) + 1e-12
    scale = {
        "hidden_mean": hidden.mean(axis=0),
        "hidden_std": np.maximum(hidden.std(axis=0), smallest),
        "texture_mean": texture.mean(axis=0),
        "texture_std": np.sqrt(texture.var(axis=0).mean()) + 1e-12,
    }
    scale = {name: jnp.asarray(value, jnp.float32) for name, value in scale.items()}
    shape = tuple(int(size) for size in images.shape[1:])
    recipe = _recipe(images, labels, key, classes, settings)
    return Classifier({**params, "scale": scale}, shape, recipe)


def load_or_train(
    path: str | os.PathLike,
    images,
    labels,
    key: jax.Array,
    *,
    classes: int | None = None,
    settings: Settings | None = None,
) -> Classifier:
    """The classifier cached at `path` if it was trained from exactly these inputs, else a new one.

    A new one is written to `path`. Arguments as `train_classifier`.

    Raises:
      ValueError: as `train_classifier`, or a damaged file (see `Classifier.load`).
    """
    checked, checked_labels, count = _prepare(images, labels, key, classes)
    if Path(path).exists():
        cached = Classifier.load(path)
        if cached.recipe == _recipe(checked, checked_labels, key, count, settings or Settings()):
            return cached
    classifier = train_classifier(images, labels, key, classes=classes, settings=settings)
    classifier.save(path)
    return classifier
