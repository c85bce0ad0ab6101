"""accelerate launch train.py --config configs/x.yaml [lora.rank=32 ...] [--resume]

Prepares what is missing, trains, draws previews, exports. Everything else is in the package
`train`, which Python finds before this file because it is a package.
"""

import argparse
import gc
import sys
from pathlib import Path

from scripts.kindling import run_main


def main(argv: list[str] | None = None) -> int:
    """Train from the command line."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train an adapter as a config says."
    )
    parser.add_argument("--config", type=Path, required=True, help="such as configs/demo.yaml")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest good checkpoint"
    )
    parser.add_argument(
        "--accept-changes",
        action="store_true",
        help="resume although settings or pictures have changed; it says which",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, such as lora.rank=32"
    )
    arguments = parser.parse_intermixed_args(argv)
    if arguments.accept_changes and not arguments.resume:
        parser.error("--accept-changes has no effect without --resume")

    from train.config import reading

    config = reading.load(arguments.config, arguments.overrides)
    gc.disable()  # imports make a million objects that stay; searching them costs a second
    from train import run

    gc.enable()
    gc.freeze()
    run.run(config, resume=arguments.resume, accept=arguments.accept_changes)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
