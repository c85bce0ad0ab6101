"""Writing adapters, in the layouts that loaders know.

  diffusers  transformer. + diffusers' names, lora_A/lora_B: diffusers and ComfyUI load it
  comfyui    diffusion_model. + BFL's names, lora_A/lora_B, q, k and v fused: both load it
  kohya      lora_unet_ + BFL's names with _, lora_down/lora_up and alpha: both load it

DoRA's magnitudes have a name for each loader, lora_magnitude_vector for diffusers and dora_scale
for ComfyUI, and neither reads the other's: the first layout is for diffusers, the others are for
ComfyUI. They stay fp32, as many numbers as a weight has rows: in bf16 a whole row would be off by
up to 0.4 %. LoKr has LyCORIS' names, lokr_w1 and on; under kohya with its prefix lycoris_, too.

The scale is folded into the up half everywhere, in fp32 before rounding, since neither loader can
be told one in every layout; kohya's alpha is the rank, so that its scale is 1. Updates come in and
go out one BFL weight at a time. Owns names, rounding and what is said of both; the container is
`files`', what updates are is `updates`'.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.adapters import LAYOUTS, files, layouts
from train.adapters.intent import PEFT_METADATA, PREFIX
from train.adapters.source import Group
from train.adapters.updates import (
    Factors,
    Kronecker,
    LowRank,
    Update,
    halves_swapped,
    inner,
    kronecker_distance,
    norm,
    stacked,
)
from train.errors import CheckpointError, ConfigError
from train.loading.names import SWAPPED

MAX_ROUNDING_LOSS = 0.01
"""Of a tensor's norm. bf16 loses at most 0.4 %; fp16 loses more only where weights are too small
for it."""

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Metadata that are true of one file only."""

Named = tuple[str, Tensor]


@dataclass
class Outcome:
    """What was written, filled in on the way."""

    ranks: dict[str, int] = field(default_factory=dict)
    """Name of a written weight -> rank; LoKr's have none."""
    modules: list[str] = field(default_factory=list)
    dora: bool = False
    error: float = 0.0
    """The largest |written - meant| / |meant| of a module's update; 0 is exact."""
    worst: str = ""
    """Its module."""


def save(
    groups: Iterable[tuple[str, Group]],
    path: Path,
    *,
    layout: str,
    dtype: torch.dtype | None,
    metadata: dict[str, str],
) -> Outcome:
    """Write an adapter, one group in memory at a time.

    dtype: None keeps each tensor's own. metadata: kept, but for what would be false of this file
    (hashes, peft's settings, rank and alpha), which is written anew. Raises CheckpointError for
    numbers that aren't finite and for updates that the layout can't hold, ConfigError where dtype
    can't hold them, MachineError where the disk refuses.
    """
    assert layout in LAYOUTS
    outcome = Outcome()

    def pieces() -> Iterator[Named]:
        for weight, group in groups:
            outcome.modules += group
            yield from _tensors(weight, group, layout, dtype, outcome)

    def describe(digest: str) -> dict[str, str]:
        return _metadata(metadata, outcome, layout, digest)

    files.write(path, pieces(), describe=describe)
    return outcome


def _tensors(
    weight: str, group: Group, layout: str, dtype: torch.dtype | None, outcome: Outcome
) -> Iterator[Named]:
    if layout == "diffusers" or (layout == "comfyui" and not _one_dora(weight, group)):
        yield from _by_module(group, layout, dtype, outcome)
        return
    kohya = layout == "kohya"
    if kohya and not _one_lokr(weight, group):
        for module, update in group.items():
            assert isinstance(update, Kronecker)
            flat = f"lycoris_{module.replace('.', '_')}"
            yield from _lokr(flat, update, dtype, module, outcome)
            rank = 1 if update.halves is None else len(update.halves[1])
            yield f"{flat}.alpha", torch.tensor(float(rank))
        return
    name = f"lora_unet_{weight.replace('.', '_')}" if kohya else f"diffusion_model.{weight}"
    yield from _update(name, fused(weight, group), layout, dtype, weight, outcome)


