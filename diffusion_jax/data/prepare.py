"""Prepares a TFDS data set once, so that training reads it without TensorFlow and without a network.

    python -m diffusion_jax.data.prepare --name=mnist --data_dir=DIR [--manual_dir=FILES]

Needs TensorFlow (the extra `[tfds]`); may run on another machine, as only the written folder is
needed afterwards. With `--manual_dir` the original files are taken from that folder instead of the
network (plain file names; size and SHA-256 are verified by TFDS against its registered values).

The files are written as array_record, the format that random access without TensorFlow needs. Each
data set gets a download folder of its own: the extraction cache of TFDS is keyed by file name alone,
and mnist and fashion_mnist share their file names, so a shared folder would silently fill one with
the images of the other.
"""

import argparse
import importlib.util
import pathlib
import platform
import sys
from collections.abc import Sequence

from diffusion_jax.data.tfds import default_data_dir, find_prepared, parse_name, prepared_folder

_HAS_CPU_WHEELS = platform.system() == "Linux" and platform.machine() == "x86_64"

# tensorflow-datasets 4.9.10 declares neither TensorFlow nor, for current Pythons,
# importlib_resources, though `download_and_prepare` imports both.
_NEEDED = {
    "tensorflow_datasets": "tensorflow-datasets",
    "tensorflow": "tensorflow-cpu" if _HAS_CPU_WHEELS else "tensorflow",
    "array_record": "array_record",
    "importlib_resources": "importlib_resources",
}


def missing_packages() -> tuple[str, ...]:
    """The distributions that preparing needs and this environment lacks."""
    return tuple(
        package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None
    )


def prepare(
    name: str, data_dir: str | pathlib.Path | None = None, manual_dir: str | None = None
) -> pathlib.Path:
    """Downloads (or takes from `manual_dir`) and writes one data set as array_record.

    Args:
      name: TFDS name, `name[/config][:version]`.
      data_dir: where prepared sets live; `$TFDS_DATA_DIR` or `~/tensorflow_datasets` unless given.
      manual_dir: a folder with the original files, for machines without a network.

    Returns:
      The folder of the prepared set; a set that is prepared already is left as it is.

    Raises:
      ValueError: a malformed name, a missing manual folder, or a set prepared in another format.
      ImportError: a package that preparing needs is missing; the message holds the command.
    """
    parsed = parse_name(name)
    root = default_data_dir() if data_dir is None else pathlib.Path(data_dir).expanduser()
    if manual_dir is not None and not pathlib.Path(manual_dir).expanduser().is_dir():
        raise ValueError(f"manual_dir={str(manual_dir)!r} is not a folder")
    existing = find_prepared(name, root)
    if existing is not None:
        # Refuses a set in another format, which TFDS would silently keep as it is.
        return prepared_folder(name, root)
    missing = missing_packages()
    if missing:
        raise ImportError(f"preparing {name!r} needs: pip install {' '.join(missing)}")

    import tensorflow_datasets

    builder = tensorflow_datasets.builder(
        name, data_dir=str(root), file_format="array_record", try_gcs=False
    )
    downloads = root / f"downloads_{parsed.label}"
    builder.download_and_prepare(
        download_dir=str(downloads),
        download_config=tensorflow_datasets.download.DownloadConfig(
            manual_dir=None if manual_dir is None else str(pathlib.Path(manual_dir).expanduser()),
            try_download_gcs=False,
        ),
        file_format="array_record",
    )
    return prepared_folder(name, root)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status. User mistakes print one line."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusion_jax.data.prepare",
        description="Prepare a TFDS data set once (needs TensorFlow); reading it needs none.",
    )
    parser.add_argument(
        "--name", required=True, help="TFDS name, e.g. mnist, fashion_mnist, cifar10"
    )
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR or ~/tensorflow_datasets")
    parser.add_argument("--manual_dir", help="folder with the original files (no network needed)")
    options = parser.parse_args(arguments)
    try:
        folder = prepare(options.name, options.data_dir, options.manual_dir)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"prepared {options.name} in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
