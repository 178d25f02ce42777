"""Judges images in the features of the FID Inception: samples of a run, folders, files of images.

The weights come from a file of the user's; nothing is fetched. Features are computed over all devices of
every process, statistics are streamed (`evaluation.feature_statistics`), and what an interrupted
evaluation has done is taken up again.
"""

import concurrent.futures
import hashlib
import pathlib
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from diffusion_jax import run as runs
from diffusion_jax.data import images as pixels
from diffusion_jax.data.image_folder import image_folder
from diffusion_jax.evaluation import feature_statistics, reference_files
from diffusion_jax.evaluation.report import markdown_table
from diffusion_jax.evaluation.sharded import ShardedFunction, over_processes, rows_of_process
from diffusion_jax.interop.inception import read_inception
from diffusion_jax.networks.inception import DIMENSIONS, PREPARATIONS, InceptionV3
from diffusion_jax.registry import check_choice
from diffusion_jax.training.parallel import make_layout, put_local

FEATURES = ("inception",)
IMAGE_ARRAYS = ("arr_0", "samples", "images")
_READERS = 8  # threads that decode files: decoding lets others run
_USED = ("pool", "spatial", "unbiased")
_DIMENSIONS = {name: DIMENSIONS[name] for name in feature_statistics.KINDS}


class Images(NamedTuple):
    """A set of images.

    Attributes:
      name: for tables.
      count: how many.
      read: rows -> uint8 [n, H, W, 1 or 3]; the same row gives the same image.
      identity: plain data that tell this set from others, for what is taken up again.
    """

    name: str
    count: int
    read: Callable[[np.ndarray], np.ndarray]
    identity: Mapping[str, Any]


class Extractor:
    """The network with its weights, over the devices of this process.

    Args:
      weights: file, see `interop.inception.read_inception`.
      preparation: of the images, see `networks.inception`.
      batch_size: images at a time.
    Raises:
      ValueError: weights that cannot be read or are of another network; an unknown preparation.
    """

    def __init__(self, weights, *, preparation: str = "pytorch_fid", batch_size: int = 64):
        check_choice("preparation", preparation, PREPARATIONS)
        params = read_inception(weights, progress=True)
        self.about = {"features": "inception", "checksum": runs.checksum(params)}
        self.about["preparation"] = preparation
        module = InceptionV3(preparation)

        def function(params, images):
            out = module.apply({"params": params}, images)
            return {name: out[name] for name in _USED}

        layout = make_layout({}, jax.local_devices())
        self.function = ShardedFunction(
            function,
            params,
            batch_size=batch_size,
            sharding=layout.batch_sharding,
            replicated=layout.replicated,
        )

    def statistics(
        self, images: Images, *, keep: int = 10_000, seed: int = 0, folder=None
    ) -> feature_statistics.FeatureStatistics:
        """The statistics of a set, of all processes together; each reads its own part of the set.

        Args:
          images: the set.
          keep: images whose features are kept, of all processes.
          seed: of which these are.
          folder: where to write what has been done; None keeps nothing.
        Raises:
          ValueError: fewer images than processes, or images that cannot be read.
        """
        if images.count < jax.process_count():
            raise ValueError(
                f"{images.name}: {images.count} images for {jax.process_count()} processes"
            )
        rows = rows_of_process(images.count)
        identity = {**self.about, **images.identity}
        part = None
        if folder is not None:
            name = hashlib.sha256(repr(sorted(identity.items())).encode()).hexdigest()[:12]
            part = pathlib.Path(folder) / f".features_{name}_{jax.process_index()}.npz"
        quiet = True if jax.process_index() else None
        with tqdm.tqdm(total=len(rows), desc=images.name, unit="image", disable=quiet) as bar:
            found = feature_statistics.collect(
                lambda batches: self.function.stream((batch,) for batch in batches),
                images.read,
                images.count,
                rows=rows,
                batch_size=self.function.batch_size,
                keep=keep,
                seed=seed,
                resume=part,
                identity=identity,
                progress=lambda done: bar.update(done - bar.n),
            )
        total = None
        for arrays in over_processes(feature_statistics.to_arrays(found)):
            one = feature_statistics.from_arrays(arrays)
            total = one if total is None else feature_statistics.merge(total, one)
        return total

    def reference(self, path: str, *, keep: int = 10_000) -> reference_files.Reference:
        """A reference from a file of statistics, or from images; with both, what only images give too.

        Raises:
          ValueError: not such a file or folder; statistics of other weights or another preparation.
        """
        if not (reference_files.has_statistics(path) or str(path).endswith((".pkl", ".pickle"))):
            images = read_images(path)
            return reference_files.reference_of(self.statistics(images, keep=keep), self.about)
        found = reference_files.read_reference(path, _DIMENSIONS)
        for name in ("checksum", "preparation"):
            if found.about.get(name, self.about[name]) != self.about[name]:
                raise ValueError(
                    f"{path} holds statistics by {name} {found.about[name]!r}, not"
                    f" {self.about[name]!r}: their distances do not compare"
                )
        if found.kept is None and _image_array(path) is not None:
            some = self.statistics(read_images(path), keep=keep)
            found = found._replace(kept=some.kept)
        return found


