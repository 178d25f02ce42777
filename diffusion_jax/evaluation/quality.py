"""How good are these images? One bundle of figures, with a floor and a ceiling to read them by.

The figures live in the feature space of a classifier trained on the real training images
(`classifier.py`), or, where these have no classes, of a fixed bank of filters (`filter_bank.py`). None of them means anything alone: read them between the row of held-out real
images (`floor`) and the row of noise (`ceiling`), all with the same number of images; `compare`
sees to that. Noise is not the worst case: a sampler that has collapsed onto one class scores worse.
A row well *below* the floor is no triumph: it hints at copied training images, because the
classifier and the statistics come from these; `nearest_train` tells.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.evaluation import frechet
from diffusion_jax.evaluation.classifier import (
    Classifier,
    Settings,
    check_labels,
    load_or_train,
    train_classifier,
)
from diffusion_jax.evaluation.filter_bank import FilterBank
from diffusion_jax.evaluation.kernel import kernel_distance
from diffusion_jax.evaluation.neighbours import nearest_distance, precision_recall

# Precision and recall cost the square of the number of images; both depend on it, so it is fixed.
_MOST_NEIGHBOURS = 5000


def noise_images(
    key: jax.Array, count: int, shape: tuple[int, ...], *, value_range=(-1.0, 1.0)
) -> np.ndarray:
    """Standard normal noise clipped to the range, float32 [count, *shape]: the ceiling's images."""
    noise = jax.random.normal(key, (count, *shape))
    return np.asarray(jax.numpy.clip(noise, *value_range))


