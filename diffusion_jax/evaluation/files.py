"""Writing a file so that a reader sees the old content or the new one, never half of either."""

import os
from pathlib import Path


def write_atomically(path: str | os.PathLike, payload: bytes) -> Path:
    """Writes `payload` beside `path`, flushes it to disk and renames it into place.

    Missing parent folders are made. The temporary name holds the process id, so two processes that
    write the same file leave one whole file.

    Raises:
      TypeError: the payload is not bytes.
      OSError: the folder cannot be written; nothing is left behind.
    """
    if not isinstance(payload, bytes | bytearray | memoryview):
        raise TypeError(f"payload must be bytes, got {type(payload).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
