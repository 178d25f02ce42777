"""Random changes of image batches: pure functions `(batch, words) -> batch`.

`words` uint64 [B] holds one random word per example, keyed by (seed, step, position in the global
batch), so an augmented batch is as reproducible as a plain one and the same on any number of hosts.
"image", "source" and "mask" of a pair are changed alike.
"""

import functools
from collections.abc import Callable, Mapping

import numpy as np

from diffusion_jax.data import randomness
from diffusion_jax.registry import closest

Augmentation = Callable[[dict[str, np.ndarray], np.ndarray], dict[str, np.ndarray]]


def _each_image(batch: dict[str, np.ndarray], change: Callable) -> dict[str, np.ndarray]:
    return {k: change(v) if k in ("image", "source", "mask") else v for k, v in batch.items()}


def flip(batch: dict[str, np.ndarray], words: np.ndarray) -> dict[str, np.ndarray]:
    """Mirrors every image left to right with probability one half. Images are [B, H, W, C]."""
    mirrored = randomness.uniforms(words, 1)[:, :, None, None] < 0.5
    return _each_image(batch, lambda x: np.where(mirrored, x[:, :, ::-1], x))


def shift(
    batch: dict[str, np.ndarray], words: np.ndarray, pixels: int = 1
) -> dict[str, np.ndarray]:
    """Moves every image by up to `pixels` along both axes; the border is repeated."""
    steps = np.floor(randomness.uniforms(words, 2) * (2 * pixels + 1)).astype(np.int64) - pixels

    def change(x: np.ndarray) -> np.ndarray:
        height, width = x.shape[1:3]
        y = np.clip(np.arange(height) + steps[:, :1], 0, height - 1)
        z = np.clip(np.arange(width) + steps[:, 1:], 0, width - 1)
        return x[np.arange(len(x))[:, None, None], y[:, :, None], z[:, None, :]]

    return _each_image(batch, change)


AUGMENTATIONS: Mapping[str, Augmentation] = {
    "flip": flip,
    "shift1": shift,
    "shift2": functools.partial(shift, pixels=2),
}


def compose(augment) -> Augmentation | None:
    """One augmentation from None, a name, a function, or a sequence of names and functions.

    Each member gets random words of its own.

    Raises:
      ValueError: an unknown name.
    """
    if augment is None:
        return None
    members = [augment] if isinstance(augment, str) or callable(augment) else list(augment)
    functions = []
    for member in members:
        if not callable(member) and member not in AUGMENTATIONS:
            raise ValueError(f"unknown augmentation {member!r}{closest(member, AUGMENTATIONS)}")
        functions.append(member if callable(member) else AUGMENTATIONS[member])

    def apply(batch: dict[str, np.ndarray], words: np.ndarray) -> dict[str, np.ndarray]:
        for place, function in enumerate(functions):
            batch = function(batch, randomness.hash_rows(words, place))
        return batch

    return apply
