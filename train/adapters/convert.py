"""An adapter in another layout, or LoRA made of its LoKr. Owns that, and words for what it cost."""

from pathlib import Path

from train.adapters.opening import check_magnitudes, open_adapter
from train.adapters.source import Source
from train.adapters.updates import Kronecker, Update, truncated
from train.adapters.write import Outcome, save
from train.errors import ConfigError
from train.loading.base import DTYPES


def convert(
    path: Path, output: Path, *, to: str, dtype: str | None = None, rank: int | None = None
) -> tuple[Outcome, dict[str, float]]:
    """Write `path`'s adapter to `output` in a layout; energies kept of LoKr made LoRA, by name.

    Raises CheckpointError if not every key is understood or the layout can't hold an update,
    ConfigError for a wrong rank or a dtype that can't hold the numbers.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank: {rank} is no rank; it must be 1 or more.")
    source, kept = open_adapter(path), {}
    if to == "diffusers":
        check_magnitudes(source)

    def reduce(name: str, update: Update) -> Update:
        if rank is None or not isinstance(update, Kronecker):
            return update
        result, kept[name] = truncated(update, rank=rank)
        return result

    groups = source.walk(reduce=reduce)
    outcome = save(
        groups,
        output,
        layout=to,
        dtype=DTYPES[dtype] if dtype else None,
        metadata=source.file.metadata | {"kindling.converted_from": source.layout},
    )
    return outcome, kept


def error_text(outcome: Outcome) -> str:
    """What writing cost, in words."""
    if not outcome.error:
        return "exact"
    return f"largest error of an update {outcome.error:.2g} of its size, at {outcome.worst}"


def layout_of(source: Source) -> str:
    """The layout that is most like a file's own: kohya, BFL's names or diffusers'."""
    keys = source.keys
    if all(key.prefix == "lora_unet_" for key in keys):
        return "kohya"
    return "comfyui" if all(key.target.bfl for key in keys) else "diffusers"
