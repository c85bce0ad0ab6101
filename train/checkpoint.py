"""Checkpoints: written whole or not at all, verified when read, rotated.

A checkpoint is a folder `step-000250` with the adapter, the optimizer's state and a manifest of
their digests. It is made under another name, flushed to disk and renamed, so that a kill at any
moment leaves the last good one. Owns files, not what training does with them.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from train.errors import CheckpointError
from train.files import writing
from train.lora import Adapter

NAME = re.compile(r"step-(\d{6,})")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """What a run is made of; a resumed run must have the same."""

    data: str
    """Digest of the data set."""
    base: str
    """Digest of the base's weights: transformer, VAE and text encoder."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands and what it is a run of."""

    step: int
    """Optimizer steps done."""
    config: dict[str, Any]
    """The resolved config."""
    origin: Origin
    world: int
    """Processes that trained it."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    progress: Progress
    adapter: Adapter
    optimizer: dict[str, Any]
    """The optimizer's state_dict."""


def save(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write `folder`/step-N atomically, then delete all but the newest `keep` up to it.

    Later ones, which can only be damaged or a past life's, don't count and are left to be replaced.
    Raises MachineError if it can't be written; the ones before stay.
    """
    final = folder / f"step-{checkpoint.progress.step:06d}"
    making = folder / f".making-{final.name}"
    for leftover in folder.glob(".making-*"):  # of a save that was killed
        shutil.rmtree(leftover)
    with writing(final):
        making.mkdir(parents=True)
        try:
            _write(making, checkpoint)
        except BaseException:
            shutil.rmtree(making)  # it may be what filled the disk
            raise
        shutil.rmtree(final, ignore_errors=True)
        os.rename(making, final)
        _flush(folder)
    saved = list_checkpoints(folder)
    for old in saved[: saved.index(final) + 1][:-keep]:
        shutil.rmtree(old)
    return final


def _write(making: Path, checkpoint: Checkpoint) -> None:
    """All files of a checkpoint, down to the disk."""
    adapter = checkpoint.adapter
    tensors = {f"{name}.lora_A.weight": weight for name, weight in adapter.down.items()}
    tensors |= {f"{name}.lora_B.weight": weight for name, weight in adapter.up.items()}
    save_file(tensors, making / "adapter.safetensors")
    with (making / "optimizer.pt").open("wb") as file:  # by name, torch would hide what went wrong
        torch.save(checkpoint.optimizer, file)
    facts = {"progress": asdict(checkpoint.progress), "rank": adapter.rank, "alpha": adapter.alpha}
    facts["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in making.iterdir()
    }
    facts["digest"] = _digest(facts)
    (making / MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for path in (*making.iterdir(), making):
        _flush(path)


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first, verified or not."""
    found = [
        (int(m[1]), path) for path in folder.glob("step-*") if (m := NAME.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found)]


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with each newer one."""
    faults = []
    for path in reversed(list_checkpoints(folder)):
        try:
            _verified(path)
        except CheckpointError as error:
            faults.append(str(error))
        else:
            return path, faults
    return None, faults


def load(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises CheckpointError if any of its bytes differ from what was saved."""
    facts = _verified(path)
    tensors = load_file(path / "adapter.safetensors")

    def weights(kind: str) -> dict[str, torch.Tensor]:
        end = f".{kind}.weight"
        return {n.removesuffix(end): tensor for n, tensor in tensors.items() if n.endswith(end)}

    progress = facts["progress"]
    return Checkpoint(
        progress=Progress(**progress | {"origin": Origin(**progress["origin"])}),
        adapter=Adapter(weights("lora_A"), weights("lora_B"), facts["rank"], facts["alpha"]),
        optimizer=torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
    )


def _verified(path: Path) -> dict[str, Any]:
    """The manifest, after every file was found to match it."""
    try:
        facts = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        damaged = [
            name
            for name, digest in facts["files"].items()
            if hashlib.sha256((path / name).read_bytes()).hexdigest() != digest
        ]
        if facts.pop("digest") != _digest(facts):
            damaged.append(MANIFEST)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a whole checkpoint ({error})") from None
    if damaged:
        raise CheckpointError(f"{path}: {', '.join(damaged)} changed after it was saved")
    return facts


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
