"""Whole processes, from their start: `kindling --help`, and a job up to its first step.

The phases come from what the job leaves in its run folder: `timings.json`, the first previews and
the first line of metrics, which with one step is written as that step ends. Times are as seen from
before the process was started, so launcher, interpreter and imports count.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm import tqdm

from scripts.bench_report import ROOT, spread
from train.config import reading
from train.errors import UserError
from train.run import TIMINGS
from train.track import METRICS

HELP = "kindling --help"
LAUNCHERS = {
    "python": (sys.executable,),
    "accelerate": (str(Path(sys.executable).with_name("accelerate")), "launch"),
}
PHASES = ("imports", "data", "encode", "load", "preview", "first step")
HEADER = ("seconds", *PHASES, "to first step", "whole process")


def measure(config: Path, overrides: Sequence[str], *, runs: int) -> dict[str, Any]:
    """Samples of each kind: help, and the job by both launchers, with and without a cache.

    cold: Kindling's cache is empty; the operating system's, of files read before, is not.
    """
    helps = [run_process(sys.executable, "-m", "scripts.kindling", "--help") for _ in range(runs)]
    results: dict[str, Any] = {HELP: {"whole process": spread([end - at for at, end in helps])}}
    samples: dict[str, list[dict[str, float]]] = {}
    for _ in tqdm(range(runs), desc="starts", unit="round"):
        with TemporaryDirectory() as folder:
            for kind, launcher in (("cold", "accelerate"), *(("warm", each) for each in LAUNCHERS)):
                times = start(Path(folder), launcher, config=config, overrides=overrides)
                samples.setdefault(f"{kind}, {launcher}", []).append(times)
    for kind, rounds in samples.items():
        results[kind] = {key: spread([times[key] for times in rounds]) for key in rounds[0]}
    return results


def start(
    folder: Path, launcher: str, *, config: Path, overrides: Sequence[str]
) -> dict[str, float]:
    """Run one step of a job whose cache is in `folder`; seconds of each phase, and their sums."""
    with TemporaryDirectory(dir=folder) as output:
        places = (f"cache={folder / 'cache'}", f"output={output}", "train.steps=1")
        settings = [*overrides, *places]
        began, ended = run_process(
            *LAUNCHERS[launcher], "train.py", "--config", str(config), *settings
        )
        run = Path(output) / reading.load(config, settings).name
        return phases(run, began=began) | {"whole process": ended - began}


def run_process(*command: str) -> tuple[float, float]:
    """When a process began and ended, Unix seconds. Raises UserError with its errors if it fails.

    It runs in the project's folder, where the paths of the recipes start.
    """
    began = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise UserError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr}")
    return began, ended


def phases(run: Path, *, began: float) -> dict[str, float]:
    """Seconds of each phase of the job in a run folder, and from its start to its first step."""
    ends = json.loads((run / TIMINGS).read_text(encoding="utf-8"))
    drawn = [path.stat().st_mtime for path in run.glob("previews/step-000000-*")]
    ends["preview"] = max(drawn, default=ends["load"])
    ends["first step"] = (run / METRICS).stat().st_mtime
    times = [began, *(ends["begin" if phase == "imports" else phase] for phase in PHASES)]
    seconds = [after - before for before, after in pairwise(times)]
    return dict(zip(PHASES, seconds, strict=True)) | {"to first step": times[-1] - began}


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of the table: medians."""
    return [
        (kind, *(f"{times[key]['median']:.2f}" if key in times else "" for key in HEADER[1:]))
        for kind, times in results.items()
    ]
