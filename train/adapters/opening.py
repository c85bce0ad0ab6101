"""Opening adapter files: one that can be used, or a sentence on what the file is instead.

Owns these refusals. What is in a file is `source`'s.
"""

from pathlib import Path

from train.adapters import layouts
from train.adapters.source import BASES, Source
from train.errors import CheckpointError


def open_any(path: Path) -> Source:
    """A file with at least one whole update of FLUX.2. Raises CheckpointError."""
    source = Source(path)
    if not source.units:
        raise CheckpointError(f"{path}: {_what_instead(source)}")
    return source


def open_adapter(path: Path) -> Source:
    """An adapter file every one of whose keys is understood, for what must not lose any.

    Raises CheckpointError that names what the file is instead.
    """
    source = open_any(path)
    _check_base(source)
    if source.unknown:
        kind = layouts.foreign_kind(source.unknown[0])
        why = f"holds {kind}, which can't be converted" if kind else "is no key of a known layout"
        raise CheckpointError(
            f"{path}: '{source.unknown[0]}' {why} ({len(source.unknown)} such keys). "
            "`kindling certify` says what is in the file."
        )
    check_whole(source)
    return source


def check_magnitudes(source: Source) -> None:
    """Raises CheckpointError for DoRA's magnitudes that are right in ComfyUI alone."""
    if source.for_comfyui:
        raise CheckpointError(
            f"{source.path}: DoRA for ComfyUI, whose magnitudes make up for ComfyUI's norms and "
            "aren't DoRA's. The run's own file for diffusers has them: `kindling export RUN`."
        )


def check_whole(source: Source) -> None:
    """Raises CheckpointError where a name's keys can't be used."""
    if source.broken:
        name, fault = next(iter(source.broken.items()))
        raise CheckpointError(f"{source.path}: {name} {fault} ({len(source.broken)} such names).")


def _what_instead(source: Source) -> str:
    """Why a file without a single usable unit isn't an adapter of FLUX.2."""
    keys = list(source.file.tensors)
    if not keys:
        return "the file is empty: it holds no tensors."
    if any(key.endswith(("img_in.weight", "x_embedder.weight", "qkv.weight", "to_q.weight"))
           for key in keys):  # fmt: skip
        return (
            "holds whole weights: it is a base model or a part of one, not an adapter. "
            "Give it to --base, and the adapter as the file."
        )
    if source.broken:
        name, fault = next(iter(source.broken.items()))
        return f"{name} {fault}, and no other name in it is whole."
    if model := layouts.other_model(keys):
        return f"this is an adapter of {model}, not of FLUX.2 ('{keys[0]}')."
    if kind := next(filter(None, map(layouts.foreign_kind, keys)), None):
        return f"this is a {kind} adapter ('{keys[0]}'), which Kindling doesn't read."
    return f"no name in it is one of FLUX.2's Linears; the first is '{keys[0]}'."


def released(source: Source) -> str:
    """The released base that a file is for, by its shapes. Raises CheckpointError for others."""
    _check_base(source)
    if source.base is None:
        raise CheckpointError(
            f"{source.path}: an adapter of a transformer {source.shape.width} wide, which no "
            "released FLUX.2 is. Give its folder as --base."
        )
    return source.base


def _check_base(source: Source) -> None:
    """Raises CheckpointError for a file as wide as a released base that doesn't fit it."""
    if source.base is not None:
        return
    shape = source.shape
    name = next((name for name, known in BASES.items() if known.width == shape.width), None)
    if name is None:
        return
    other = layouts.other_model(list(source.file.tensors))
    if name == "klein-4b" and (shape.double, shape.single) > (BASES[name].double, 0):
        other = "FLUX.1"
    unit, why = next(iter(source.misfits(BASES[name]).items()))
    instead = f"this is an adapter of {other}, not of FLUX.2. " if other else ""
    raise CheckpointError(
        f"{source.path}: {instead}It is as wide as {name}, but {unit} doesn't fit it: {why}."
    )
