"""An adapter of fewer ranks, the nearest one there is. Owns that, and words for what is kept."""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from train.adapters.convert import layout_of
from train.adapters.opening import open_adapter
from train.adapters.updates import LowRank, Update, truncated
from train.adapters.write import Outcome, save
from train.errors import CheckpointError, ConfigError
from train.loading.base import DTYPES


@dataclass
class Kept:
    """What is left of each unit, by its name in the file."""

    energy: dict[str, float] = field(default_factory=dict)
    rank: dict[str, int] = field(default_factory=dict)


def resize(
    path: Path,
    output: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    to: str | None = None,
    dtype: str | None = None,
) -> tuple[Outcome, Kept]:
    """Write `path`'s adapter to `output` with fewer ranks, and what is kept of every update.

    Raises ConfigError if neither or a wrong rank or energy is given, CheckpointError if the file
    can't be read or is DoRA.
    """
    check(rank, energy)
    source, kept = open_adapter(path), Kept()
    if any(unit.magnitudes for unit in source.units.values()):
        raise CheckpointError(
            f"{path}: this is DoRA, whose magnitudes belong to the whole update; it can't be cut."
        )

    def reduce(name: str, update: Update) -> LowRank:
        result, kept.energy[name] = truncated(update, rank=rank, energy=energy)
        kept.rank[name] = result.rank
        return result

    outcome = save(
        source.walk(reduce=reduce),
        output,
        layout=to or layout_of(source),
        dtype=DTYPES[dtype or "fp32"],
        metadata=source.file.metadata | {"kindling.resized": f"rank {rank}, energy {energy}"},
    )
    return outcome, kept


def check(rank: int | None, energy: float | None) -> None:
    """Raises ConfigError for what can't be asked for."""
    if rank is None and energy is None:
        raise ConfigError("say --rank N, --energy 0.99, or both (the stricter counts).")
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: {rank} is no rank; it must be 1 or more.")
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"--energy: {energy} is no share; it must be above 0 and at most 1.")


def summary(kept: Kept) -> str:
    """Ranks and energies, in a line."""
    ranks, energies = kept.rank.values(), kept.energy.values()
    worst = min(kept.energy, key=lambda name: kept.energy[name])
    median = statistics.median(energies)
    return (
        f"rank {min(ranks)} to {max(ranks)}; energy kept: median {median:.2%}, "
        f"least {kept.energy[worst]:.2%} at {worst}"
    )
