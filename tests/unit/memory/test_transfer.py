"""Page-locked memory without a GPU: what is asked of CUDA, by a runtime that only takes notes."""

import gc
from mmap import PAGESIZE

import pytest
import torch

from train.errors import MachineError
from train.memory import transfer

CUDA = torch.device("cuda")


class Runtime:
    """As much of CUDA's as is used. Like the real one it locks no page twice."""

    def __init__(self, *, room: int) -> None:
        self.room = room
        self.locked: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        pages = {*range(address // PAGESIZE, -(-(address + size) // PAGESIZE))}
        taken = {
            page
            for start, length in self.locked.items()
            for page in range(start // PAGESIZE, -(-(start + length) // PAGESIZE))
        }
        if pages & taken:
            return 712
        if sum(self.locked.values()) + size > self.room:
            return 2
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802
        return {2: "out of memory", 712: "already mapped"}[code]


@pytest.fixture
def runtime(monkeypatch) -> Runtime:
    """In place of CUDA's; asserts that the GPU is waited for before memory is given back."""
    notes = Runtime(room=100 * PAGESIZE)
    waited = []
    unlock = notes.cudaHostUnregister

    def unlock_after(address: int) -> int:
        assert waited.pop() == CUDA
        return unlock(address)

    notes.cudaHostUnregister = unlock_after
    monkeypatch.setattr(torch.cuda, "cudart", lambda: notes)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    return notes


def host_memory(size: int, *, device: torch.device = CUDA) -> transfer.HostMemory:
    return transfer.HostMemory(size, device=device, remedy="train on paper")


@pytest.mark.parametrize("size", [1, PAGESIZE, PAGESIZE + 1, 5 * PAGESIZE - 3])
def test_whole_pages_are_locked_and_no_more(runtime: Runtime, size: int):
    memories = [host_memory(size) for _ in range(4)]
    pages = -(-size // PAGESIZE) * PAGESIZE
    assert [memory.bytes.numel() for memory in memories] == [size] * 4
    assert list(runtime.locked.values()) == [pages] * 4
    assert all(address % PAGESIZE == 0 for address in runtime.locked)


def test_memory_is_given_back_with_its_owner_but_not_under_a_view(runtime: Runtime):
    memory = host_memory(10)
    view = memory.bytes[2:4]
    view.fill_(7)
    del memory
    gc.collect()
    assert runtime.locked == {}
    assert view.tolist() == [7, 7]


def test_what_cannot_be_locked_is_said(runtime: Runtime):
    with pytest.raises(MachineError) as caught:
        host_memory(101 * PAGESIZE)
    assert "0.00 GB of RAM can't be page-locked (out of memory)" in str(caught.value)
    assert str(caught.value).endswith(", or train on paper.")
    assert runtime.locked == {}


def test_nothing_is_locked_for_the_cpu(runtime: Runtime):
    host_memory(10, device=torch.device("cpu"))
    assert runtime.locked == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_locked_memory_is_pinned_on_a_gpu():
    memory = host_memory(3 * PAGESIZE)
    assert memory.bytes.is_pinned()
    memory.bytes.fill_(5)
    target = torch.zeros(3 * PAGESIZE, dtype=torch.uint8, device=CUDA)
    lane = transfer.CudaLane(CUDA)
    lane.wait(lane.copy(target, memory.bytes))
    assert bool((target == 5).all())
    bytes_ = memory.bytes
    del memory
    gc.collect()
    assert not bytes_.is_pinned()
