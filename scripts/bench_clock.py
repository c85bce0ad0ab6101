"""Time and memory of a device, taken without holding up what is measured."""

import time
from typing import Any

import torch

from train.errors import MachineError
from train.usage import peak_ram


class Clock:
    """Seconds between marks of what a device computes; the host waits only when they are read."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Everything enqueued so far, and nothing later, is before this mark."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """From each mark to the next."""
        if self._device.type != "cuda":
            return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]
        if self._marks:
            self._marks[-1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def forget_peaks(device: torch.device) -> None:
    """Give unused memory back and let peaks start from what is held."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peaks(device: torch.device) -> dict[str, int | None]:
    """Bytes at most: allocated and reserved on the GPU since `forget_peaks`, RAM ever.

    outside: what of the GPU is in use now and isn't torch's: CUDA's context, libraries, others.
    pinned: page-locked by torch, which not every kernel counts to the process.
    """
    found: dict[str, int | None] = dict.fromkeys(("allocated", "reserved", "outside", "pinned"))
    if device.type == "cuda":
        found["allocated"] = torch.cuda.max_memory_allocated(device)
        found["reserved"] = torch.cuda.max_memory_reserved(device)
        found["outside"] = outside(device)
        found["pinned"] = torch.cuda.host_memory_stats().get("allocated_bytes.peak")
    return {**found, "ram": peak_ram()}


def outside(device: torch.device) -> int:
    """Bytes of the GPU in use that aren't torch's."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def limit(device: torch.device, size: float) -> None:
    """Let this process do with `size` bytes of the GPU, CUDA's context included.

    What torch isn't given stays free, so the process may load further kernels as it would on a
    smaller card. Raises MachineError if the GPU has less.
    """
    torch.empty(1, device=device)  # CUDA's context is there from now on
    _, total = torch.cuda.mem_get_info(device)
    if size > total:
        raise MachineError(f"a limit of {size / 1e9:g} GB: this GPU has {total / 1e9:.1f}")
    # of the current device, which is this one: it refuses "cuda" without a number
    torch.cuda.set_per_process_memory_fraction((size - outside(device)) / total)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room: torch's own error, or that of a library below it."""
    texts = ("out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in texts)
