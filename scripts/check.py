"""All checks: `python3 scripts/check.py [--quick] [pytest arguments]`.

Sets up `.venv`, then runs ruff, pyright and pytest, every step even after one has failed, and ends
with a table and the counts of the tests. CI calls the same command. The whole must stay under
`LIMIT_MINUTES` on two cores from nothing. What a test checks is the tests' own matter.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:  # run as a file by a bare python3: imports start at the repository root
    sys.path[0] = str(ROOT)

from scripts.setup_env import enter_venv  # noqa: E402

LIMIT_MINUTES = 15
NO_TESTS = 5
"""pytest's exit code if it found no test, which is a failure like any other."""
SUMMARY = re.compile(
    r"^=* ?((?:\d+ \w+(?:, )?)+ in [\d.]+s.*?|no tests ran in .*?) ?=*$", re.MULTILINE
)
ANSI_COLOUR = re.compile(r"\x1b\[[\d;]*m")
PLAIN_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",  # two test processes share the cores; threads would only get in the way
    "PYTHONUNBUFFERED": "1",
}


def main(argv: list[str] | None = None) -> int:
    """Run all steps; 0 if every one passed."""
    parser = argparse.ArgumentParser(prog="check.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="leave out the tests marked slow")
    options, pytest_arguments = parser.parse_known_args(argv)
    start = time.monotonic()
    enter_venv()
    quick = ["-m", "not slow"] if options.quick else []
    steps = {
        "ruff check": ["ruff", "check", "."],
        "ruff format": ["ruff", "format", "--check", "."],
        "pyright": ["pyright"],
        "pytest": ["pytest", *parallel(os.cpu_count() or 1), *quick, *pytest_arguments],
    }
    rows = []
    for name, command in steps.items():
        print(f"\n── {name} " + "─" * (88 - len(name)), flush=True)
        began = time.monotonic()
        code, output = run_shown(command)
        rows.append((name, code, time.monotonic() - began))
    print_table(rows, total=time.monotonic() - start)
    print(summary_line(output, code=code))
    return 1 if any(code for _, code, _ in rows) else 0


def parallel(cores: int) -> list[str]:
    """pytest-xdist's arguments: one process a core, to four, each of which imports torch."""
    return ["-n", str(min(cores, 4)), "--dist", "worksteal"] if cores > 1 else []


def run_shown(module: list[str]) -> tuple[int, str]:
    """Run `python -m module …` in the root, show its output as it comes, return code and output."""
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**os.environ, **PLAIN_ENVIRONMENT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    )
    assert process.stdout is not None
    output = b""
    while chunk := process.stdout.read(4096):
        sys.stdout.buffer.write(chunk)
        sys.stdout.flush()
        output += chunk
    return process.wait(), output.decode(errors="replace")


def summary_line(output: str, *, code: int) -> str:
    """pytest's own last line, such as `12 passed, 1 failed in 3.4s`; one of ours if it died."""
    found = SUMMARY.findall(ANSI_COLOUR.sub("", output))
    if code == NO_TESTS or not found:
        return f"0 passed, 1 failed: pytest ended with exit code {code} and no result"
    return found[-1]


def print_table(rows: list[tuple[str, int, float]], *, total: float) -> None:
    """What passed, what failed, and how long each step took."""
    print("\n── summary " + "─" * 81)
    for name, code, seconds in rows:
        result = "passed" if code == 0 else f"FAILED (exit code {code})"
        print(f"{name:<14}{seconds:7.1f} s   {result}")
    print(f"{'all':<14}{total:7.1f} s")
    if total > LIMIT_MINUTES * 60:
        print(
            f"That is over the {LIMIT_MINUTES} minutes that the checks may take: "
            "speed up the slowest tests (--durations=10 names them)."
        )


if __name__ == "__main__":
    sys.exit(main())
