"""`kindling resize`: an adapter of fewer ranks, the nearest one there is.

Each update is cut to its greatest singular values, found through the QR of its factors, so that no
weight is ever formed. The energy kept is the share of the squared norm. q, k and v that share one
down in the file are cut as one, and stay so.
"""

import argparse
from pathlib import Path
from typing import get_args

from train.adapters import LAYOUTS
from train.config import AdapterDtype


def main(argv: list[str] | None = None) -> int:
    """Resize from the command line."""
    parser = argparse.ArgumentParser(prog="kindling resize", description=__doc__)
    parser.add_argument("file", type=Path, help="an adapter of any program, as safetensors")
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--rank", type=int, help="at most so many ranks")
    parser.add_argument("--energy", type=float, help="as few ranks as keep this share, like 0.99")
    parser.add_argument("--to", choices=LAYOUTS, help="default: the file's own")
    parser.add_argument("--dtype", choices=get_args(AdapterDtype), help="default: fp32")
    arguments = parser.parse_args(argv)
    from train.adapters.convert import error_text
    from train.adapters.resize import resize, summary

    outcome, kept = resize(
        arguments.file,
        arguments.output,
        rank=arguments.rank,
        energy=arguments.energy,
        to=arguments.to,
        dtype=arguments.dtype,
    )
    written = f"in writing the cut updates: {error_text(outcome)}"
    print(f"{arguments.output}: {len(outcome.modules)} Linears; {written}")
    print(summary(kept))
    return 0
