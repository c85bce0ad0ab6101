"""Writing files: down to the disk, and so that a failure is told in words."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from train.errors import MachineError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises MachineError for `path` if what is done within can't be written: a full disk, say."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        cause = error.strerror if isinstance(error, OSError) else str(error)
        raise MachineError(
            f"{path}: can't be written ({cause}). Free space there or make it writable; a run goes "
            "on from its last checkpoint with --resume."
        ) from None


def flush(path: Path) -> None:
    """Force a file, or a folder's names, to the disk.

    Windows flushes only what is open for writing, and opens no folders: there names have to wait.
    """
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
