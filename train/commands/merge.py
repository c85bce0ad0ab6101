"""`kindling merge`: adapters into one, or into the base that they are for.

Adapters add up exactly by adding up their ranks; --rank or --energy cut the sum to its greatest
singular values. Into a base, each weight W becomes W + the sum of weight * update, rounded once to
the base's type, shard by shard; how much of the adapter that rounding loses is printed.
"""

import argparse
from pathlib import Path
from typing import get_args

from train.adapters import LAYOUTS
from train.config import AdapterDtype
from train.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Merge from the command line."""
    parser = argparse.ArgumentParser(prog="kindling merge", description=__doc__)
    parser.add_argument(
        "files", nargs="+", metavar="FILE[:WEIGHT]", help="adapters; the weight is 1 by default"
    )
    parser.add_argument("--output", type=Path, required=True, help="file, or folder for a base")
    parser.add_argument("--into", type=Path, metavar="BASE", help="a diffusers folder or one file")
    parser.add_argument("--rank", type=int, help="cut the sum to so many ranks")
    parser.add_argument("--energy", type=float, help="cut it to as few ranks as keep this share")
    parser.add_argument("--to", choices=LAYOUTS, default="diffusers")
    parser.add_argument(
        "--dtype", choices=get_args(AdapterDtype), default="fp32", help="of the merged adapter"
    )
    arguments = parser.parse_args(argv)
    from train.adapters import bake
    from train.adapters.convert import error_text
    from train.adapters.merge import merge, open_part, updates_of
    from train.adapters.resize import summary

    parts = [open_part(text) for text in arguments.files]
    if arguments.into is not None:
        if arguments.rank is not None or arguments.energy is not None:
            raise ConfigError("--rank and --energy cut an adapter; --into adds it as it is.")
        baked = bake.bake(updates_of(parts), arguments.into, arguments.output)
        print(f"{arguments.output}: {baked.changed} of {baked.tensors} weights changed")
        print(f"lost by rounding: {baked.loss:.2%} of the adapter's norm")
        return 0
    outcome, kept = merge(
        parts,
        arguments.output,
        rank=arguments.rank,
        energy=arguments.energy,
        to=arguments.to,
        dtype=arguments.dtype,
    )
    print(f"{arguments.output}: {len(outcome.modules)} Linears, {error_text(outcome)}")
    if kept.energy:
        print(summary(kept))
    return 0
