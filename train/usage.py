"""How long a phase took and how much memory it needed, as one line on the console."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch


@contextmanager
def phase(title: str, count: int, *, device: torch.device, show: bool) -> Iterator[None]:
    """Print `title: count in 3.1 s, peak 0.9 GB RAM, 4.2 GB VRAM` after a phase.

    RAM is the process's highest so far, with the pages of weight files that it has open; VRAM is
    the phase's own, as torch counts it.
    """
    begin = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    yield
    if not show:
        return
    peaks = [f"{peak_ram() / 1e9:.1f} GB RAM"]
    if device.type == "cuda":
        peaks.append(f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB VRAM")
    seconds = time.perf_counter() - begin
    print(f"{title}: {count} in {seconds:.1f} s, peak {', '.join(peaks)}", flush=True)


def peak_ram() -> int:
    """Bytes that the process has held at most.

    getrusage would count what its parent held when it was forked, so it is asked only where the
    system says it in no other way: macOS, and sandboxes that imitate a part of /proc.
    """
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset() -> None:
    """Let the peak that `now` tells begin here."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def now() -> str:
    """`21.3 GB VRAM`: the peak since `reset`, as torch counts it; without a GPU the peak of RAM."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB VRAM"
    return f"{peak_ram() / 1e9:.1f} GB RAM"
