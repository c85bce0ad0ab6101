"""Adapter files of any program, made ready for a base's transformer at the strength they were
meant.

A file is tried on a skeleton of the base first, as `kindling certify` does. One that diffusers'
loader takes as it was meant is loaded as it is; another is converted. Owns that choice, and that
nothing is dropped without a word.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.adapters import loaders, skeleton
from train.adapters.opening import check_magnitudes, check_whole, open_any
from train.adapters.source import BASES, Source
from train.adapters.updates import tensors_of
from train.adapters.write import save
from train.errors import CheckpointError
from train.loading.names import Shape


@dataclass(frozen=True)
class Ready:
    """A file that diffusers loads as its adapter was meant."""

    path: Path
    notes: tuple[str, ...] = ()
    """What became of it on the way."""


def ready(path: Path, settings: Mapping[str, Any], *, scratch: Path) -> Ready:
    """`path`, or a converted copy in `scratch`.

    settings: of the base's transformer. Raises CheckpointError for a file that is no adapter, of
    another base, or can't be loaded in any form.
    """
    source = open_any(path)
    check_whole(source)
    check_magnitudes(source)
    shape = Shape.of(skeleton.of_settings(settings, meta=True).transformer)
    _check_fit(source, shape)
    _check_finite(source)
    notes = []
    if source.unknown:
        count, first = len(source.unknown), source.unknown[0]
        notes.append(f"{path.name}: {count} keys are no part of it, such as {first}")
    verdict = _ask(source, shape, settings)
    if verdict["exact"] or (source.unknown and _only_unknown(verdict, source)):
        return Ready(path, tuple(notes))
    copy = scratch / f"{len(list(scratch.iterdir()))}-{path.name}"
    save(source.walk(), copy, layout="diffusers", dtype=None, metadata={})
    again = _ask(Source(copy), shape, settings)
    if not again["exact"]:
        raise CheckpointError(f"{path}: diffusers can't load it: {'; '.join(again['reasons'])}.")
    notes.append(f"{path.name}: converted, as diffusers' loader alone: {verdict['reasons'][0]}")
    return Ready(copy, tuple(notes))


def _ask(source: Source, shape: Shape, settings: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' verdict, on a skeleton of its own."""
    pipeline = skeleton.of_settings(settings, meta=loaders.fuses_lokr(source))
    return loaders.ask_diffusers(source, loaders.meant_by(source, shape), pipeline)


def _check_finite(source: Source) -> None:
    """Raises CheckpointError for numbers that would make every picture black."""
    for unit in source.units.values():
        if not all(torch.isfinite(t.float()).all() for t in tensors_of(source.whole(unit))):
            raise CheckpointError(
                f"{source.path}: {unit.name} holds numbers that aren't finite. "
                "`kindling certify` lists them all; the file can't be mended."
            )


def _only_unknown(verdict: dict[str, Any], source: Source) -> bool:
    """Whether all that is loaded is exact but for keys that belong to nothing."""
    keys = verdict["keys"]
    return verdict["loads"] and all(
        status in (loaders.USED, loaders.SPARE) or key in source.unknown
        for key, status in keys.items()
    )


def _check_fit(source: Source, shape: Shape) -> None:
    """Raises CheckpointError for an adapter of another base."""
    misfits = source.misfits(shape)
    if not misfits:
        return
    base = next((name for name, known in BASES.items() if known == shape), None)
    ours = base or f"{shape.width} wide with {shape.double} + {shape.single} blocks"
    theirs = f"of {source.base}" if source.base else "of another base"
    name, why = next(iter(misfits.items()))
    raise CheckpointError(
        f"{source.path}: an adapter {theirs}, but the base is {ours}: {name}: {why} "
        f"({len(misfits)} such Linears)."
    )
