"""Statistics of image features in one pass over any number of images, and the figures made of them.

What is kept of N images is: the mean and covariance of each kind of features, in float64 (`frechet`);
sums of class probabilities for the Inception score; and the pooled features of a random part of the
images, for the figures that need pairs. Which images these are, and into which part of the score an
image falls, is a random order of the N by a seed: it depends neither on batches nor on processes, and an
order of the images by class does no harm.

  FID              Frechet distance of "pool"          arXiv 1706.08500
  sFID             Frechet distance of "spatial"       arXiv 2103.03841
  KID              kernel distance of "pool"           arXiv 1801.01401
  precision, recall  nearest neighbours in "pool"      arXiv 1904.06991
  Inception score  exp(mean of KL(p(y|x) | p(y)))      arXiv 1606.03498
"""

import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.array_files import read_arrays, write_arrays
from diffusion_jax.evaluation import frechet
from diffusion_jax.evaluation.kernel import kernel_distance, kernel_distance_subsets
from diffusion_jax.evaluation.neighbours import precision_recall

KINDS = ("pool", "spatial")
_PART = "diffusion_jax part of feature statistics 1"


class Scores(NamedTuple):
    """Sums for the Inception score, one row for each of its parts.

    Attributes:
      count: int [S], images.
      negentropy: [S], sums of sum_y p(y|x) log p(y|x).
      classes: [S, K], sums of p(y|x).
    """

    count: np.ndarray
    negentropy: np.ndarray
    classes: np.ndarray

    def value(self) -> tuple[float, float]:
        """The Inception score: mean and standard deviation over the parts."""
        used = self.count > 0
        count, classes = self.count[used], self.classes[used]
        mean = classes / count[:, None]
        marginal = np.sum(mean * np.log(np.where(mean > 0, mean, 1.0)), axis=1)
        scores = np.exp(self.negentropy[used] / count - marginal)
        return float(scores.mean()), float(scores.std())


class FeatureStatistics(NamedTuple):
    """What is kept of a set of images.

    Attributes:
      moments: name of the features -> `frechet.Moments`.
      scores: for the Inception score, None where the features have no "unbiased" logits.
      kept: "pool" of a random part of the images, float32 [n, D].
    """

    moments: Mapping[str, frechet.Moments]
    scores: Scores | None
    kept: np.ndarray

    @property
    def count(self) -> int:
        """Number of images."""
        return next(iter(self.moments.values())).count


class Plan(NamedTuple):
    """Which images are kept and which part of the score each is in; see `plan`."""

    kept: np.ndarray
    part: np.ndarray


