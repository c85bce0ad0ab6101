"""The whole job on the toy base, pictures to adapter to board: `python3 scripts/demo.py`.

Runs the commands that a user would type, one by one, and shows each before it runs. Needs Python
and pip only; makes `.venv` first. Nothing of an earlier demo is overwritten.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file by a bare python3: imports start at the repository root
    sys.path[0] = str(ROOT)

from scripts.setup_env import enter_venv  # noqa: E402

CONFIG = "configs/demo.yaml"
DATA = "scripts/toy/data/character"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "offline"}
MODULES = {
    "kindling": ["scripts.kindling"],
    "accelerate launch": [
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],
    "python -m scripts.toy.score": ["scripts.toy.score"],
}
"""Commands as typed -> modules, with what keeps accelerate from guessing aloud."""


def main() -> int:
    """Run the demo; the exit code of the first step that fails."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    enter_venv()
    name = free_name(ROOT / "runs", "demo")
    run = f"runs/{name}"
    overrides = [] if name == "demo" else [f"name={name}"]
    steps = [
        ("look at pictures and captions", "kindling", ["inspect", DATA, "--config", CONFIG]),
        (
            "encode, train, export",
            "accelerate launch",
            ["train.py", "--config", CONFIG, *overrides],
        ),
        ("draw the base and the adapter side by side", "kindling", ["compare", run]),
        ("count what changed and what didn't", "python -m scripts.toy.score", [run]),
    ]
    began = time.monotonic()
    for number, (title, program, arguments) in enumerate(steps, start=1):
        print(f"\n[{number}/{len(steps)}] {title}\n$ {program} {' '.join(arguments)}\n", flush=True)
        command = [sys.executable, "-m", *MODULES[program], *arguments]
        code = subprocess.call(command, cwd=ROOT, env={**os.environ, **OFFLINE})
        if code:
            print(f"\nThe demo stopped: the command above ended with code {code}.", file=sys.stderr)
            return code
    print(
        f"\nDone in {time.monotonic() - began:.0f} s, setup not counted."
        f"\n  before and after:  {run}/compare/board.png"
        f"\n  the adapter:       {run}/{name}.safetensors"
        f"\n  its certificate:   {run}/{name}.certificate.json"
        "\nOpen the board. For your own pictures, copy configs/dev-character.yaml."
    )
    return 0


def free_name(runs: Path, name: str) -> str:
    """`name`, or `name-2`, `name-3`, ... if there is such a run already."""
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return next(candidate for candidate in names if not (runs / candidate).exists())


if __name__ == "__main__":
    sys.exit(main())
