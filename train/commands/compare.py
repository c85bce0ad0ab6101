"""`kindling compare`: the same prompts and seeds from the base and from a run, as a board.

The adapter comes from its exported file through diffusers' own loader, into a base that has never
seen the training. Checkpoints are exported for the occasion.
"""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Draw a board from the command line."""
    parser = argparse.ArgumentParser(prog="kindling compare", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--prompt", action="append", help="instead of the config's; repeatable")
    parser.add_argument("--seeds", type=int, default=1, help="pictures for each prompt")
    parser.add_argument(
        "--strengths",
        type=lambda text: [float(part) for part in text.split(",")],
        default=[1.0],
        help="of the adapter, such as 0.5,1",
    )
    parser.add_argument(
        "--checkpoints", action="store_true", help="a column for each checkpoint of the run"
    )
    parser.add_argument("--steps", type=int, help="denoising steps; default as in the config")
    parser.add_argument("--output", type=Path, help="folder to write to; default RUN/compare")
    arguments = parser.parse_args(argv)
    from train.compare import compare

    board = compare(
        arguments.run,
        prompts=arguments.prompt,
        seeds=arguments.seeds,
        strengths=arguments.strengths,
        checkpoints=arguments.checkpoints,
        steps=arguments.steps,
        output=arguments.output,
    )
    print(f"board: {board}")
    return 0