def _by_module(
    group: Group, layout: str, dtype: torch.dtype | None, outcome: Outcome
) -> Iterator[Named]:
    """Under diffusers' names, which ComfyUI takes for those rows of its weight."""
    for module, update in group.items():
        yield from _update(f"{PREFIX}{module}", update, layout, dtype, module, outcome)


def _update(
    name: str,
    update: Update,
    layout: str,
    dtype: torch.dtype | None,
    module: str,
    outcome: Outcome,
) -> Iterator[Named]:
    """All tensors of one, under its name in the file."""
    if isinstance(update, Kronecker):
        yield from _lokr(name, update, dtype, module, outcome)
        return
    kohya = layout == "kohya"
    down, up = _halves(update, dtype, module, outcome)
    yield f"{name}.{'lora_down' if kohya else 'lora_A'}.weight", down
    yield f"{name}.{'lora_up' if kohya else 'lora_B'}.weight", up
    if kohya:
        yield f"{name}.alpha", torch.tensor(float(update.rank))
    if update.magnitude is not None:
        yield _magnitude(name, update.magnitude, layout, module)


def _magnitude(name: str, magnitude: Tensor, layout: str, module: str) -> Named:
    """Never rounded; ComfyUI takes (rows, 1) for one of rows."""
    written = _rounded(magnitude, _writable(magnitude.dtype), module)
    if layout == "diffusers":
        return f"{name}.lora_magnitude_vector", written
    return f"{name}.dora_scale", written[:, None]


def _one_lokr(weight: str, group: Group) -> bool:
    """Whether a group isn't LoKr, or came from one over all modules of its BFL weight."""
    rights = [u.right for u in group.values() if isinstance(u, Kronecker)]
    whole = len(rights) == len(layouts.group_of(weight)) > 1
    return not rights or (whole and all(right is rights[0] for right in rights))


def _one_dora(weight: str, group: Group) -> bool:
    """Whether a group isn't DoRA, or has magnitudes for all rows of its BFL weight."""
    dora = [isinstance(u, LowRank) and u.magnitude is not None for u in group.values()]
    return not any(dora) or (all(dora) and len(dora) == len(layouts.group_of(weight)))


def fused(weight: str, group: Group) -> Update:
    """A group as one update of the BFL weight, exact. Raises CheckpointError where there is none.

    LoRA fuses always, DoRA where all parts have it, LoKr where the parts share their right side.
    """
    names = layouts.group_of(weight)
    parts = [group.get(name) for name in names]
    if names == (SWAPPED,):
        return halves_swapped(group[SWAPPED])
    if len(names) == 1:
        return group[names[0]]
    if any(isinstance(part, Kronecker) for part in parts):
        return _fused_kronecker(weight, parts)
    low = [part for part in parts if isinstance(part, LowRank)]
    dora = [part.magnitude is not None for part in low]
    if any(dora) and (not all(dora) or len(low) < len(names)):
        raise CheckpointError(
            f"{weight}: only some of q, k and v are DoRA, and BFL's names hold them as one weight. "
            "The comfyui layout can hold it under diffusers' names."
        )
    return stacked([group.get(name) for name in names], low[0].size[0])


def _fused_kronecker(weight: str, parts: list[Update | None]) -> Kronecker:
    kron = [part for part in parts if isinstance(part, Kronecker)]
    first = kron[0]
    alike = [part for part in kron if part.right is first.right and part.scale == first.scale]
    if len(alike) < len(parts):
        raise CheckpointError(
            f"{weight}: LoKr of q, k and v with factors of their own can't be one LoKr of BFL's "
            "fused weight. The layout diffusers is loaded by ComfyUI, too; kindling convert --rank "
            "N makes plain LoRA of it."
        )
    left = torch.cat([part.left for part in alike])
    return Kronecker(left, first.right, first.scale, first.halves)


