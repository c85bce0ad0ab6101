"""Encoded pictures and captions on disk, addressed by what they were made from.

A key is a digest of everything that an entry depends on, so an entry can't be stale: change the
picture, its size, the encoder or the prompt, and it has another key. Entries are written to a
temporary file and renamed; a checksum finds damage. What goes into a key is the caller's.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.errors import CheckpointError
from train.files import writing

DIGESTS = "digests.json"
"""In a cache's folder: the memo of `FileDigests`."""

FORMAT = 1
"""Raise it when the meaning of an entry changes; old entries are then never read again."""


def key(**facts: str | int | float | tuple | None) -> str:
    """The name of an entry that depends on these facts."""
    text = json.dumps({"format": FORMAT, **facts}, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class Cache:
    """A folder of safetensors entries, two levels deep."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, key: str) -> Path:
        """Where the entry is or would be."""
        return self.root / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        """Whether the entry is there, whole. Damage inside of it is found by `get`."""
        try:
            self.notes(key)
        except (FileNotFoundError, SafetensorError):
            return False
        return True

    def put(self, key: str, tensors: dict[str, Tensor], *, notes: dict[str, str]) -> None:
        """Write an entry: all of it or nothing. Raises MachineError if it can't be."""
        path = self.path(key)
        metadata = {**notes, "checksum": _checksum(tensors)}
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
            os.close(handle)
            try:
                save_file(tensors, temporary, metadata=metadata)
                os.replace(temporary, path)
            finally:
                Path(temporary).unlink(missing_ok=True)

    def get(self, key: str) -> dict[str, Tensor]:
        """An entry's tensors on the CPU. Raises CheckpointError if it is missing or damaged."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                intact = file.metadata().get("checksum") == _checksum(tensors)
        except (FileNotFoundError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {error}. {REMEDY}") from None
        if not intact:
            raise CheckpointError(f"{path}: its contents don't match their checksum. {REMEDY}")
        return tensors

    def notes(self, key: str) -> dict[str, str]:
        """What `put` was told about the entry; reads the header only."""
        with safe_open(self.path(key), framework="pt") as file:
            return file.metadata()


REMEDY = "Delete that cache file and start again; it is made anew."


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class FileDigests:
    """sha256 of files, remembered by path, size and time of change, so that 50 GB are read once."""

    def __init__(self, memo: Path) -> None:
        self._memo = memo
        try:
            self._known: dict[str, str] = json.loads(memo.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}

    def file(self, path: Path) -> str:
        """sha256 of a file's bytes, hex. In a hub cache the blob's name already is it."""
        real = path.resolve()
        if real.parent.name == "blobs" and len(real.name) == 64:
            return real.name
        stat = real.stat()
        memo = f"{real}|{stat.st_size}|{stat.st_mtime_ns}"
        if memo not in self._known:
            with real.open("rb") as file:
                self._known[memo] = hashlib.file_digest(file, "sha256").hexdigest()
            self._remember()
        return self._known[memo]

    def folder(self, path: Path) -> str:
        """Digest of a folder's files: names and contents, in order, hidden files left out."""
        digest = hashlib.sha256()
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            name = file.relative_to(path).as_posix()
            if not name.startswith("."):
                digest.update(f"{name}\0{self.file(file)}\n".encode())
        return digest.hexdigest()

    def _remember(self) -> None:
        self._memo.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._memo.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(self._known, indent=0), encoding="utf-8")
        os.replace(temporary, self._memo)
