"""The 1,797 handwritten digits, 8 x 8 pixels of 17 grey levels, that scikit-learn carries.

The embedded default: no download, loads in a moment, trains on two CPU cores. Source: UCI "Optical
Recognition of Handwritten Digits" (Alpaydin, Kaynak 1998), its test part, as bundled by scikit-learn
(`sklearn.datasets.load_digits`). It has no official split; ours is fixed: 300 test digits, stratified.
"""

import numpy as np

from diffusion_jax.data.source import (
    ArraySource,
    DataSpec,
    Element,
    Source,
    check_split,
    split_rows,
)
from diffusion_jax.registry import register

TEST_COUNT = 300
LEVELS = 17

_CLASSES = tuple(str(digit) for digit in range(10))


def _load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Levels uint8 [N, 8, 8, 1] in 0..16 and labels int32 [N]."""
    check_split(split)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data set 'digits' needs: pip install scikit-learn") from error
    pixels, labels = load_digits(return_X_y=True)
    rows = split_rows(len(labels), split, TEST_COUNT, labels)
    return pixels[rows].astype(np.uint8).reshape(-1, 8, 8, 1), labels[rows].astype(np.int32)


@register("data", "digits", kinds=("image",))
def digits(split: str = "train") -> Source:
    """Images float32 [8, 8, 1] in [-1, 1] (level / 8 - 1) and labels.

    Args:
      split: "train" (1,497), "test" (300) or "all".

    Raises:
      ValueError: an unknown split. ImportError: scikit-learn is missing.
    """
    levels, labels = _load(split)
    spec = DataSpec(
        kind="image",
        elements={"image": Element((8, 8, 1), "float32"), "label": Element((), "int32")},
        num_classes=10,
        class_names=_CLASSES,
        show="image",
    )
    return ArraySource({"image": levels.astype(np.float32) / 8 - 1, "label": labels}, spec)


@register("data", "digits_tokens", kinds=("tokens",))
def digits_tokens(split: str = "train") -> Source:
    """The same digits as 64 tokens, the grey levels 0..16 in row-major order (V = 17), and labels.

    Args:
      split: "train" (1,497), "test" (300) or "all"; the same rows as `digits`.

    Raises:
      ValueError: an unknown split. ImportError: scikit-learn is missing.
    """
    levels, labels = _load(split)
    spec = DataSpec(
        kind="tokens",
        elements={"tokens": Element((64,), "int32"), "label": Element((), "int32")},
        num_classes=10,
        vocab_size=LEVELS,
        class_names=_CLASSES,
        grid=(8, 8, 1),
        show="pixels",
    )
    return ArraySource({"tokens": levels.reshape(-1, 64).astype(np.int32), "label": labels}, spec)