def _halves(
    update: LowRank, dtype: torch.dtype | None, name: str, outcome: Outcome
) -> tuple[Tensor, Tensor]:
    """down and up as written, the scale in up; what that costs goes to the outcome."""
    outcome.ranks[name] = update.rank
    outcome.dora |= update.magnitude is not None
    up, down = update.scale * update.up.float(), update.down.float()
    written_down = _rounded(down, dtype or _writable(update.down.dtype), name)
    written_up = _rounded(up, dtype or _writable(update.up.dtype), name)
    if not (torch.equal(written_up.float(), up) and torch.equal(written_down.float(), down)):
        meant = up.double(), down.double()
        error = _distance(meant, (written_up.double(), written_down.double()))
        if error > outcome.error:
            outcome.error, outcome.worst = error, name
    return written_down, written_up


def _distance(meant: Factors, written: Factors) -> float:
    """Relative, from inner products: their cancellation leaves 1e-8, far below a rounding."""
    size = inner(meant, meant)
    gap = size - 2 * inner(meant, written) + inner(written, written)
    return (max(gap, 0.0) / size) ** 0.5 if size else 0.0


def _lokr(
    name: str, update: Kronecker, dtype: torch.dtype | None, module: str, outcome: Outcome
) -> Iterator[Named]:
    """The factors, the scale in the left one; what rounding costs goes to the outcome."""
    left = update.scale * update.left.float()
    halves = update.halves or (update.right,)
    ends = ("w1", "w2") if update.halves is None else ("w1", "w2_a", "w2_b")
    kept = (update.left.dtype, *(half.dtype for half in halves))
    written = [
        _rounded(factor.float(), dtype or _writable(own), module)
        for factor, own in zip((left, *halves), kept, strict=True)
    ]
    right = written[1].float() if update.halves is None else written[1].float() @ written[2].float()
    size = norm(update)
    error = kronecker_distance(update, Kronecker(written[0], right)) / size if size else 0.0
    if error > outcome.error:
        outcome.error, outcome.worst = error, module
    for end, factor in zip(ends, written, strict=True):
        yield f"{name}.lokr_{end}", factor


def _writable(dtype: torch.dtype) -> torch.dtype:
    """A tensor's own type; fp8 and fp64, which adapters aren't written in, become fp32."""
    return dtype if dtype in files.DTYPE_NAMES else torch.float32


def _rounded(weight: Tensor, dtype: torch.dtype, module: str) -> Tensor:
    if not torch.isfinite(weight).all():
        raise CheckpointError(
            f"The adapter's weights of {module} aren't finite: the training diverged before this "
            "point. Export an earlier checkpoint, and train on with a lower optim.lr."
        )
    result = weight.to("cpu", dtype).contiguous()
    loss = torch.linalg.vector_norm(result.float() - weight.cpu())
    if not loss <= MAX_ROUNDING_LOSS * torch.linalg.vector_norm(weight.cpu()):
        raise ConfigError(
            f"dtype: the weights of {module} are too large or too small for "
            f"{str(dtype).removeprefix('torch.')}. Write bf16 or fp32."
        )
    return result


def _metadata(given: dict[str, str], outcome: Outcome, layout: str, digest: str) -> dict[str, str]:
    stale = {*HASHES, PEFT_METADATA, "ss_network_dim", "ss_network_alpha"}
    kept = {key: value for key, value in given.items() if key not in stale}
    kept |= {"format": "pt", "sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}
    ranks = set(outcome.ranks.values())
    if outcome.ranks:
        dim = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
        kept |= {"ss_network_dim": dim, "ss_network_alpha": dim}
        if dim != "Dynamic" and layout == "diffusers" and not outcome.dora:
            kept[PEFT_METADATA] = _peft_settings(outcome.modules, int(dim))
    return kept


def _peft_settings(modules: list[str], rank: int) -> str:
    """peft's LoraConfig as diffusers reads it; without the keys that older peft wouldn't know.

    For one rank throughout only: otherwise diffusers reads all ranks from the tensors.
    """
    settings: dict[str, Any] = {
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules,
    }
    return json.dumps({f"{PREFIX}{k}": v for k, v in settings.items()}, indent=2, sort_keys=True)
