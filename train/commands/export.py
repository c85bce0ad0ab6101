"""`kindling export`: a run, or one of its checkpoints, to an adapter file with its certificate."""

import argparse
from pathlib import Path
from typing import get_args

from train.adapters import LAYOUTS
from train.config import AdapterDtype


def main(argv: list[str] | None = None) -> int:
    """Export from the command line; 0 if the certificate passes, 1 if it doesn't."""
    parser = argparse.ArgumentParser(prog="kindling export", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run, or of one of its checkpoints")
    parser.add_argument(
        "--format",
        type=_layouts,
        metavar="LAYOUT,...",
        help=f"any of {', '.join(LAYOUTS)}; default: diffusers, which ComfyUI loads too, and of "
        "DoRA, where it doesn't, comfyui beside it",
    )
    parser.add_argument(
        "--dtype", choices=get_args(AdapterDtype), help="instead of the config's export.dtype"
    )
    parser.add_argument(
        "--output", type=Path, help="default: RUN/NAME.safetensors, NAME-comfyui.safetensors, ..."
    )
    parser.add_argument(
        "--weights", choices=["average", "last"], help="instead of the config's export.weights"
    )
    arguments = parser.parse_args(argv)
    from train.adapters.export_run import export_again

    passed = export_again(
        arguments.run,
        layouts=arguments.format,
        output=arguments.output,
        changes={"export.weights": arguments.weights, "export.dtype": arguments.dtype},
    )
    return 0 if passed else 1


def _layouts(text: str) -> tuple[str, ...]:
    """Of --format. Raises argparse's error for an unknown one."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in LAYOUTS]:
        raise argparse.ArgumentTypeError(
            f"no layout {unknown[0]!r}; there are {', '.join(LAYOUTS)}"
        )
    return names
