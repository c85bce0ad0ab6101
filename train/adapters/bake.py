"""Adding updates to a base's weights, shard by shard.

A diffusers folder becomes a folder like it, or one file in BFL's names as ComfyUI loads it; a
single file becomes one in its own names. The base is never changed; the result is written beside
and renamed. Memory holds the adapter, one weight and its copy, and a few of its rows as fp32.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.linalg import vector_norm

from train.adapters import files, layouts
from train.adapters.files import File
from train.adapters.updates import LowRank, halves_swapped
from train.errors import CheckpointError, MachineError
from train.loading import names, weights
from train.loading.names import SWAPPED

CHUNK = 1 << 22
"""Numbers of a weight that are changed at a time: 17 MB as fp32."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Before the names in some single files."""

PLAIN = ("F32", "BF16", "F16")


@dataclass
class Baked:
    """What became of the base."""

    tensors: int = 0
    changed: int = 0
    lost: float = 0.0
    """Squared norm of what rounding took away or added."""
    norm: float = 0.0
    """Squared norm of all updates."""

    @property
    def loss(self) -> float:
        """Share of the adapter's norm."""
        return (self.lost / self.norm) ** 0.5 if self.norm else 0.0


def bake(groups: Iterable[tuple[str, dict[str, LowRank]]], base: Path, output: Path) -> Baked:
    """Write `base` with all updates added. output: a folder like the base's, or one .safetensors.

    groups: as `merge.updates_of`; all are held in memory, an adapter's size. Raises CheckpointError
    if a weight for an update is missing, of another shape or quantised.
    """
    updates = {module: update for _, group in groups for module, update in group.items()}
    shards, extra = _shards(base)
    opened = [File(path) for path in shards]
    _check(updates, opened, base)
    baked = Baked()
    if output.suffix == ".safetensors":
        metadata = {**opened[0].metadata, "format": "pt"}
        pieces = _pieces(opened[0], updates, baked)
        if extra:
            pieces = _in_bfl_names(opened[0].path.parent, updates, baked)
        files.write(output, pieces, describe=lambda digest: metadata)
        return baked
    with _new_folder(output) as folder:
        for path in extra:
            shutil.copyfile(path, folder / path.name)
        for file in opened:
            metadata = {**file.metadata, "format": "pt"}
            files.write(
                folder / file.path.name,
                _pieces(file, updates, baked),
                describe=lambda digest, metadata=metadata: metadata,
            )
    return baked


def add_into(weight: Tensor, update: LowRank, baked: Baked) -> None:
    """Add an update to a weight in place, rounded once to its type; the loss goes to `baked`."""
    up, down = update.factors(torch.float32)
    height = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), height):
        rows = slice(start, start + height)
        delta = up[rows] @ down
        exact = weight[rows].float() + delta
        weight[rows] = exact  # rounds
        exact -= weight[rows]
        baked.lost += vector_norm(exact, dtype=torch.float64).item() ** 2
        baked.norm += vector_norm(delta, dtype=torch.float64).item() ** 2


def _in_bfl_names(
    folder: Path, updates: dict[str, LowRank], baked: Baked
) -> Iterator[tuple[str, Tensor]]:
    """A diffusers folder's weights as the tensors of a BFL file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    source = weights.open_folder(folder, config)
    homes = names.bfl_homes(config)
    parts: dict[str, list[str]] = {}
    for name, home in homes.items():
        parts.setdefault(home.key, []).append(name)
    for key, together in parts.items():
        tensors = []
        for name in together:
            tensor = source.pieces[name].read().values
            baked.tensors += 1
            if update := updates.get(name.removesuffix(".weight")):
                baked.changed += 1
                tensor = tensor.clone()
                add_into(tensor, update, baked)
            tensors.append(torch.cat(tensor.chunk(2)[::-1]) if homes[name].swapped else tensor)
        yield key, torch.cat(tensors) if len(tensors) > 1 else tensors[0]


def _pieces(file: File, updates: dict[str, LowRank], baked: Baked) -> Iterator[tuple[str, Tensor]]:
    for key in file.tensors:
        tensor = file.get(key)
        baked.tensors += 1
        modules = _modules(key)
        if any(module in updates for module in modules):
            baked.changed += 1
            tensor = tensor.clone()
            height = len(tensor) // len(modules)
            for i, module in enumerate(modules):
                if module in updates:
                    rows = slice(i * height, (i + 1) * height)
                    update = updates[module]
                    if module == SWAPPED and not key.removesuffix(".weight").endswith(SWAPPED):
                        update = halves_swapped(update)
                    add_into(tensor[rows], update, baked)
        yield key, tensor.contiguous()


def _modules(key: str) -> tuple[str, ...]:
    """diffusers' modules whose rows a base's tensor holds; none for norms and the like."""
    if not key.endswith(".weight"):
        return ()
    prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
    target = layouts.find(key.removeprefix(prefix).removesuffix(".weight"))
    return target.modules if target is not None and not target.partial else ()


def _check(updates: dict[str, LowRank], opened: list[File], base: Path) -> None:
    """Every update has its weight, plain and of its shape. Raises CheckpointError."""
    homes: dict[str, tuple[str, str, tuple[int, ...]]] = {}
    for file in opened:
        for key, stored in file.tensors.items():
            modules = _modules(key)
            for module in modules:
                rows = stored.shape[0] // len(modules)
                homes[module] = key, stored.dtype, (rows, *stored.shape[1:])
            if stored.dtype not in PLAIN:
                raise CheckpointError(
                    f"{base}: '{key}' is stored as {stored.dtype}. An adapter is merged into plain "
                    "bf16, fp16 or fp32 weights; quantise the result afterwards."
                )
    for module, update in updates.items():
        if module not in homes:
            raise CheckpointError(f"{base}: has no weight for the adapter's {module}.")
        if homes[module][2] != update.size:
            raise CheckpointError(
                f"{base}: {homes[module][0]} gives {module} the shape {homes[module][2]}, the "
                f"adapter's is {update.size}: it was trained on another base."
            )


def _shards(base: Path) -> tuple[list[Path], list[Path]]:
    """The base's weight files, and what else its folder needs. Raises CheckpointError."""
    if base.is_file():
        return [base], []
    folder = base / "transformer" if (base / "transformer").is_dir() else base
    shards = sorted(folder.glob("*.safetensors"))
    index = next(iter(folder.glob("*.safetensors.index.json")), None)
    if index is not None:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(names - {path.name for path in shards}):
            raise CheckpointError(f"{folder}: {missing[0]} is missing ({len(missing)} such files).")
        shards = [path for path in shards if path.name in names]
    if not shards:
        raise CheckpointError(
            f"{base}: no safetensors in it. Give a diffusers folder, its transformer, or one file."
        )
    extra = [path for path in sorted(folder.glob("*.json")) if path.is_file()]
    if not any(path.name == "config.json" for path in extra):
        raise CheckpointError(f"{folder}: has no config.json; it isn't a diffusers folder.")
    return shards, extra


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder that becomes `output` when the block ends well, and vanishes otherwise."""
    if output.exists():
        raise MachineError(f"{output}: exists already. Name a folder that doesn't.")
    making = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        making.mkdir(parents=True)
        yield making
        os.replace(making, output)
    except OSError as error:
        raise MachineError(f"{output}: can't be written ({error}).") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
