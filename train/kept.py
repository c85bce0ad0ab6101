"""Quantised copies of transformers, kept in the cache so that only the first start has to quantise.

Owns their files. A copy's name is a digest of what it was made from, so it can't be stale; it is
written beside and renamed when it is whole, so it can't be half; and each tensor is compared with
its checksum when it is read, on the device that it goes to, where that costs next to nothing.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from train.cache import key
from train.errors import CheckpointError, ConfigError
from train.stored import Stored, ahead, read_header

FOLDER = "bases"
"""In the cache's folder."""

FORMAT = 1
"""Raise it when the meaning of a copy changes; old ones are then never read again."""

INDEX = "index.json"
SHARD_BYTES = 10**9
"""Bounds the RAM that writing takes."""

SPARE = 1.05
"""A copy is written where this many times its size is free."""

Named = tuple[str, Tensor]


def place(cache: Path, **facts: str) -> Path:
    """The folder of the copy that depends on these facts."""
    return cache / FOLDER / key(kind="kept base", version=FORMAT, **facts)


def has_room(folder: Path, size: int) -> bool:
    """Whether a copy of that many bytes fits on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder.parent).free > size * SPARE


def read(folder: Path, device: torch.device) -> Iterator[Named]:
    """A copy's tensors on the device. Raises CheckpointError if it isn't as it was written."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        sums, files = index["sums"], index["files"]
        stored: dict[str, Stored] = {}
        for name in files:
            stored |= read_header(folder / name, where=str(folder))[0]
        if stored.keys() != sums.keys():
            raise ValueError("its files hold other tensors than its index says")
        for name, tensor in ahead((n, part.read()) for n, part in stored.items()):
            placed = tensor.to(device)
            if checksum(placed) != sums[name]:
                raise ValueError(f"{name} doesn't match its checksum")
            yield name, placed
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{folder}: this quantised copy is damaged: {error}") from None


def writing(folder: Path, tensors: Iterable[Named]) -> Iterator[Named]:
    """The same tensors, written to a copy on their way; it is there once all have passed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, suffix=".part"))
    index: dict[str, Any] = {"files": [], "sums": {}}
    shard: dict[str, Tensor] = {}
    try:
        for name, tensor in tensors:
            index["sums"][name] = checksum(tensor)
            shard[name] = tensor.detach().cpu()
            if sum(part.nbytes for part in shard.values()) >= SHARD_BYTES:
                _flush(partial, shard, index)
            yield name, tensor
        _flush(partial, shard, index)
        (partial / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        try:
            os.replace(partial, folder)
        except OSError:  # another process has just put the same copy there
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a copy, its index first, so that half a copy never looks whole."""
    (folder / INDEX).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def checksum(tensor: Tensor) -> int:
    """Of a tensor's bits: any single change changes it. Computed on the tensor's device."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = content.numel() // 8 * 8
    tail = int.from_bytes(content[whole:].cpu().numpy().tobytes(), "little")
    words = content[:whole].view(torch.int64)
    return (int(torch.hash_tensor(words).item()) if whole else 0) ^ tail


def _flush(folder: Path, shard: dict[str, Tensor], index: dict[str, Any]) -> None:
    name = f"{len(index['files']):05d}.safetensors"
    save_file(shard, folder / name)
    with (folder / name).open("rb") as file:
        os.fsync(file.fileno())
    index["files"].append(name)
    shard.clear()
