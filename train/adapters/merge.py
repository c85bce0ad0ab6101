"""Weighted sums of adapters. Owns their opening, the sum, one weight at a time, and its file."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from train.adapters import layouts
from train.adapters.opening import open_adapter
from train.adapters.resize import Kept, check
from train.adapters.source import Group, Source
from train.adapters.updates import Kronecker, LowRank, Update, summed, truncated
from train.adapters.write import Outcome, save
from train.errors import CheckpointError, ConfigError
from train.loading.base import DTYPES


@dataclass(frozen=True)
class Part:
    """An adapter and how strongly it counts."""

    source: Source
    weight: float


def open_part(text: str) -> Part:
    """From FILE or FILE:WEIGHT. Raises ConfigError, CheckpointError."""
    path, colon, weight = text.rpartition(":")
    if not colon or not path.endswith(".safetensors"):
        return Part(open_adapter(Path(text)), 1.0)
    try:
        return Part(open_adapter(Path(path)), float(weight))
    except ValueError:
        raise ConfigError(f"{text}: '{weight}' is no number; FILE:0.8 is meant.") from None


def merge(
    parts: list[Part],
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    to: str = "diffusers",
    dtype: str = "fp32",
) -> tuple[Outcome, Kept]:
    """Write the weighted sum of adapters; without rank and energy it is exact.

    Raises CheckpointError if they don't fit each other or hold DoRA or LoKr, which don't add up.
    """
    if rank is not None or energy is not None:
        check(rank, energy)
    kept = Kept()

    def cut() -> Iterator[tuple[str, Group]]:
        for weight, group in updates_of(parts):
            if rank is not None or energy is not None:
                for module, update in group.items():
                    group[module], kept.energy[module] = truncated(update, rank=rank, energy=energy)
                    kept.rank[module] = group[module].rank
            yield weight, {**group}

    names = ", ".join(f"{part.source.path.name}:{part.weight:g}" for part in parts)
    metadata = {"kindling.merged_from": names} | _spec(parts, title=output.stem)
    outcome = save(cut(), output, layout=to, dtype=DTYPES[dtype], metadata=metadata)
    return outcome, kept


def _spec(parts: list[Part], *, title: str) -> dict[str, str]:
    """ModelSpec's fields of a merge, where all parts have them and are for one base."""
    given = [part.source.file.metadata for part in parts]
    kept = {
        key: given[0].get(key)
        for key in (
            "modelspec.sai_model_spec",
            "modelspec.architecture",
            "modelspec.implementation",
            "modelspec.license",
        )
        if len({metadata.get(key) for metadata in given}) == 1
    }
    if None in (kept.get("modelspec.architecture"), kept.get("modelspec.sai_model_spec")):
        return {}
    titles = [
        metadata.get("modelspec.title", part.source.path.stem)
        for part, metadata in zip(parts, given, strict=True)
    ]
    kept |= {"modelspec.title": title, "modelspec.merged_from": ", ".join(titles)}
    return {key: value for key, value in kept.items() if value is not None}


def updates_of(parts: list[Part]) -> Iterator[tuple[str, dict[str, LowRank]]]:
    """The weighted sum, one BFL weight at a time, in the model's order. Raises CheckpointError."""
    weights = {weight for part in parts for weight in part.source.groups}
    for part in parts:
        _check_fit(part.source, parts[0].source)
    for weight in sorted(weights, key=layouts.order):
        found: dict[str, list[tuple[LowRank, float]]] = {}
        for part in parts:
            for module, update in part.source.group(weight).items():
                found.setdefault(module, []).append((_plain(update, part), part.weight))
        modules = [module for module in layouts.group_of(weight) if module in found]
        yield weight, {m: summed(*map(list, zip(*found[m], strict=True))) for m in modules}


def _plain(update: Update, part: Part) -> LowRank:
    """The update, if it is LoRA. Raises CheckpointError."""
    if isinstance(update, Kronecker):
        raise CheckpointError(
            f"{part.source.path}: LoKr doesn't add up with other adapters. "
            "`kindling convert --rank N` makes LoRA of it."
        )
    if update.magnitude is not None:
        raise CheckpointError(f"{part.source.path}: DoRA doesn't add up with other adapters.")
    return update


def _check_fit(source: Source, first: Source) -> None:
    """Raises CheckpointError for adapters of two bases."""
    wide, other = source.shape.width, first.shape.width
    if wide != other or (source.base and first.base and source.base != first.base):
        raise CheckpointError(
            f"{source.path} is for {source.base or f'a base {wide} wide'}, {first.path} for "
            f"{first.base or f'one {other} wide'}: they don't add up."
        )
