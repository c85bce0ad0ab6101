"""The virtual environment: `.venv` in the repository root, made and kept up to date.

A script that a newcomer runs with a bare `python3` calls `enter_venv()` before it imports anything
that must be installed; the call returns only inside `.venv`, with everything there. An active
virtual or conda environment is left alone and never used, whatever it holds: one place, always the
same. `python3 scripts/setup_env.py` asks pip again even if nothing seems to have changed.
Standard library only, and syntax that Python 3.8 can read, so that an old `python3` gets as far as
finding a newer one. pip's own settings (index, proxy, cache) are the user's business.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "kindling-installed"
UNFINISHED = VENV / "kindling-unfinished"
OLDEST = (3, 11)
NEWER_NAMES = ("python3.13", "python3.12", "python3.11", "python3.14")
BIG_DOWNLOAD = re.compile(
    r"(?:Downloading|Using cached) (?:\S*/)?([^-/\s]+)-([^-\s]+)\S* \(([\d.]+ [MG]B)\)"
)
"""What pip says at the start of a download of a megabyte or more: name, version, size."""
HEARTBEAT = 30.0
"""Seconds between signs of life where the output isn't a terminal."""


class SetupError(Exception):
    """The environment can't be made; the message says where, what, and what to do."""


def enter_venv() -> None:
    """Return inside an up-to-date `.venv`; anywhere else, make one and run this script in it."""
    if not is_ready():
        prepare()
    if Path(sys.prefix).resolve() == VENV.resolve():
        return
    command = [str(PYTHON), *sys.argv]
    if os.name == "nt":  # there, exec gives the terminal back before the script is done
        sys.exit(subprocess.call(command))
    sys.stdout.flush()
    os.execv(command[0], command)


def prepare() -> None:
    """Make or mend `.venv` and let pip bring it up to date; ends the program if that fails."""
    try:
        make_venv()
        install()
    except SetupError as error:
        stop(f"setup: {error}", code=2)
    except KeyboardInterrupt:
        stop("\nsetup: interrupted; run the same command again to start over", code=130)


def is_ready() -> bool:
    """Whether an installation of just these requirements, at this place, was finished."""
    return PYTHON.exists() and not UNFINISHED.exists() and read(STAMP) == wanted_stamp()


def wanted_stamp() -> str:
    """Changes with the requirements, the environment's Python and the repository's place."""
    parts = [read(ROOT / "pyproject.toml"), read(ROOT / "constraints.txt"), venv_version()]
    return "{}\n{}\n".format(hashlib.sha256("\0".join(parts).encode()).hexdigest(), VENV)


def venv_version() -> str:
    """Version of the Python that made `.venv`, or nothing."""
    found = re.search(r"^version(?:_info)? *= *(\S+)", read(VENV / "pyvenv.cfg"), re.MULTILINE)
    return found.group(1) if found else ""


def read(path: Path) -> str:
    """The file's text, or nothing if there is no such file."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def make_venv() -> None:
    """Make `.venv`, or make it anew if it is broken, half installed or moved; else keep it."""
    if VENV.exists():
        fault = venv_fault()
        if not fault:
            return
        say(f"{VENV} {fault}; making it anew")
    python = find_python()
    say(f"making {VENV} with {python}")
    done = subprocess.run(
        [python, "-m", "venv", "--clear", str(VENV)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SetupError(
            f"{python} -m venv failed:\n{done.stdout.strip()}\n"
            f"Mend that (disk full? no right to write?), or remove {VENV}, and run again."
        )


def venv_fault() -> str:
    """Why the `.venv` that is there can't be used; nothing if it can."""
    place = read(STAMP).splitlines()[1:]
    if UNFINISHED.exists():
        return "holds an interrupted installation"
    if place and place != [str(VENV)]:
        return f"was moved here from {place[0]}"
    reason = python_fault(str(PYTHON), module="pip")
    return f"is broken ({reason})" if reason else ""


