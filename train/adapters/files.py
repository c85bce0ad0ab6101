"""safetensors files: reading them one tensor at a time, writing them whole or not at all.

Owns the container and its dangers; what the names in it mean is `layouts`'. Nothing is ever
unpickled, and a file is never changed in place.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.errors import CheckpointError, MachineError
from train.files import flush

DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""What adapters are written in."""

BLOCK = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor as the header has it."""

    dtype: str
    """safetensors' name, such as BF16."""
    shape: tuple[int, ...]


class File:
    """An open safetensors file. Only its header is read; `get` reads one tensor."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError if the file is missing, cut off, damaged or a pickle."""
        self.path = path
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file.")
        try:
            self._handle = safe_open(path, framework="pt", device="cpu")
            slices = {key: self._handle.get_slice(key) for key in self._handle.keys()}  # noqa: SIM118
            self.tensors = {
                key: Stored(str(s.get_dtype()), tuple(s.get_shape())) for key, s in slices.items()
            }
            self.metadata: dict[str, str] = self._handle.metadata() or {}
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: {_diagnosis(path, error)}") from None

    def get(self, key: str) -> Tensor:
        """One tensor, on the CPU."""
        try:
            return self._handle.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: '{key}' can't be read ({error}). Copy or download the file again."
            ) from None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file whose numbers are finite. Raises CheckpointError."""
    file = File(path)
    tensors = {key: file.get(key) for key in file.tensors}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise CheckpointError(
                f"{path}: '{key}' holds values that aren't finite. Export an earlier checkpoint."
            )
    return tensors, file.metadata


def write(
    path: Path,
    pieces: Iterable[tuple[str, Tensor]],
    *,
    describe: Callable[[str], dict[str, str]],
) -> str:
    """Write a file of tensors that come one at a time; the SHA-256 of all their bytes.

    pieces: name and contiguous CPU tensor, in the order of the file. describe: from that digest to
    the metadata. A file that was there stays until the new one is complete, flushed and read back.
    Raises MachineError where the disk refuses; what `pieces` raises leaves nothing behind.
    """
    with replacing(path) as partial, _spool(partial) as body:
        header: dict[str, Any] = {}
        digest, end = hashlib.sha256(), 0
        for name, tensor in pieces:
            assert name not in header, f"{name} is written twice"
            start, end = end, end + tensor.nbytes
            kind = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape)}
            header[name] = kind | {"data_offsets": [start, end]}
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            digest.update(data)
            body.write(data)
        metadata = describe(digest.hexdigest())
        body.seek(0)
        _assemble({"__metadata__": metadata} | header, body, partial)
        if body_hash(partial) != digest.hexdigest():
            raise MachineError(f"{path}: the disk gave back other bytes than it was given.")
        return digest.hexdigest()


def copy(source: Path, target: Path, *, metadata: dict[str, str]) -> None:
    """The tensors of a file, byte for byte, under other metadata; `source` stays as it is.

    Raises CheckpointError if `source` can't be read, MachineError where the disk refuses.
    """
    assert not (target.exists() and target.samefile(source)), "a file is never changed in place"
    File(source)  # whole, and its header within safetensors' limits
    with source.open("rb") as body, replacing(target) as partial:
        header = json.loads(body.read(int.from_bytes(body.read(8), "little")))
        _assemble(header | {"__metadata__": metadata}, body, partial)
        if body_hash(partial) != body_hash(source):
            raise MachineError(f"{target}: the disk gave back other bytes than it was given.")


def body_hash(path: Path) -> str:
    """SHA-256 of all tensor bytes of a safetensors file, its header left out."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` when the block ends well, and vanishes otherwise."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    except (SafetensorError, OSError) as error:
        raise MachineError(
            f"{path}: can't be written ({error}). Check the folder's rights and the free disk "
            "space; a file of that name, if there was one, is unharmed."
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def _spool(partial: Path) -> Iterator[BinaryIO]:
    """The tensors before the header is known, in a file beside that is gone afterwards."""
    path = partial.with_suffix(".body")
    try:
        with path.open("w+b") as body:
            yield body
    finally:
        with suppress(OSError):
            path.unlink()


def _assemble(header: dict[str, Any], body: BinaryIO, partial: Path) -> None:
    """The safetensors format, with the rest of `body`: safetensors' own writer shuffles the
    metadata, so that the same adapter would give another file each time."""
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(body, file, BLOCK)


def _diagnosis(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        start = file.read(8)
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "this is a pickle under a safetensors name. It isn't opened, since unpickling runs "
            "whatever code it holds. Get it as safetensors."
        )
    if start[:4] == b"GGUF":
        return "this is a GGUF file. Kindling reads adapters as safetensors."
    if start == b"version ":
        return "a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`."
    return (
        f"not a whole safetensors file ({error}). It is cut off or damaged; "
        "copy, download or export it again."
    )
