"""Fixed features of images without classes: colours, contrast, and energy by scale and direction.

Nothing is trained on labels. An image is brought into opponent colours (one luma and two colour
differences; other numbers of channels stay as they are) and on to coarser scales by blurring and
dropping every second pixel. At each scale four derivative filters (along x, along y, both diagonals)
give one feature each: log(FLOOR + root mean square response), so that a blur shows in the fine scales
and left-over noise too, whatever is drawn. With them go mean and log standard deviation of every
channel, and its means over the four quarters, which see the layout. Every feature is scaled to mean 0
and variance 1 on the training images.

Distances in these features compare only with the same training images, as `checksum` says.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.objectives.features import digest

FLOOR = 0.01
FORMAT = "filter-bank-1"

_CHUNK = 512
_OPPONENT = np.array([[0.299, 0.5, 0.5], [0.587, -0.5, 0.0], [0.114, 0.0, -0.5]], np.float32)


def _scales(shape: tuple[int, ...]) -> int:
    """Scales of an image [H, W, C]: the coarsest has at least 4 pixels a side, and there are at most 3."""
    return int(np.clip(np.log2(min(shape[:2]) / 4) + 1, 1, 3))


def feature_count(shape: tuple[int, ...]) -> int:
    """Number of features of images [H, W, C]."""
    return (4 * _scales(shape) + 6) * shape[2]


def raw_features(images) -> jax.Array:
    """Features before they are scaled.

    Args:
      images: float32 [B, H, W, C], H and W at least 4.

    Returns:
      float32 [B, F], F = (4 S + 6) C with S = 1, 2 or 3 the number of scales (3 from 16 x 16 pixels).
    """
    if images.shape[-1] == 3:
        images = images @ _OPPONENT
    batch, height, width, _ = images.shape
    parts = [images.mean((1, 2)), jnp.log(FLOOR + images.std((1, 2)))]
    halves = [(slice(0, side // 2), slice(side // 2, side)) for side in (height, width)]
    parts += [images[:, y, x].mean((1, 2)) for y in halves[0] for x in halves[1]]
    for scale in range(_scales(images.shape[1:])):
        if scale:
            images = _blurred(images)[:, ::2, ::2]
        a, b = images[:, :-1, :-1], images[:, :-1, 1:]
        c, d = images[:, 1:, :-1], images[:, 1:, 1:]
        for slope in ((b + d - a - c) / 2, (c + d - a - b) / 2, d - a, c - b):
            parts.append(jnp.log(FLOOR + jnp.sqrt(jnp.square(slope).mean((1, 2)))))
    return jnp.stack(parts, axis=1).reshape(batch, -1)


def _blurred(images):
    """Binomial blur 1 4 6 4 1 along both sides, the border repeated."""
    for axis in (1, 2):
        edges = [(2, 2) if i == axis else (0, 0) for i in range(4)]
        padded, size = jnp.pad(images, edges, mode="edge"), images.shape[axis]
        taps = (1, 4, 6, 4, 1)
        images = sum(
            tap / 16 * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i, tap in enumerate(taps)
        )
    return images


_raw = jax.jit(raw_features)


class FilterBank:
    """The features, scaled on training images.

    Args:
      train_images: [N, H, W, C], N at least 2, H and W at least 4.

    Attributes:
      shape: (H, W, C).
      checksum: 16 hexadecimal digits that name the feature space.

    Raises:
      ValueError: a shape that is no set of images, or values that are not finite.
    """

    def __init__(self, train_images):
        images = self._checked(train_images, None)
        if len(images) < 2:
            raise ValueError(f"need two training images or more, got {len(images)}")
        self.shape = images.shape[1:]
        raw = self._apply(images).astype(np.float64)
        # A feature that never moves would otherwise be blown up to variance one by its rounding errors.
        self._mean, self._std = raw.mean(0), np.maximum(raw.std(0), 1e-3)
        self.checksum = digest({FORMAT: np.array(self.shape), "m": self._mean, "s": self._std})

    @staticmethod
    def _checked(images, shape) -> np.ndarray:
        images = np.asarray(images, np.float32)
        fits = images.ndim == 4 and len(images) and min(images.shape[1:3]) >= 4
        if not fits or shape not in (None, images.shape[1:]):
            expected = "H and W at least 4" if shape is None else f"of shape {shape}"
            raise ValueError(f"takes images [B, H, W, C], {expected}; got {images.shape}")
        bad = np.count_nonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        if bad:
            raise ValueError(f"{bad} of {len(images)} images hold NaN or infinity")
        return images

    @staticmethod
    def _apply(images) -> np.ndarray:
        chunks = []
        for at in range(0, len(images), _CHUNK):
            part = images[at : at + _CHUNK]
            # One shape, one program; the last chunk is filled up with copies.
            rows = np.minimum(np.arange(min(_CHUNK, len(images))), len(part) - 1)
            chunks.append(np.asarray(_raw(part[rows]))[: len(part)])
        return np.concatenate(chunks)

    def features(self, images) -> np.ndarray:
        """Features float32 [B, F] of images [B, H, W, C].

        Raises:
          ValueError: another image shape, no images, or values that are not finite.
        """
        raw = self._apply(self._checked(images, self.shape))
        return ((raw - self._mean) / self._std).astype(np.float32)

    def outputs(self, images) -> dict[str, np.ndarray]:
        """{"features": ...}, as `Classifier.outputs` has them. Raises ValueError."""
        return {"features": self.features(images)}