def plan(count: int, *, keep: int = 10_000, parts: int = 10, seed: int = 0) -> Plan:
    """A random order of `count` images: the first `keep` are kept, each of `parts` equal pieces is a part.

    Returns:
      bool [count] and int [count].
    Raises:
      ValueError: a number below 1.
    """
    if min(count, keep, parts) < 1:
        raise ValueError(f"need images, keep and parts of 1 or more, got {count}, {keep}, {parts}")
    place = np.random.default_rng(seed).permutation(count)
    return Plan(place < keep, place * min(parts, count) // count)


def summarise(
    outputs: Mapping[str, np.ndarray], kept: np.ndarray, part: np.ndarray, parts: int = 10
) -> FeatureStatistics:
    """The statistics of one batch.

    Args:
      outputs: "pool" [B, D], and where there are any "spatial" [B, S] and "unbiased" [B, K] (logits).
      kept: bool [B], images whose "pool" is kept.
      part: int [B], of each image.
      parts: how many there are.
    Raises:
      ValueError: features that are not finite or not [B, D].
    """
    found = {name: frechet.moments(outputs[name]) for name in KINDS if name in outputs}
    scores = None
    if "unbiased" in outputs:
        logits = frechet.check_features(outputs["unbiased"], "logits")
        logits = logits - logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        classes = np.zeros((parts, p.shape[1]))
        np.add.at(classes, part, p)
        each = (p * log_p).sum(axis=1)
        scores = Scores(
            np.bincount(part, minlength=parts),
            np.bincount(part, weights=each, minlength=parts),
            classes,
        )
    pool = np.asarray(outputs["pool"], np.float32)
    return FeatureStatistics(found, scores, pool[np.asarray(kept, bool)])


def merge(a: FeatureStatistics, b: FeatureStatistics) -> FeatureStatistics:
    """Statistics of both sets, `a` first. Raises ValueError where the features differ."""
    if set(a.moments) != set(b.moments) or (a.scores is None) != (b.scores is None):
        raise ValueError("statistics of different features cannot be merged")
    scores = None if a.scores is None else Scores(*(x + y for x, y in zip(a.scores, b.scores)))
    found = {name: frechet.merge(part, b.moments[name]) for name, part in a.moments.items()}
    return FeatureStatistics(found, scores, np.concatenate([a.kept, b.kept]))


def to_arrays(statistics: FeatureStatistics) -> dict[str, np.ndarray]:
    """Everything in it by name, for files and for other processes."""
    arrays = {"kept": statistics.kept}
    for name, part in statistics.moments.items():
        fields = {"count": np.int64(part.count), "mean": part.mean, "scatter": part.scatter}
        arrays |= {f"{name}/{field}": value for field, value in fields.items()}
    if statistics.scores is not None:
        arrays |= {f"scores/{k}": v for k, v in statistics.scores._asdict().items()}
    return arrays


def from_arrays(arrays: Mapping[str, np.ndarray]) -> FeatureStatistics:
    """The inverse of `to_arrays`. Raises ValueError where something is missing or of another size."""
    found = {}
    for name in KINDS:
        if f"{name}/mean" in arrays:
            mean, scatter = arrays[f"{name}/mean"], arrays[f"{name}/scatter"]
            if scatter.shape != 2 * mean.shape:
                raise ValueError(f"{name}: mean {mean.shape} and scatter {scatter.shape}")
            found[name] = frechet.Moments(int(arrays[f"{name}/count"]), mean, scatter)
    if "pool" not in found or arrays["kept"].shape[1:] != found["pool"].mean.shape:
        raise ValueError("the features 'pool' are missing, or those kept are of another size")
    scores = None
    if "scores/count" in arrays:
        scores = Scores(*(arrays[f"scores/{field}"] for field in Scores._fields))
    return FeatureStatistics(found, scores, arrays["kept"])


def collect(
    outputs_of: Callable[[Iterable[np.ndarray]], Iterable[Mapping[str, np.ndarray]]],
    read: Callable[[np.ndarray], np.ndarray],
    count: int,
    *,
    rows: np.ndarray | None = None,
    batch_size: int = 64,
    keep: int = 10_000,
    parts: int = 10,
    seed: int = 0,
    resume: pathlib.Path | None = None,
    identity: Mapping[str, Any] | None = None,
    save_seconds: float = 120.0,
    progress: Callable[[int], None] = lambda done: None,
) -> FeatureStatistics:
    """Statistics of images that are read, or drawn, batch by batch.

    Args:
      outputs_of: batches of images -> their features, in order (`ShardedFunction.stream`).
      read: rows -> images [n, H, W, C]; row i must be the same image whenever it is asked for.
      count: N, images in all.
      rows: of this process, rising; default all.
      batch_size: rows that are read at a time.
      keep, parts, seed: see `plan`.
      resume: file that what has been done is written to from time to time, and read from at the start; it
        is removed at the end.
      identity: plain data that tell what is judged: a file of anything else is not taken up.
      save_seconds: between two writes.
      progress: called with the number of rows done.
    Raises:
      ValueError: a number below 1, no rows, or as `summarise`.
    """
    plans = plan(count, keep=keep, parts=parts, seed=seed)
    rows = np.arange(count) if rows is None else np.asarray(rows)
    if not len(rows) or batch_size < 1:
        raise ValueError(f"need images and a positive batch_size, got {len(rows)}, {batch_size}")
    about = {"identity": dict(identity or {}), "count": count, "rows": [int(rows[0]), len(rows)]}
    about |= {"keep": keep, "parts": parts, "seed": seed}
    total, done = _resume(resume, about)
    progress(done)
    chunks = [rows[i : i + batch_size] for i in range(done, len(rows), batch_size)]
    saved = time.monotonic()
    for chunk, outputs in zip(chunks, outputs_of(read(chunk) for chunk in chunks)):
        found = summarise(outputs, plans.kept[chunk], plans.part[chunk], parts)
        total = found if total is None else merge(total, found)
        done += len(chunk)
        progress(done)
        if resume is not None and time.monotonic() - saved > save_seconds and done < len(rows):
            write_arrays(resume, _PART, about | {"done": done}, to_arrays(total))
            saved = time.monotonic()
    if resume is not None:
        pathlib.Path(resume).unlink(missing_ok=True)
    return total


def _resume(path, about) -> tuple[FeatureStatistics | None, int]:
    if path is None or not pathlib.Path(path).is_file():
        return None, 0
    try:
        found, arrays = read_arrays(path, _PART, "part of feature statistics", lambda *both: both)
        done = int(found.pop("done"))
        return (from_arrays(arrays), done) if found == about else (None, 0)
    except (ValueError, KeyError):  # of an earlier version, or damaged: begin again
        return None, 0


def figures(
    real: Any,
    fake: FeatureStatistics,
    *,
    neighbours: int = 3,
    subset_size: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """The figures of merit of `fake` against a reference.

    Args:
      real: a `reference_files.Reference`, or None: then the Inception score alone is computed.
      fake: statistics of the judged images.
      neighbours: k of precision and recall.
      subset_size: of the 100 random subsets whose mean the KID is; with fewer images kept it is one
        distance of all of them, with no standard deviation.
      seed: of the subsets.

    Returns:
      Python numbers, ready for JSON: "fid", "sfid", "kid", "kid_std", "precision", "recall",
      "inception_score", "inception_score_std", None where the reference or the features lack what they
      need; "n_real" (None if unknown), "n_fake", "n_kept" of both.
    Raises:
      ValueError: features of different sizes.
    """
    row: dict[str, Any] = {}
    for name, title in zip(KINDS, ("fid", "sfid")):
        row[title] = None
        if real is not None and name in real.gaussians and name in fake.moments and fake.count > 1:
            ours = fake.moments[name]
            row[title] = frechet.gaussian_distance(
                *real.gaussians[name], ours.mean, ours.covariance, tolerance=real.tolerance
            )
    row |= {"kid": None, "kid_std": None, "precision": None, "recall": None}
    kept = None if real is None else real.kept
    if kept is not None and min(len(kept), len(fake.kept)) > max(neighbours, 1):
        if min(len(kept), len(fake.kept)) > subset_size:
            row["kid"], row["kid_std"] = kernel_distance_subsets(
                kept, fake.kept, subset_size=subset_size, subsets=100, seed=seed
            )
        else:
            row["kid"] = kernel_distance(kept, fake.kept)
        # both depend on the number of points: as many of one as of the other
        size = min(len(kept), len(fake.kept))
        row["precision"], row["recall"] = precision_recall(
            kept[:size], fake.kept[:size], k=neighbours
        )
    row |= {"inception_score": None, "inception_score_std": None}
    if fake.scores is not None:
        row["inception_score"], row["inception_score_std"] = fake.scores.value()
    row |= {"n_real": None if real is None else real.count, "n_fake": fake.count}
    return row | {"n_kept": [0 if kept is None else len(kept), len(fake.kept)]}
