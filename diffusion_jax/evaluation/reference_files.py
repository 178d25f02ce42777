"""Reference statistics in files: our own, and those that others have published.

  ours                 `write_reference`: means, covariances, counts, a part of the features, and which
                       weights and preparation of images they are of
  EDM, pytorch-fid     .npz with `mu` [2048] and `sigma` [2048, 2048]
  guided-diffusion     .npz with `mu`, `sigma`, `mu_s` [2023] and `sigma_s` (VIRTUAL_...), and sometimes
                       the images themselves

All are read without pickle. Published statistics do not say how their images were prepared: those of EDM
and guided-diffusion are of the "tensorflow" way, those of pytorch-fid of its own (`networks.inception`).
"""

import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.array_files import read_arrays, write_arrays
from diffusion_jax.evaluation.feature_statistics import KINDS, FeatureStatistics

_OURS = "diffusion_jax feature statistics 1"
_THEIRS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class Reference(NamedTuple):
    """What images are judged against.

    Attributes:
      count: images, None if unknown.
      gaussians: name of the features -> (mean [D], covariance [D, D]), float64.
      kept: "pool" of some of the images, float32 [n, D], or None.
      about: plain data: "checksum" of the weights and "preparation", where known.
      tolerance: relative size of eigenvalues below 0 that are rounding: larger for float32 files.
    """

    count: int | None
    gaussians: Mapping[str, tuple[np.ndarray, np.ndarray]]
    kept: np.ndarray | None
    about: Mapping[str, Any]
    tolerance: float = 1e-8


def reference_of(statistics: FeatureStatistics, about: Mapping[str, Any]) -> Reference:
    """Statistics as a reference. Raises ValueError for a single image."""
    found = {name: (m.mean, m.covariance) for name, m in statistics.moments.items()}
    return Reference(statistics.count, found, statistics.kept, dict(about))


def write_reference(path: str | os.PathLike, reference: Reference) -> pathlib.Path:
    """Writes a reference as .npz, whole or not at all. Raises ValueError for another ending."""
    path = pathlib.Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"statistics are written as .npz, got {str(path)!r}")
    arrays = {} if reference.kept is None else {"kept": reference.kept}
    for name, (mean, covariance) in reference.gaussians.items():
        arrays |= dict(zip(_THEIRS[name], (mean, covariance)))
    return write_arrays(
        path, _OURS, {"count": reference.count, "about": dict(reference.about)}, arrays
    )


def has_statistics(path: str | os.PathLike) -> bool:
    """Whether a file is an .npz with statistics in it; images may lie beside them."""
    path = pathlib.Path(path)
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def read_reference(
    path: str | os.PathLike, dimensions: Mapping[str, int] | None = None
) -> Reference:
    """Reads statistics, ours or another program's.

    Args:
      path: .npz.
      dimensions: of the features, {"pool": 2048, "spatial": 2023}, to be checked.
    Raises:
      ValueError: no such file, a damaged one, a pickle, no statistics in it, or of other dimensions.
    """
    path = pathlib.Path(path)
    if path.suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path} is a pickle, which runs code when it is read, and is not opened; keep its arrays "
            'alone, once, where you trust it: python -c "import pickle, numpy; '
            f"s = pickle.load(open('{path.name}', 'rb')); s = s.get('fid', s); "
            f"numpy.savez('{path.stem}.npz', mu=s['mu'], sigma=s['sigma'])\""
        )
    if not path.is_file():
        raise ValueError(f"no file of statistics {str(path)!r}")
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not hasattr(stored, "files"):
                raise ValueError("it is a single array")
            if "format" in stored.files and "about" in stored.files:
                found = read_arrays(path, _OURS, "statistics", _ours)
            else:
                found = _theirs(stored)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"{path} is damaged or holds no statistics: {line}") from error
    for name, size in (dimensions or {}).items():
        mean = found.gaussians[name][0] if name in found.gaussians else np.zeros(size)
        if len(mean) != size:
            raise ValueError(
                f"{path} holds statistics of {len(mean)} features where {name!r} has {size}:"
                " they are of another network"
            )
    return found


def _ours(about, arrays) -> Reference:
    found = _gaussians(arrays)
    kept = arrays.get("kept")
    if kept is not None and kept.shape[1:] != found["pool"][0].shape:
        raise ValueError(f"kept features have shape {kept.shape}")
    return Reference(about["count"], found, kept, about["about"])


def _theirs(stored) -> Reference:
    names = [name for pair in _THEIRS.values() for name in pair if name in stored.files]
    if not {"mu", "sigma"} <= set(names):
        raise ValueError(f"mu and sigma are missing; it has {', '.join(stored.files) or 'nothing'}")
    arrays = {name: stored[name] for name in names}
    single = any(array.dtype.itemsize < 8 for array in arrays.values())
    return Reference(None, _gaussians(arrays), None, {}, 1e-4 if single else 1e-8)


def _gaussians(arrays) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    for name in KINDS:
        mu, sigma = _THEIRS[name]
        if mu not in arrays and sigma not in arrays:
            continue
        mean, covariance = (np.asarray(arrays[n], np.float64) for n in (mu, sigma))
        if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
            raise ValueError(f"{mu} has shape {mean.shape} and {sigma} {covariance.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError(f"{mu} or {sigma} holds NaN or infinity")
        asymmetry = np.abs(covariance - covariance.T).max()
        if asymmetry > 1e-4 * np.abs(covariance).max():
            raise ValueError(f"{sigma} is not symmetric")
        found[name] = (mean, (covariance + covariance.T) / 2)
    return found
