"""The lane for GPUs itself, on streams that only take notes: nothing depends on luck."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import lanes
from tests.lanes import DOUBLE, SINGLE
from tests.streams import Machine
from train.memory import offload, recompute, transfer
from train.memory.transfer import CudaLane

CPU = torch.device("cpu")
BLOCKS = DOUBLE + SINGLE


def model(lane: type[CudaLane], *, recomputed: Any, slots: int = 3) -> Any:
    """Streamed, and recomputed from what is parked; each of the two has its lane, as in a run."""
    made = lanes.model()
    offload.attach(made, resident=1, device=CPU, slots=slots, lane=lane(CPU))
    numbers = recompute.chosen(BLOCKS, recomputed)
    recompute.enable(made, numbers, offload_activations=True, device=CPU, lane=lane(CPU))
    return made


@pytest.mark.parametrize(("recomputed", "slots"), [("all", 3), ("none", 4), (3, 1)])
def test_no_copy_races_with_computing(recomputed: Any, slots: int) -> None:
    """Nor with memory that is freed, the model's at last."""
    with Machine() as machine:
        transformer = model(CudaLane, recomputed=recomputed, slots=slots)
        lanes.course(transformer, steps=1)
        del transformer
        gc.collect()
    assert machine.races == []
    assert len(machine.operations) == (2 if recomputed == "none" else 3)


class Early(CudaLane):
    """Copies without waiting for what computes."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        self._copies.wait_stream = lambda stream: None
        return super().copy(target, source)


class Impatient(CudaLane):
    """Computing doesn't wait for copies."""

    def wait(self, arrived: Any) -> None:
        self._under_way.pop(arrived, None)


class Forgetful(CudaLane):
    """Lets go of what is being copied."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        arrived = super().copy(target, source)
        self._under_way.clear()
        return arrived


@pytest.mark.parametrize("lane", [Early, Impatient, Forgetful])
def test_a_careless_lane_would_be_seen(lane: type[CudaLane]) -> None:
    with Machine() as machine:
        transformer = model(lane, recomputed="all")
        lanes.loss(transformer, seed=1).backward()
    assert machine.races


def test_a_lane_that_ends_with_a_copy_under_way_would_be_seen(monkeypatch) -> None:
    monkeypatch.setattr(transfer, "_finish", lambda copies, under_way: None)
    with Machine() as machine:
        transformer = model(CudaLane, recomputed="none", slots=4)
        with torch.no_grad():
            lanes.loss(transformer, seed=1)  # the next pass's first blocks are on their way
        del transformer
        gc.collect()
    assert machine.races


def test_parked_inputs_leave_the_device_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the device has come so far: the host is a whole pass ahead of it."""
    alive, most = [], []
    put_away = recompute.Parking.put_away

    def watched(parking: Any, tensor: Tensor) -> Any:
        alive.append(weakref.ref(tensor.untyped_storage()))
        most.append(sum(reference() is not None for reference in alive))
        return put_away(parking, tensor)

    monkeypatch.setattr(recompute.Parking, "put_away", watched)
    with Machine():
        transformer = model(CudaLane, recomputed="all")
        lanes.loss(transformer, seed=1).backward()
    assert max(most) <= 4  # two of a double block, and those of the block before
