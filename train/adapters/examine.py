"""What is in an adapter file, anyone's, and what each loader does with every key of it.

Owns the report. The loaders' verdicts are `loaders`'; for our own exports,
`certify` proves more (the outputs of a real base).
"""

import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from train.adapters import files, layouts, loaders, rounding, skeleton
from train.adapters.opening import open_any, released
from train.adapters.source import BASES, Source
from train.adapters.updates import Kronecker, Update, inner, tensors_of
from train.loading.names import Shape

REMEDY = "`kindling convert FILE OUTPUT --to diffusers` makes one that both load at strength 1"


def examine(path: Path, *, base: str | None = None) -> dict[str, Any]:
    """A JSON-able report on one adapter file.

    base: dev, klein-4b, klein-9b or a diffusers folder; None infers it from the tensors' shapes.
    Raises CheckpointError if the file is no adapter of FLUX.2 or can't be read, ConfigError for a
    base that doesn't exist.
    """
    source = open_any(path)
    pipeline = skeleton.pipeline(base or released(source), meta=loaders.fuses_lokr(source))
    shape = Shape.of(pipeline.transformer)
    meant = loaders.meant_by(source, shape)
    numbers = _numbers(source)
    verdicts = {
        "diffusers": loaders.ask_diffusers(source, meant, pipeline),
        "comfyui": loaders.ask_comfyui(source, meant, shape),
    }
    misfits = source.misfits(shape)
    exact = all(verdict["exact"] for verdict in verdicts.values())
    losses = {}
    if base is not None and base not in BASES and not (misfits or numbers["faults"]):
        losses = rounding.measure(source, Path(base))
    return {
        "file": {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": files.file_hash(path),
            "tensors": len(source.file.tensors),
            "dtypes": dict(Counter(stored.dtype for stored in source.file.tensors.values())),
        },
        "format": layouts.describe(source.keys),
        "base": {"name": base or source.base, "given": base is not None}
        | {"width": shape.width, "double": shape.double, "single": shape.single},
        "adapter": _adapter(source),
        "passed": exact and not misfits and not numbers["faults"],
        "remedy": None if exact or not _is_convertible(source, misfits, numbers) else REMEDY,
        "misfits": misfits,
        "unusable": source.broken,
        "numbers": numbers,
        "rounding": losses,
        **verdicts,
    }


def _is_convertible(source: Source, misfits: dict[str, str], numbers: dict[str, Any]) -> bool:
    """Whether `kindling convert` makes a file of it that both loaders take."""
    plain = all("up" in unit.keys and not unit.magnitudes for unit in source.units.values())
    return plain and not (source.unknown or source.broken or misfits or numbers["faults"])


def _adapter(source: Source) -> dict[str, Any]:
    units = list(source.units.values())
    kinds = {
        "LoKr" if "up" not in unit.keys else "DoRA" if unit.magnitudes else "LoRA" for unit in units
    }
    ranks = Counter(str(source.rank(unit)) for unit in units)
    scales = Counter(f"{source.scale(unit):.6g}" for unit in units)
    alphas = Counter(str(source.alpha(unit)) for unit in units)
    stated = source.intent.alpha is not None
    targets = Counter(_part(unit.target.weight) for unit in units)
    return {
        "kind": " and ".join(sorted(kinds)),
        "linears": len(units),
        "ranks": dict(ranks),
        "alphas": dict(alphas),
        "scales": dict(scales),
        "scale_from": "alpha tensors" if list(alphas) != ["None"] else
                      "metadata" if stated else "nothing: 1",
        "targets": dict(targets),
    }  # fmt: skip


def _part(weight: str) -> str:
    """The kind of Linear, without its block's number."""
    blocks, _, rest = weight.partition(".")
    return f"{blocks}.*.{rest.partition('.')[2]}" if rest[:1].isdigit() else weight


def _numbers(source: Source) -> dict[str, Any]:
    """Norms of the updates, and numbers that spoil a picture."""
    norms, faults, zero = {}, [], []
    for unit in source.units.values():
        whole = source.whole(unit)
        tensors = tensors_of(whole)
        bad = sum(int((~torch.isfinite(t.float())).sum()) for t in tensors)
        if bad:
            faults.append(f"{unit.name}: {bad} numbers aren't finite")
            continue
        size = _norm(whole)
        if not math.isfinite(size):
            faults.append(f"{unit.name}: its update is too large for fp32")
            continue
        norms[unit.name] = size
        if not size:
            zero.append(unit.name)
    if zero and len(zero) == len(norms):
        faults.append("every update is zero: the adapter changes nothing")
    values = sorted(norms.values())
    return {
        "faults": faults,
        "zero": zero,
        "norms": norms,
        "norm": {
            "least": values[0],
            "median": statistics.median(values),
            "greatest": values[-1],
            "greatest_at": max(norms, key=lambda name: norms[name]),
        }
        if values
        else None,
    }


def _norm(update: Update) -> float:
    if isinstance(update, Kronecker):
        sides = update.left.double().norm() * update.right.double().norm()
        return abs(update.scale) * sides.item()
    factors = update.factors(torch.float32)
    return max(inner(factors, factors), 0.0) ** 0.5
