"""CUDA's streams without a GPU: the CPU computes, and what is enqueued is held to CUDA's rules.

On a GPU two operations on one memory are done as they were enqueued only if they are on one stream,
or if an event says so. Here each operation notes which memory it reads and writes and on which
stream; one that isn't certain to come after the last writer (if it writes, after all readers, too)
is a race. So is memory that is freed before it is certain that another stream is done with it, for
torch gives it to what computes next. Clocks are vectors (Lamport, Mattern): how much of each stream
is certainly over.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Clock = dict["Stream", int]


class Stream:
    """As much of CUDA's as is used."""

    def __init__(self, machine: "Machine") -> None:
        self._machine = machine
        self.clock: Clock = {self: 0}

    def wait_event(self, event: "Event") -> None:
        merge(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        merge(self.clock, other.clock)

    def record_event(self) -> "Event":
        return Event(dict(self.clock))

    def synchronize(self) -> None:
        merge(self._machine.host, self.clock)


class Event:
    """What was enqueued on a stream when it was recorded, and what that waited for."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock


def merge(clock: Clock, other: Clock) -> None:
    """Let all be over that is in either."""
    for stream, tick in other.items():
        clock[stream] = max(clock.get(stream, 0), tick)


class Use:
    """Of a storage: the last time that each stream read or wrote it."""

    def __init__(self) -> None:
        self.read: Clock = {}
        self.written: Clock = {}


class Machine(TorchDispatchMode):
    """While it is entered, `torch.cuda`'s streams are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.races: list[str] = []
        self.operations = Counter[Stream]()
        self.host: Clock = {}
        """What the host has waited for: all that it enqueues later comes after that."""
        self._computing = self._current = Stream(self)
        self._uses: dict[int, Use] = {}
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Machine":
        self._patch.setattr(torch.cuda, "Stream", lambda device: Stream(self))
        self._patch.setattr(torch.cuda, "stream", self._on)
        self._patch.setattr(torch.cuda, "current_stream", lambda device: self._current)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patch.undo()

    @contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        schema = func._schema.arguments
        given = {a.name: v for a, v in zip(schema, args, strict=False)} | (kwargs or {})
        aliased = {a.name for a in schema if a.alias_info is not None}
        written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
        if aliased == written and not func.name().startswith("aten::empty"):  # others touch nothing
            reads = [value for name, value in given.items() if name not in written]
            self._operate(str(func), reads, [made, *(given[n] for n in written & given.keys())])
        return made

    def _operate(self, name: str, reads: Any, writes: Any) -> None:
        stream = self._current
        merge(stream.clock, self.host)
        stream.clock[stream] += 1
        self.operations[stream] += 1
        for tensor, use in self._used(reads):
            self._check(f"{name} reads {tuple(tensor.shape)}", stream.clock, use.written)
            use.read[stream] = stream.clock[stream]
        for tensor, use in self._used(writes):
            done = {**use.read}
            merge(done, use.written)
            self._check(f"{name} writes {tuple(tensor.shape)}", stream.clock, done)
            use.written = {stream: stream.clock[stream]}

    def _used(self, tree: Any) -> Iterator[tuple[Tensor, Use]]:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and tensor.numel() and not tensor.is_meta:
                storage = tensor.untyped_storage()
                if id(storage) not in self._uses:
                    self._uses[id(storage)] = Use()
                    weakref.finalize(storage, self._freed, id(storage), tuple(tensor.shape))
                yield tensor, self._uses[id(storage)]

    def _freed(self, storage: int, shape: tuple[int, ...]) -> None:
        use = self._uses.pop(storage)
        merge(use.read, use.written)
        self._check(f"{shape} is freed", self._computing.clock, use.read)

    def _check(self, what: str, clock: Clock, used: Clock) -> None:
        over = {**self.host}
        merge(over, clock)
        if any(over.get(stream, 0) < tick for stream, tick in used.items()):
            self.races.append(f"{what} while another stream uses it")
