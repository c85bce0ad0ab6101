"""`kindling convert`: any program's adapter in a layout that diffusers, ComfyUI and kohya read.

diffusers' names load in diffusers and in ComfyUI; comfyui means BFL's names, which both read too;
kohya means lora_unet_ names with alpha. Splitting a fused q, k, v and fusing them again lose
nothing; folding a scale into bf16 can, and the largest error is printed.
"""

import argparse
from pathlib import Path
from typing import get_args

from train.adapters import LAYOUTS
from train.config import AdapterDtype

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
    parser.add_argument("--dtype", choices=get_args(AdapterDtype), help="default: as in the file")
    parser.add_argument("--rank", type=int, help="make LoRA of this rank of a LoKr")
    arguments = parser.parse_args(argv)
    from train.adapters.convert import convert, error_text

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