def read_images(path: str | pathlib.Path) -> Images:
    """A set of images from a folder, or from a file of arrays.

    Args:
      path: a folder of image files, with subfolders or without; `.npz` with uint8 pixels or floats in
        [-1, 1] under "arr_0", "samples" or "images"; `.npy` likewise. [N, H, W, 1 or 3].
    Raises:
      ValueError: no such file or folder, no images in it, or arrays of another kind.
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        source = image_folder(path, split="all", cache_bytes=0)
        identity = {"path": str(path.resolve()), "count": len(source)}

        pool = concurrent.futures.ThreadPoolExecutor(_READERS)

        def read(rows):
            parts = pool.map(source.take, np.array_split(rows, min(_READERS, len(rows))))
            return np.concatenate([pixels.to_uint8(part["image"]) for part in parts])

        return Images(str(path), len(source), read, identity)
    if path.suffix not in (".npz", ".npy") or not path.is_file():
        raise ValueError(f"{str(path)!r} is no folder of images and no .npz or .npy file")
    name = _image_array(path) if path.suffix == ".npz" else None
    if path.suffix == ".npz" and name is None:
        raise ValueError(f"{path} holds no images: none of the arrays {', '.join(IMAGE_ARRAYS)}")
    try:
        if name is None:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            with np.load(path, allow_pickle=False) as stored:
                array = stored[name]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or holds no arrays: {error}") from error
    identity = {"path": str(path.resolve()), "size": path.stat().st_size}
    return array_images(str(path), array, identity)


def array_images(name: str, array: np.ndarray, identity: Mapping[str, Any]) -> Images:
    """Images in memory: uint8, or floats in [-1, 1]. Raises ValueError for others."""
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise ValueError(f"{name}: images must be [N, H, W, 1 or 3], got {array.shape}")
    if array.dtype == np.uint8:
        return Images(name, len(array), lambda rows: array[rows], identity)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{name}: images must be uint8 or floats in [-1, 1], got {array.dtype}")

    def read(rows):
        part = np.asarray(array[rows], np.float32)
        if not np.isfinite(part).all() or np.abs(part).max() > 4.0:
            raise ValueError(f"{name}: images of floats must be finite and about in [-1, 1]")
        return pixels.to_uint8(part)

    return Images(name, len(array), read, identity)


def _image_array(path) -> str | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return next((name for name in IMAGE_ARRAYS if name in stored.files), None)
    except (ValueError, OSError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or holds no arrays: {error}") from error


def run_images(run: runs.Run, split: str) -> Images:
    """The data of a run. Raises ValueError where they are no images."""
    _check_images(run)
    source = run.source(split)

    def read(rows):
        return pixels.to_uint8(runs.as_images(run.spec, source.take(rows)[run.spec.kind]))

    return Images(f"{split} data", len(source), read, {"workdir": str(run.workdir), "split": split})


def run_samples(run: runs.Run, sampler: Any, num: int, *, seed: int = 0) -> Images:
    """`num` samples of a run, each drawn when it is read; sample i depends on the seed and i alone.

    A batch is spread over the devices of this process.

    Raises:
      ValueError: a run that makes no images, or num below 1.
    """
    _check_images(run)
    batch, key, ways = runs.conditions(run, num), jax.random.key(seed), jax.local_device_count()
    params = put_local(run.params)

    def read(rows):
        filled = rows[np.minimum(np.arange(len(rows) + -len(rows) % ways), len(rows) - 1)]
        part = put_local({k: np.asarray(v)[filled] for k, v in batch.items()}, split=True)
        drawn = np.asarray(run.method.sample(params, key, part, sampler))[: len(rows)]
        return pixels.to_uint8(runs.as_images(run.spec, drawn))

    identity = {"workdir": str(run.workdir), "weights": runs.checksum(run.params), "seed": seed}
    identity |= {"sampler": sampler.name, "nfe": sampler.nfe, "num": num}
    times = hashlib.sha256(repr(jax.device_get(jax.tree.leaves(sampler))).encode()).hexdigest()[:12]
    return Images(f"{sampler.name} {sampler.nfe}", num, read, identity | {"leaves": times})


def _check_images(run: runs.Run) -> None:
    if run.spec.show not in ("image", "pixels") or (
        (run.spec.shape if run.spec.show == "image" else run.spec.grid)[-1] not in (1, 3)
    ):
        raise ValueError(
            f"--features are of grey or RGB images; the run makes {run.spec.show or run.spec.kind}"
        )


COLUMNS = {
    "name": "images",
    "n_fake": "number",
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "inception_score": "Inception score",
}


def table(rows) -> str:
    """Rows of figures as a Markdown table."""
    return markdown_table(
        [{name: row.get(name) for name in COLUMNS} for row in rows], COLUMNS, digits=4
    )


def warnings(row: Mapping[str, Any]) -> list[str]:
    """What to know before one reads a row's distances."""
    said = []
    if row.get("unknown_preparation"):
        said.append(
            f"{row['reference']} does not say how its images were prepared; statistics of EDM and"
            " guided-diffusion belong to --preparation=tensorflow, those of pytorch-fid to pytorch_fid"
        )
    size = _DIMENSIONS["pool"]
    for who, count in (("judged", row["n_fake"]), ("reference", row["n_real"])):
        if count is not None and count <= size:
            said.append(
                f"{count} {who} images cannot determine a covariance of {size} features: FID and sFID"
                " are biased by about their own size; published ones are of 50,000"
            )
    return said
