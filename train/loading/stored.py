"""safetensors files, read by offset: what is in one, one tensor or some rows of it, one read ahead.

The library's memory maps would count as this process's memory and change under it with the file;
here a tensor is a copy. A file is checked to be whole by its header alone. Nothing is ever
unpickled. What the tensors mean is `weights`' and `kept`'s.
"""

import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.errors import ConfigError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""safetensors' names."""

HEADER_BYTES = 100_000_000
"""safetensors' own limit; more is something else's first bytes."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a safetensors file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or some of its rows, on the CPU. Raises ConfigError if the file ends."""
        shape = self.shape if rows is None else (rows[1] - rows[0], *self.shape[1:])
        dtype = DTYPES[self.dtype]
        row = prod(self.shape[1:]) * dtype.itemsize
        content = torch.empty(prod(shape) * dtype.itemsize, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start + (rows[0] * row if rows else 0))
            if file.readinto(content.numpy().data) != content.numel():
                raise ConfigError(f"{self.file}: it became shorter while it was read; start again")
        return content.view(dtype).view(shape)


def read_header(path: Path, *, where: str) -> tuple[dict[str, Stored], dict[str, str]]:
    """What is in a safetensors file, and its metadata.

    Raises ConfigError, which begins with `where`, if it isn't one or isn't whole.
    """
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {path.name}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        text = file.read(length) if length <= min(size - 8, HEADER_BYTES) else b""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        first = 8 + length
        stored = {key: _stored(path, entry, first) for key, entry in header.items()}
        end = first + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{where}: {path.name} {_kind_of(path, start)}") from None
    if size != end:
        raise ConfigError(
            f"{where}: {path.name} has {size} bytes and should have {end}. It is cut off or "
            "damaged; download or copy it again."
        )
    return stored, metadata


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The same items, each made in a thread while the one before it is used."""
    source, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, source, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, source, end)
            yield item


def _stored(path: Path, entry: dict[str, Any], first: int) -> Stored:
    """An entry of a header. Raises ValueError if its bytes aren't as many as its shape says."""
    begin, end = entry["data_offsets"]
    stored = Stored(path, entry["dtype"], tuple(entry["shape"]), first + begin)
    if stored.dtype in DTYPES and end - begin != stored.bytes:
        raise ValueError
    return stored


def _kind_of(path: Path, start: bytes) -> str:
    """What a file is that should have been safetensors."""
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return (
            "is a pickle, whatever its name says. It isn't opened, since unpickling runs whatever "
            "code it holds. Get the weights as safetensors."
        )
    if start[:4] == b"GGUF":
        return "is a GGUF file, which isn't read. Take a bf16 or scaled fp8 .safetensors file."
    if start == b"version ":
        return "is a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`."
    return "isn't a safetensors file, or its beginning is damaged. Download or copy it again."
