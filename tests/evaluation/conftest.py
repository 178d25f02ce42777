"""Digits and one trained judge, shared by the tests of this folder."""

from typing import NamedTuple

import jax
import numpy as np
import pytest


class Digits(NamedTuple):
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@pytest.fixture(scope="session")
def judged_digits() -> Digits:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images = (pixels.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)[order]
    labels = labels.astype(np.int32)[order]
    return Digits(images[300:], labels[300:], images[:300], labels[:300])


@pytest.fixture(scope="session")
def quality(judged_digits):
    from diffusion_jax.evaluation.quality import ImageQuality

    return ImageQuality(judged_digits.train_images, judged_digits.train_labels, jax.random.key(0))
