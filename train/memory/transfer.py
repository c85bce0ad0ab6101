"""Copies between RAM and the device that computing doesn't wait for, and RAM that they can use.

Owns streams, events and pinned memory. What is copied and when is `offload`'s (frozen weights) and
`recompute`'s (activations).
"""

import weakref
from mmap import PAGESIZE
from typing import Any, Protocol

import torch
from torch import Tensor

from train.errors import MachineError


class Lane(Protocol):
    """Copies one after the other, beside the computing."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Copy once all computing enqueued so far is done; `target` is garbage until `wait`.

        Returns what `wait` takes. RAM must be page-locked, or the host waits for the copy. Both
        tensors stay alive until it, or a later copy, is waited for.
        """
        ...

    def wait(self, arrived: Any) -> None:
        """Make what is enqueued from now on wait for a copy and those before, never the host."""
        ...


class DirectLane:
    """On the CPU, where a copy is over when its call is."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def wait(self, arrived: None) -> None:
        pass


class CudaLane:
    """A CUDA stream of its own. What can go wrong between two streams, and why it doesn't here:

    - A copy overwrites what is still being read: each waits for all computing enqueued before it
      (`wait_stream` records an event there), so the caller must have enqueued every reader of the
      old contents, and no other.
    - Computing reads what isn't there yet: it waits for the copy's event. Computing enqueued
      before `wait` must not touch the target.
    - Two copies of one target or source: they keep their order, the stream being one.
    - Memory is freed with a copy under way: the lane holds both tensors until computing waits for
      the copy. What is freed then goes to computing that comes after it. (`record_stream` instead
      keeps memory back until the device has done the copy, and the host is far ahead: of a pass,
      nothing that was parked would be free before its end.)
    - The backward pass runs in a thread of autograd's: it computes on the forward's stream, which
      is the current one where hooks run, and the main thread waits meanwhile.
    All computing is on one stream, which the first copy finds and later ones assert.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._computing: torch.cuda.Stream | None = None
        self._under_way: dict[Any, tuple[Tensor, Tensor]] = {}
        end = weakref.finalize(self, _finish, self._copies, self._under_way)
        end.atexit = False  # the process gives back all it has, and CUDA may be gone

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        self._copies.wait_stream(self._current())
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
        arrived: Any = self._copies.record_event()
        self._under_way[arrived] = target, source
        return arrived

    def wait(self, arrived: torch.cuda.Event) -> None:
        self._current().wait_event(arrived)
        while arrived in self._under_way:
            del self._under_way[next(iter(self._under_way))]

    def _current(self) -> torch.cuda.Stream:
        current = torch.cuda.current_stream(self._device)
        self._computing = self._computing or current
        assert current == self._computing, "computing moved to another CUDA stream"
        return current


def _finish(copies: torch.cuda.Stream, under_way: dict[Any, Any]) -> None:
    copies.synchronize()
    under_way.clear()


def lane(device: torch.device) -> Lane:
    """For copies to and from a device."""
    return CudaLane(device) if device.type == "cuda" else DirectLane()


class HostMemory:
    """`size` bytes of RAM, page-locked where the device is a GPU, for as long as this object lives.

    torch's `pin_memory` would round up to a power of two. Whole pages of its own, since a page
    can't be locked twice. Raises MachineError, which ends with `remedy`, if the system doesn't lock
    so much.
    """

    def __init__(self, size: int, *, device: torch.device, remedy: str) -> None:
        pages = -(-size // PAGESIZE) * PAGESIZE
        whole = torch.empty(pages + PAGESIZE, dtype=torch.uint8)
        start = -whole.data_ptr() % PAGESIZE
        self.bytes = whole[start : start + size]
        if device.type == "cuda":
            _lock(whole[start : start + pages], remedy=remedy)
            release = weakref.finalize(self, _unlock, self.bytes, device)
            release.atexit = False  # as a lane's


def _lock(memory: Tensor, *, remedy: str) -> None:
    runtime: Any = torch.cuda.cudart()
    code = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(code) != 0:
        raise MachineError(
            f"{memory.numel() / 1e9:.2f} GB of RAM can't be page-locked "
            f"({runtime.cudaGetErrorString(code)}). Free RAM, raise what the container or WSL may "
            f"use of it, or {remedy}."
        )


def _unlock(memory: Tensor, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may still read it
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(memory.data_ptr())
