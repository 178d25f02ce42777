"""Reading files of strangers: plain or gzip, within a limit, in one line of error."""

import gzip
import hashlib
import pathlib
import zlib


def read_bytes(path: str | pathlib.Path, max_bytes: int) -> bytes:
    """The content of a file, unpacked where its name ends in ".gz".

    Raises:
      ValueError: no file, one that cannot be read, or whose content is larger than `max_bytes`.
    """
    path = pathlib.Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"path={str(path)!r} is not a file")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}") from error
    if len(content) > max_bytes:
        raise ValueError(f"{str(path)!r} is larger than max_bytes={max_bytes}")
    return content


def decode_utf8(content: bytes, path: str | pathlib.Path, remedy: str = "") -> str:
    """The bytes as text. Raises ValueError naming the file and the first byte that is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8: byte 0x{content[error.start]:02x} at offset"
            f" {error.start}{remedy and f'; {remedy}'}"
        ) from error


def checksum(path: str | pathlib.Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
