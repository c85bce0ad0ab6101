"""`kindling convert`: any program's adapter in a layout that diffusers, ComfyUI and kohya read.

diffusers' names load in diffusers and in ComfyUI; comfyui means BFL's names, which both read too;
kohya means lora_unet_ names with alpha. Splitting a fused q, k, v and fusing them again lose
nothing; folding a scale into bf16 can, and the largest error is printed.
"""

import argparse
from pathlib import Path

from train.adapters.opening import check_magnitudes, open_adapter
from train.adapters.source import Source
from train.adapters.updates import Kronecker, Update, truncated
from train.adapters.write import LAYOUTS, Outcome, save
from train.errors import ConfigError
from train.loading.base import DTYPES

NORMS = (
    "ComfyUI divides by the norms of the base's rows where DoRA means the changed weight's; only "
    "`kindling export` of the run, which has the base, makes up for it."
)


def main(argv: list[str] | None = None) -> int:
    """Convert from the command line."""
    parser = argparse.ArgumentParser(prog="kindling convert", description=__doc__)
    parser.add_argument("file", type=Path, help="an adapter of any program, as safetensors")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--to", choices=LAYOUTS, required=True)
    parser.add_argument("--dtype", choices=DTYPES, help="default: as in the file")
    parser.add_argument("--rank", type=int, help="make LoRA of this rank of a LoKr")
    arguments = parser.parse_args(argv)
    outcome, kept = convert(
        arguments.file,
        arguments.output,
        to=arguments.to,
        dtype=arguments.dtype,
        rank=arguments.rank,
    )
    print(f"{arguments.output}: {len(outcome.modules)} Linears, {error_text(outcome)}")
    if outcome.dora and arguments.to == "diffusers":
        print("DoRA: this file is for diffusers; ComfyUI doesn't know its magnitudes' names")
    elif outcome.dora:
        print(f"DoRA: this file is for ComfyUI; diffusers would load a plain LoRA. {NORMS}")
    if kept:
        worst = min(kept, key=lambda name: kept[name])
        print(f"{len(kept)} LoKr became LoRA; least of the energy kept: {kept[worst]:.2%}, {worst}")
    return 0


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