class ImageQuality:
    """Figures of merit for small images.

    Args:
      train_images: [N, H, W, C] in `value_range`; train the classifier and give the reference
        statistics. N must exceed the feature dimension (48 of the classifier, up to 54 of the filters).
      train_labels: integers [N]; None where there are no classes.
      key: typed key for the classifier; used once, not kept.
      value_range: samples are clipped to it before they are judged.
      cache: .npz file that keeps the classifier between runs (see `classifier.load_or_train`).
      settings: of the classifier.
      classes: number of classes; None is the largest label plus one.
      `cache`, `settings` and `classes` have no meaning without labels.

    Attributes:
      classifier: the `Classifier`, or the `FilterBank`.
      reference: `Moments` of the training images' features.

    Raises:
      ValueError: shapes, labels or values that do not fit; too few images.
    """

    def __init__(
        self,
        train_images,
        train_labels,
        key: jax.Array,
        *,
        value_range: tuple[float, float] = (-1.0, 1.0),
        cache: str | os.PathLike | None = None,
        settings: Settings | None = None,
        classes: int | None = None,
    ):
        if not value_range[1] > value_range[0]:
            raise ValueError(f"value_range must be (low, high), got {value_range}")
        train = (train_images, train_labels, key)
        options = {"classes": classes, "settings": settings}
        self.classifier: Classifier | FilterBank
        if train_labels is None:
            self.classifier = FilterBank(train_images)
        elif cache is None:
            self.classifier = train_classifier(*train, **options)
        else:
            self.classifier = load_or_train(cache, *train, **options)
        self.value_range = value_range
        self._images = np.asarray(train_images, np.float32)
        outputs = self.classifier.outputs(self._images)
        self._features = outputs["features"]
        self._classes = self._texture = None
        if train_labels is not None:
            self._classes = np.bincount(np.asarray(train_labels), minlength=self.classifier.classes)
            self._texture = frechet.moments(outputs["texture"])
        self.reference = frechet.moments(self._features)
        size = self.reference.mean.size
        if self.reference.count <= size:
            raise ValueError(f"need more than {size} training images, got {self.reference.count}")

    def evaluate(self, images, labels=None) -> dict[str, Any]:
        """Judges images, and with labels also whether they show what was asked for.

        Args:
          images: [B, H, W, C], B above the feature dimension; clipped to `value_range`.
          labels: integers [B], the classes the images were conditioned on; None if unconditional, or
            where there are no classes.

        Returns:
          Python numbers and strings, ready for JSON:
          - "frechet": Frechet distance to the training images in `features` (biased by ~1/B);
          - "frechet_extrapolated": the same without the leading bias, None if B < 2 (F + 1);
          - "texture": Frechet distance in `texture` (left-over noise, blur), None without classes;
          - "kernel_distance": unbiased kernel distance in `features`;
          - "precision", "recall": nearest-neighbour estimates in `features`, against the first 5,000
            training images;
          - "accuracy": share of images classified as their label, None without labels;
          - "class_tv": total variation between predicted classes and the training set's classes, None
            without classes;
          - "nearest_train": mean RMS pixel distance to the nearest training image;
          - "clipped": share of pixel values outside `value_range` by more than 1% of its width;
          - "n_real", "n_fake", "features" (dimension), "feature_checksum".

        Raises:
          ValueError: wrong shapes or labels, too few images, or values that are not finite.
        """
        images = np.asarray(images, np.float32)
        # Clipping hides infinities from the classifier's own check.
        if np.isinf(images).any():
            raise ValueError(f"{np.isinf(images).sum()} pixel values are infinite")
        low, high = self.value_range
        slack = 1e-2 * (high - low)
        clipped = np.clip(images, low, high)
        outputs = self.classifier.outputs(clipped)
        features = outputs["features"]
        count, size = features.shape
        precision, recall = precision_recall(self._features[:_MOST_NEIGHBOURS], features)
        extrapolated = None
        if count >= 2 * (size + 1):
            extrapolated = frechet.frechet_extrapolated(self.reference, features)
        return {
            "frechet": frechet.frechet_distance(self.reference, frechet.moments(features)),
            "frechet_extrapolated": extrapolated,
            "kernel_distance": kernel_distance(self._features, features),
            "precision": precision,
            "recall": recall,
            **self._judge_classes(outputs, labels),
            "nearest_train": float(nearest_distance(clipped, self._images).mean()),
            "clipped": float(np.mean((images < low - slack) | (images > high + slack))),
            "n_real": self.reference.count,
            "n_fake": count,
            "features": size,
            "feature_checksum": self.classifier.checksum,
        }

    def _judge_classes(self, outputs, labels) -> dict[str, float | None]:
        """The figures that need classes."""
        if self._classes is None:
            if labels is not None:
                raise ValueError("labels were given, but the training images have no classes")
            return {"texture": None, "accuracy": None, "class_tv": None}
        predicted = outputs["logits"].argmax(axis=-1)
        if labels is not None:
            labels = check_labels(labels, len(predicted))
        shares = np.bincount(predicted, minlength=len(self._classes)) / len(predicted)
        return {
            "texture": frechet.frechet_distance(self._texture, frechet.moments(outputs["texture"])),
            "accuracy": None if labels is None else float(np.mean(predicted == labels)),
            "class_tv": float(0.5 * np.abs(shares - self._classes / self._classes.sum()).sum()),
        }

    def distances(self, images) -> dict[str, float]:
        """The Frechet distances "frechet" and, with classes, "texture" of `evaluate` alone: much cheaper.

        Raises:
          ValueError: wrong shapes, too few images, or values that are not finite.
        """
        clipped = np.clip(np.asarray(images, np.float32), *self.value_range)
        outputs = self.classifier.outputs(clipped)
        reference = {"frechet": self.reference, "texture": self._texture}
        layers = {"frechet": "features", "texture": "texture"}
        return {
            name: frechet.frechet_distance(moments, frechet.moments(outputs[layers[name]]))
            for name, moments in reference.items()
            if moments is not None
        }

    def floor(self, images, labels=None) -> dict[str, Any]:
        """`evaluate` on held-out real images: the best a sampler can honestly reach.

        Raises:
          ValueError: as `evaluate`, or images taken from the training images.
        """
        result = self.evaluate(images, labels)
        if result["nearest_train"] < 1e-6:
            raise ValueError("these are the training images; a floor needs held-out ones")
        return result

    def ceiling(self, noise) -> dict[str, Any]:
        """`evaluate` on noise such as `noise_images` draws: what a sampler that does nothing gets.

        Raises:
          ValueError: as `evaluate`.
        """
        return self.evaluate(noise)

    def compare(
        self, sets: Mapping[str, tuple[Any, Any]], *, size: int | None = None, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Rows of a table in which every set has the same number of images.

        Args:
          sets: name -> (images, labels or None).
          size: images per set; None is the smallest set. Larger sets are thinned at random.
          seed: of the thinning.

        Returns:
          One dict per set: "name" and the entries of `evaluate`.

        Raises:
          ValueError: no sets, a size larger than a set, or as `evaluate`.
        """
        if not sets:
            raise ValueError("compare needs at least one set of images")
        counts = {name: len(images) for name, (images, _) in sets.items()}
        size = min(counts.values()) if size is None else size
        short = [name for name, count in counts.items() if count < size]
        if short:
            raise ValueError(f"{short[0]!r} has {counts[short[0]]} images, {size} were asked for")
        rows = []
        for name, (images, labels) in sets.items():
            picked = np.sort(np.random.default_rng(seed).permutation(counts[name])[:size])
            asked = None if labels is None else np.asarray(labels)[picked]
            rows.append({"name": name, **self.evaluate(np.asarray(images)[picked], asked)})
        return rows
