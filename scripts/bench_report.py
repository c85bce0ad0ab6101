"""What every benchmark writes down: the machine, the versions, all samples with their median."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = ("kindling", "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")


def new_report(what: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """All but the results."""
    return {
        "command": ["kindling", "bench", *(sys.argv[2:] if argv is None else argv)],
        "what": what,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{p: found(p) for p in PACKAGES}},
    }


def found(package: str) -> str | None:
    """Its version; None where it isn't installed, as Kindling itself needn't be."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures depend on; memory in bytes."""
    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {"name": properties.name, "memory": properties.total_memory}
    return {
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load": psutil.getloadavg()[0],
        "ram": psutil.virtual_memory().total,
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def cpu_model() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, least and most of some samples, and all of them."""
    return {
        "median": statistics.median(samples),
        "min": min(samples),
        "max": max(samples),
        "samples": list(samples),
    }


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Ours over theirs, pair by pair: neighbours in time share whatever else the machine does."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])

    def line(row: Sequence[str]) -> str:
        first, *others = zip(row, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(w) for cell, w in others)])

    return "\n".join(map(line, cells))


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON; whoever is killed meanwhile leaves the file as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    text = json.dumps(report, indent=1, ensure_ascii=False)
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(path)
