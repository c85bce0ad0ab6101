"""Checkpoints: written whole or not at all, verified when read, rotated.

A checkpoint is a folder `step-000250` with the adapter, its average if the run keeps one, the
optimizer's state and a manifest of their digests. It is made under another name, flushed to disk
and renamed, so that a kill at any moment leaves the last good one. Owns files, not what training
does with them.
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
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file

from train.errors import CheckpointError
from train.files import flush, writing
from train.lora.adapter import Adapter, AnyAdapter, of_parts, with_start

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
    checks: dict[str, Any] | None = None
    """All checks of the loss on fixed pictures so far, as `verdict.History` writes them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    progress: Progress
    adapter: AnyAdapter
    optimizer: dict[str, Any]
    """The optimizer's state_dict."""
    average: AnyAdapter | None = None
    """The averaged weights, where the run keeps some."""
    start: AnyAdapter | None = None
    """What is taken off all weights: see `lora.with_start`. Only LoRA has one."""

    def shown(self, weights: str) -> AnyAdapter:
        """The update to the base as users see it.

        weights: "average" for that where there is one, "last" for the last weights.
        """
        chosen = self.average if weights == "average" and self.average else self.adapter
        if self.start is None:
            return chosen
        assert isinstance(chosen, Adapter)
        assert isinstance(self.start, Adapter)
        return with_start(chosen, self.start)


def save(folder: Path, checkpoint: Checkpoint, *, keep: int, best: int | None = None) -> Path:
    """Write `folder`/step-N atomically, then delete all but the newest `keep` up to it.

    best: the step of one more that is kept. Later ones, which can only be damaged or a past life's,
    don't count and are left to be replaced. Raises MachineError if it can't be written; the ones
    before stay.
    """
    final = path_of(folder, checkpoint.progress.step)
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
        flush(folder)
    saved = list_checkpoints(folder)
    for old in saved[: saved.index(final) + 1][:-keep]:
        if best is None or old != path_of(folder, best):
            shutil.rmtree(old)
    return final


def _write(making: Path, checkpoint: Checkpoint) -> None:
    """All files of a checkpoint, down to the disk."""
    adapter = checkpoint.adapter
    parts = {"adapter": adapter, "average": checkpoint.average, "start": checkpoint.start}
    for part, weights in parts.items():
        if weights is not None:
            save_file(_tensors(weights), making / f"{part}.safetensors")
    with (making / "optimizer.pt").open("wb") as file:  # by name, torch would hide what went wrong
        torch.save(checkpoint.optimizer, file)
    facts = {"progress": asdict(checkpoint.progress), "rank": adapter.rank, "alpha": adapter.alpha}
    facts["files"] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in making.iterdir()
    }
    facts["digest"] = _digest(facts)
    (making / MANIFEST).write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for path in (*making.iterdir(), making):
        flush(path)


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is or would be."""
    return folder / f"step-{step:06d}"


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
    adapters = {
        part: _adapter(path / f"{part}.safetensors", rank=facts["rank"], alpha=facts["alpha"])
        for part in ("adapter", "average", "start")
        if f"{part}.safetensors" in facts["files"]
    }
    progress = facts["progress"]
    return Checkpoint(
        progress=Progress(**progress | {"origin": Origin(**progress["origin"])}),
        optimizer=torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
        **adapters,
    )


def _tensors(adapter: AnyAdapter) -> dict[str, torch.Tensor]:
    return {
        f"{module}.{part}.weight": tensor
        for part, tensors in adapter.parts.items()
        for module, tensor in tensors.items()
    }


def _adapter(path: Path, *, rank: int, alpha: float) -> AnyAdapter:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    # not mapped: it is rotated away before this run ends, and Windows deletes no file that is
    for name, tensor in load_tensors(path.read_bytes()).items():
        module, part, _ = name.rsplit(".", 2)
        parts.setdefault(part, {})[module] = tensor
    return of_parts(parts, rank=rank, alpha=alpha)


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
