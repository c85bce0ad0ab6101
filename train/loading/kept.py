"""Quantised copies of transformers, kept in the cache so that only the first start has to quantise.

Owns their files. A copy's name is a digest of what it was made from, so it can't be stale; it is
written beside and renamed when it is whole, so it can't be half; and each tensor is compared with
its checksum when it is read, on the device that it goes to, where that costs next to nothing.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from train.encoding.cache import key
from train.errors import CheckpointError, ConfigError
from train.files import flush
from train.loading.stored import Stored, ahead, read_header

FOLDER = "bases"
"""In the cache's folder."""

FORMAT = 1
"""Raise it when the meaning of a copy changes; old ones are then never read again."""

INDEX = "index.json"
SHARD_BYTES = 10**9
"""Bounds the RAM that writing takes."""

SPARE = 1.05
"""A copy is written where this many times its size is free."""

PARTIAL = ".part"
ABANDONED_SECONDS = 3600
"""A copy that nothing has been written to for so long is of a process that died."""

Named = tuple[str, Tensor]


def place(cache: Path, **facts: str) -> Path:
    """The folder of the copy that depends on these facts."""
    return cache / FOLDER / key(kind="kept base", version=FORMAT, **facts)


def has_room(folder: Path, size: int) -> bool:
    """Whether a copy of that many bytes fits on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder.parent).free > size * SPARE


def sweep(cache: Path) -> None:
    """Delete what processes that died while writing have left."""
    for path in (cache / FOLDER).glob(f"*{PARTIAL}"):
        with suppress(FileNotFoundError):  # another process sweeps, too
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def read(folder: Path, device: torch.device) -> Iterator[Named]:
    """A copy's tensors on the device. Raises CheckpointError if it isn't as it was written."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        sums: dict[str, int] = index["sums"]
        stored: dict[str, Stored] = {}
        for name, size in index["files"].items():
            if (folder / name).stat().st_size != size:
                raise ValueError(f"{name} is cut off")
            stored |= read_header(folder / name, where="its header")[0]
        if stored.keys() != sums.keys():
            raise ValueError("its files hold other tensors than its index says")
        # as they were written: inside a file, safetensors has an order of its own
        for name, tensor in ahead((name, stored[name].read()) for name in sums):
            placed = tensor.to(device)
            if checksum(placed) != sums[name]:
                raise ValueError(f"{name} doesn't match its checksum")
            yield name, placed
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(f"damaged ({error})") from None


def writing(folder: Path, tensors: Iterable[Named]) -> Iterator[Named]:
    """The same tensors, written to a copy on their way; it is there once all have passed.

    A disk that doesn't take it costs the copy, which is said, and not the start.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, suffix=PARTIAL))
    copy = _Copy(partial)
    try:
        for name, tensor in tensors:
            copy.add(name, tensor)
            yield name, tensor
        copy.finish(folder)
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


class _Copy:
    """A copy on its way to the disk, a shard at a time."""

    def __init__(self, partial: Path) -> None:
        self._partial = partial
        self._shard: dict[str, Tensor] = {}
        self._files: dict[str, int] = {}
        self._sums: dict[str, int] = {}
        self._failed = False

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one more tensor."""
        if self._failed:
            return
        self._sums[name] = checksum(tensor)
        self._shard[name] = tensor.detach().cpu()
        if sum(part.nbytes for part in self._shard.values()) >= SHARD_BYTES:
            self._try(self._flush)

    def finish(self, folder: Path) -> None:
        """Give the whole copy its name, unless another process has just done so."""
        self._try(self._flush)
        self._try(self._write_index)
        self._try(lambda: self._publish(folder))

    def _try(self, write: Callable[[], object]) -> None:
        if self._failed:
            return
        try:
            write()
        except (OSError, SafetensorError) as error:
            self._failed = True
            self._shard.clear()
            shutil.rmtree(self._partial, ignore_errors=True)
            tqdm.write(
                f"{self._partial.parent}: the quantised copy can't be written ({error}); "
                "each start has to quantise again"
            )

    def _flush(self) -> None:
        path = self._partial / f"{len(self._files):05d}.safetensors"
        save_file(self._shard, path)
        flush(path)
        self._files[path.name] = path.stat().st_size
        self._shard.clear()

    def _write_index(self) -> None:
        index = {"files": self._files, "sums": self._sums}
        (self._partial / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")

    def _publish(self, folder: Path) -> None:
        try:
            self._partial.rename(folder)
        except OSError:  # another process has just put the same copy there
            if not folder.is_dir():
                raise
