"""Which blocks are streamed, and what that takes of the device and of RAM."""

import gc
import weakref
from itertools import pairwise

import pytest
import torch

from tests import lanes
from tests.lanes import BLOCKS, VARIANTS, streaming
from train.errors import ConfigError
from train.memory import offload, transfer


@pytest.mark.parametrize("model", ["dev", "klein"])
def test_which_blocks_are_streamed(model):
    double, single = (8, 48) if model == "dev" else (5, 20)
    assert offload.streamed(double, single, resident=double + single) == []
    half = offload.streamed(double, single, resident=double + single // 2)
    numbers = [int(name.removeprefix("single_transformer_blocks.")) for name in half]
    assert numbers == list(range(1, single, 2))
    few = offload.streamed(double, single, resident=1)
    assert len(few) == double + single - 1
    assert few[:2] == ["transformer_blocks.0", "transformer_blocks.1"]
    assert [n for n in few if n.startswith("single")] == [
        f"single_transformer_blocks.{i}" for i in range(single)
    ]


@pytest.mark.parametrize("total", [1, 5, 48])
def test_streamed_blocks_are_spread_evenly(total):
    for count in range(1, total + 1):
        numbers = offload._spread(count, total)
        gaps = {b - a for a, b in pairwise(numbers)}
        assert len(set(numbers)) == count
        assert 0 <= numbers[0] <= numbers[-1] < total
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_more_resident_blocks_than_there_are():
    with pytest.raises(ConfigError, match="resident_blocks: 57, but the base has 56 blocks"):
        offload.streamed(8, 48, resident=57)


@pytest.mark.parametrize(
    ("variant", "resident"), [("fp32", 0), ("bf16", 5), ("int8", 2), ("int8", 9), ("int8", 10)]
)
def test_the_footprint_is_known_before(variant, resident):
    """Slots and RAM are what the model then has."""
    whole = lanes.model(**VARIANTS[variant])
    double, single = (
        [offload.packed_bytes(block) for block in blocks]
        for blocks in (whole.transformer_blocks, whole.single_transformer_blocks)
    )
    model, done = streaming(variant, resident=resident)
    assert done.footprint == offload.footprint(double, single, resident=resident)
    frozen = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for block in offload._blocks(model).values()
        for p in offload._frozen(block)
    }
    gaps = 256 * sum(len(offload._frozen(b)) for b in offload._blocks(model).values())
    assert done.footprint.device - gaps <= sum(frozen.values()) <= done.footprint.device


def test_a_footprint_by_hand():
    assert offload.footprint([8, 8], [4] * 6, resident=8) == offload.Footprint(40, 0)
    assert offload.footprint([8, 8], [4] * 6, resident=2) == offload.Footprint(16 + 12, 24)
    assert offload.footprint([8, 8], [4] * 6, resident=0, slots=2) == offload.Footprint(24, 40)


def test_packing_frees_each_block_before_the_next(monkeypatch):
    """RAM must not hold the model twice."""
    model = lanes.model()
    alive = []
    memory = transfer.HostMemory.__init__
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad and "blocks" in n}
    before = {n: p.data_ptr() for n, p in frozen.items()}

    def counted(self, size, **settings):
        alive.append(sum(p.data_ptr() == before[n] for n, p in frozen.items()))
        memory(self, size, **settings)

    monkeypatch.setattr(transfer.HostMemory, "__init__", counted)
    offload.attach(model, resident=0, device=torch.device("cpu"))
    assert len(alive) == BLOCKS
    assert all(later < earlier for earlier, later in pairwise(alive))


def test_ram_is_given_back_with_the_model(monkeypatch):
    made = []
    memory = transfer.HostMemory.__init__

    def noted(self, size, **settings):
        memory(self, size, **settings)
        made.append(weakref.ref(self))

    monkeypatch.setattr(transfer.HostMemory, "__init__", noted)
    model, _ = streaming("fp32", resident=1, recomputed=3)
    lanes.loss(model, seed=1).backward()
    assert len(made) == BLOCKS - 1
    assert all(reference() for reference in made)
    del model
    gc.collect()
    assert not any(reference() for reference in made)
