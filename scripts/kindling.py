"""The `kindling` command: which subcommand is which module's, and how errors end.

Imports a subcommand's module only when it is called, and that imports what does the work only once
its arguments are read, so all help is instant. Each module owns its arguments: `main(argv) -> int`.
"""

import difflib
import importlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NamedTuple

from train.errors import Stopped, UserError

EXIT_USER_ERROR = 2
EXIT_SIGNAL = 128
"""Plus the signal's number, as shells have it."""
SIGPIPE = 13
"""`signal` has it under this name, but not on Windows."""


class Command(NamedTuple):
    """A subcommand: the module whose `main` does it, and a line for the help."""

    module: str
    summary: str


COMMANDS = {
    "caption": Command("data_tools.caption.command", "write captions for a folder of pictures"),
    "inspect": Command(
        "data_tools.inspect.command", "report on a folder of pictures: sizes, captions, faults"
    ),
    "curate": Command(
        "data_tools.curate.command", "exclude, crop, balance and hold out pictures, by a recipe"
    ),
    "import": Command(
        "data_tools.exchange.import_data",
        "make a folder of pictures of parquet, tar or a hub data set",
    ),
    "pack": Command(
        "data_tools.exchange.pack", "write a folder of pictures as parquet, tar or imagefolder"
    ),
    "plan": Command(
        "train.planning.plan", "what a config takes of GPU, RAM, disk and time, and what fits"
    ),
    "export": Command("train.commands.export", "write a run's adapter files and their certificate"),
    "certify": Command(
        "train.commands.certify", "what an adapter file holds, and what each loader does with it"
    ),
    "convert": Command(
        "train.commands.convert", "write any program's adapter for diffusers, ComfyUI or kohya"
    ),
    "merge": Command("train.commands.merge", "add adapters up, or an adapter to its base"),
    "resize": Command("train.commands.resize", "an adapter of fewer ranks, and what that loses"),
    "publish": Command(
        "train.commands.publish", "model card, metadata and pictures as a folder; its upload"
    ),
    "generate": Command(
        "train.commands.generate", "draw pictures with a base and adapters at strengths"
    ),
    "compare": Command(
        "train.commands.compare", "draw a board: base against adapter, over checkpoints"
    ),
    "bench": Command("scripts.bench", "measure speed and memory, as a table and JSON"),
    "doctor": Command("train.doctor", "what works on this machine, and what to do about the rest"),
}

HELP = """\
Kindling: LoRA fine-tuning on FLUX.2. A folder of pictures becomes an adapter.

usage: kindling COMMAND [options]        kindling COMMAND --help

{commands}

Training has a command of its own:
  accelerate launch train.py --config configs/demo.yaml [lora.rank=32 ...]
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code. Ends quietly when nobody reads its output any more."""
    try:
        try:
            code = dispatch(argv)
        except SystemExit:  # argparse's, help and all
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # here, or Python does it at its end and complains
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        return EXIT_SIGNAL + SIGPIPE
    return code


def _output_is_closed() -> bool:
    """Whether stdout or stderr has lost its reader; then what they still get is dropped.

    A broken pipe may be another one (a connection, a child), and that is an error to be seen.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            print(file=stream, flush=True)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for output in (sys.stdout, sys.stderr):
                os.dup2(nowhere, output.fileno())
            return True
    return False


def dispatch(argv: list[str] | None) -> int:
    """Call the subcommand that is named; the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help"):
        print(help_text(), end="")
        return 0
    if name not in COMMANDS:
        print(complaint(name), file=sys.stderr)
        return EXIT_USER_ERROR

    def run() -> int:
        return importlib.import_module(COMMANDS[name].module).main(rest)

    return run_main(run)


def run_main(run: Callable[[], int]) -> int:
    """Run a program's main part; a UserError or Ctrl-C becomes a message and an exit code.

    What the console's encoding lacks (Chinese names in a Windows pipe) is printed as \\u escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run()
    except UserError as error:
        print(error, file=sys.stderr)
        return EXIT_USER_ERROR
    except Stopped as stop:
        print(stop, end="\n" if str(stop) else "", file=sys.stderr)
        return EXIT_SIGNAL + stop.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_SIGNAL + signal.SIGINT


def help_text() -> str:
    """All commands, a line each."""
    rows = [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    return HELP.format(commands="\n".join(rows))


def complaint(name: str) -> str:
    """What to say of a command that doesn't exist."""
    if not name:
        return help_text().rstrip()
    near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}."
    return f"kindling: no command {name!r}; {hint} `kindling --help` says what each does."


if __name__ == "__main__":
    sys.exit(main())