def find_python() -> str:
    """A Python >= 3.11 that can make environments: this one, or the newest tested on PATH.

    Raises SetupError if there is none, with how to get one.
    """
    this = sys._base_executable or sys.executable  # pyright: ignore[reportAttributeAccessIssue]
    candidates = [this] + [path for path in map(shutil.which, NEWER_NAMES) if path]
    reasons = []
    for python in dict.fromkeys(candidates):
        reason = python_fault(python, module="ensurepip")
        if not reason:
            return python
        reasons.append(f"  {python}: {reason}")
    raise SetupError(
        "Kindling needs Python {}.{} or newer with its venv module. Those found here:\n{}\n"
        "Install one and run again. Debian, Ubuntu: sudo apt install python3-venv (or, if that is "
        "an older Python, python3.12 and python3.12-venv); macOS: brew install python@3.13; "
        "others: https://www.python.org/downloads/".format(*OLDEST, "\n".join(reasons))
    )


def python_fault(python: str, *, module: str) -> str:
    """Why this Python can't be used: doesn't start, too old, or lacks a module; else nothing."""
    probe = "import sys; print('%d.%d' % sys.version_info[:2]); import venv, " + module
    try:
        done = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    except OSError as error:
        return f"does not start: {error.strerror}"
    version = done.stdout.strip()
    if not version:
        return f"does not start: {last_line(done.stderr)}"
    if tuple(map(int, version.split("."))) < OLDEST:
        return f"is Python {version}, too old"
    if done.returncode:
        package = f"python{version}-venv"
        return f"{last_line(done.stderr)}; on Debian and Ubuntu: sudo apt install {package}"
    return ""


def last_line(text: str) -> str:
    """The last line that isn't empty."""
    return (text.strip().splitlines() or ["no output"])[-1]


def install() -> None:
    """Install Kindling and its tested dependencies with pip, showing progress.

    `UNFINISHED` marks the time in which a kill would leave half a package behind. pip undoes its
    own failures, so after one of those the environment is as before.
    """
    say("installing Kindling and what it needs; the first time this takes minutes")
    start = time.monotonic()
    UNFINISHED.touch()
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--constraint", "constraints.txt", "--editable", ".[dev]"]
    code, tail = run_shown(command)
    if code:
        UNFINISHED.unlink()
        raise SetupError(
            "pip failed (exit code {}). Its last lines:\n{}\n"
            "Network, proxy or disk at fault? Mend that and run again. Otherwise try by hand, in "
            "{}:\n  {}".format(code, "\n".join(tail), ROOT, " ".join(command))
        )
    STAMP.write_text(wanted_stamp(), encoding="utf-8")
    UNFINISHED.unlink()
    say(f"ready after {time.monotonic() - start:.0f} s")


def run_shown(command: list[str]) -> tuple[int, list[str]]:
    """Run pip in the root; show its milestones and the time; return exit code and last lines."""
    pip = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def collect() -> None:
        assert pip.stdout is not None
        for line in pip.stdout:
            lines.put(line.rstrip())
        lines.put(None)

    threading.Thread(target=collect, daemon=True).start()
    terminal = sys.stdout.isatty()
    start = shown = time.monotonic()
    doing = "asking for the packages"
    tail: deque[str] = deque(maxlen=25)
    try:
        while True:
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                if terminal or time.monotonic() - shown > HEARTBEAT:
                    shown = time.monotonic()
                    show_pip(doing, since=start, end="\r" if terminal else "\n")
                continue
            if line is None:
                return pip.wait(), list(tail)
            tail.append(line)
            if milestone(line):
                doing, shown = milestone(line), time.monotonic()
                show_pip(doing, since=start, end="\n")
    finally:
        if pip.poll() is None:
            pip.terminate()
            pip.wait()


def milestone(line: str) -> str:
    """What pip is at from this line of its output on, in our words; nothing if that's a detail."""
    line = line.strip()
    download = BIG_DOWNLOAD.match(line)
    if download:
        return "downloading {} {}, {}".format(*download.groups())
    if line.startswith("Installing collected packages"):
        return f"installing {line.count(',') + 1} packages"
    return ""


def show_pip(doing: str, *, since: float, end: str) -> None:
    """One line: seconds so far, and what pip is at."""
    sys.stdout.write(f"{time.monotonic() - since:6.0f} s  {doing:<60}{end}")
    sys.stdout.flush()


def say(message: str) -> None:
    """A line about the setup itself."""
    print(f"setup: {message}", flush=True)


def stop(message: str, *, code: int) -> None:
    """Say why on stderr, and exit."""
    sys.stdout.flush()
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    prepare()
