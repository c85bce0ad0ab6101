"""Which blocks are recomputed, and that neither this nor parking their inputs changes a bit."""

import gc
import weakref
from functools import cache

import pytest
import torch

from tests import lanes
from tests.lanes import BLOCKS, DOUBLE, SINGLE, LateLane
from train.errors import ConfigError
from train.memory import recompute, transfer

CPU = torch.device("cpu")


@cache
def expected(dropout: float) -> list[torch.Tensor]:
    """Without recomputation."""
    return lanes.course(lanes.model(dropout=dropout))


def recomputing(numbers, *, dropout=0.0, offload=False, lane=None):
    """A model with the blocks of these numbers recomputed."""
    model = lanes.model(dropout=dropout)
    recompute.enable(model, numbers, offload_activations=offload, device=CPU, lane=lane)
    return model


def calls(model) -> list[int]:
    """Grows by the number of a block whenever that is computed."""
    seen = []
    for number, block in enumerate((*model.transformer_blocks, *model.single_transformer_blocks)):
        block.register_forward_pre_hook(lambda module, inputs, number=number: seen.append(number))
    return seen


@pytest.mark.parametrize(
    ("setting", "numbers"),
    [
        ("all", {*range(10)}),
        (1, {*range(10)}),
        (2, {0, 2, 4, 6, 8}),
        (3, {0, 3, 6}),
        (4, {0, 4}),
        (10, {0}),
        ("none", set()),
    ],
)
def test_the_setting_means_the_first_of_every_n(setting, numbers):
    assert recompute.chosen(10, setting) == numbers


def test_a_number_above_the_blocks_is_refused():
    with pytest.raises(ConfigError, match="every 11th of 10 blocks is none"):
        recompute.chosen(10, 11)


@pytest.mark.parametrize("blocks", [1, 10, 56])
def test_a_count_is_spread_without_the_last(blocks):
    for count in range(blocks + 1):
        numbers = recompute.spread(blocks, count)
        assert len(numbers) == count
        assert (blocks - 1 in numbers) == (count == blocks)


@pytest.mark.parametrize("numbers", [set(), {0, 5, 8}, {*range(BLOCKS)}])
def test_the_chosen_blocks_are_computed_again_last_first(numbers):
    model = recomputing(numbers)
    seen = calls(model)
    loss = lanes.loss(model, seed=1)
    assert seen == [*range(BLOCKS)]
    loss.backward()
    assert seen[BLOCKS:] == sorted(numbers, reverse=True)
    with torch.no_grad():
        lanes.loss(model, seed=1)
    assert len(seen) == 2 * BLOCKS + len(numbers)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("numbers", [{0, 5, 8}, {*range(BLOCKS)}])
def test_recomputation_changes_no_bit(numbers, offload, dropout):
    """Not with inputs parked by the latest copies that are allowed."""
    lane = LateLane()
    model = recomputing(numbers, dropout=dropout, offload=offload, lane=lane)
    assert lanes.same(lanes.course(model), expected(dropout))
    assert (lane.copies > 0) == offload


def test_without_a_lane_of_ours_it_is_the_machines():
    model = recomputing({*range(BLOCKS)}, offload=True)
    assert lanes.same(lanes.course(model), expected(0.0))


class NeverLane(LateLane):
    """Nobody waits."""

    def wait(self, arrived: object) -> None:
        pass


def test_a_missing_wait_would_be_seen():
    model = recomputing({4}, offload=True, lane=NeverLane())
    with pytest.raises(AssertionError):
        lanes.course(model)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_generator_is_kept_only_for_dropout(monkeypatch, dropout):
    read = torch.get_rng_state
    reads = []
    model = recomputing({*range(BLOCKS)}, dropout=dropout)
    monkeypatch.setattr(torch, "get_rng_state", lambda: reads.append(1) or read())
    lanes.loss(model, seed=1).backward()
    assert bool(reads) == (dropout > 0)


def test_only_what_differs_from_block_to_block_is_parked():
    """Each tensor goes once and returns once: two of a double block, one of a single."""
    lane = LateLane()
    model = recomputing({*range(BLOCKS)}, offload=True, lane=lane)
    loss = lanes.loss(model, seed=1)
    assert lane.copies == 2 * (DOUBLE - 1) + SINGLE
    loss.backward()
    assert lane.copies == 2 * (2 * (DOUBLE - 1) + SINGLE)


def test_inputs_are_fetched_while_the_block_above_computes():
    lane = LateLane()
    model = recomputing({*range(BLOCKS)}, offload=True, lane=lane)
    loss = lanes.loss(model, seed=1)
    parked = lane.copies
    fetched = []
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_pre_hook(lambda m, i: fetched.append(lane.copies - parked))
    loss.backward()
    assert fetched == [2, 3, 4, 5, 6, 7, 9, 11, 11, 11]


def test_parked_inputs_are_gone_after_the_backward(monkeypatch):
    kept = []
    park = recompute._Inputs.park

    def watched(inputs, tensor):
        kept.append(weakref.ref(inputs))
        return park(inputs, tensor)

    monkeypatch.setattr(recompute._Inputs, "park", watched)
    model = recomputing({*range(BLOCKS)}, offload=True)
    loss = lanes.loss(model, seed=1)
    gc.collect()
    assert all(reference() for reference in kept)
    loss.backward()
    del loss
    gc.collect()
    assert not any(reference() for reference in kept)


def test_the_same_ram_is_parked_in_again(monkeypatch):
    """As much as the largest batch needs, however many sizes there are."""
    made, alive = [], weakref.WeakSet()
    memory = transfer.HostMemory.__init__

    def noted(self, size, **settings):
        memory(self, size, **settings)
        made.append(size)
        alive.add(self)

    monkeypatch.setattr(transfer.HostMemory, "__init__", noted)
    model = recomputing({*range(BLOCKS)}, offload=True, lane=LateLane())
    plain = lanes.model()
    sizes = []
    for tokens in (12, 12, 20, 7, 12, 20):
        for one in (model, plain):
            one.zero_grad()
            lanes.loss(one, seed=tokens, tokens=tokens).backward()
        assert lanes.same(lanes.gradients(model), lanes.gradients(plain))
        assert len(alive) == 2 * (DOUBLE - 1) + SINGLE
        sizes.append(sum(one.bytes.nbytes for one in alive))
    assert sizes[0] == sizes[1] < sizes[2] == sizes[5]
    assert len(made) <= 2 * len(alive)


def test_graphs_in_any_order():
    """Two at once, one dropped, a second backward through one."""

    def odd(model) -> list[torch.Tensor]:
        first, second = (lanes.loss(model, seed=seed) for seed in (1, 2))
        lanes.loss(model, seed=3)
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        return lanes.gradients(model)

    parked = recomputing({*range(0, BLOCKS, 2)}, offload=True, lane=LateLane())
    assert lanes.same(odd(parked), odd(lanes.model()))


class Dawdling(transfer.CudaLane):
    """The device is far behind the host."""

    def copy(self, target, source):
        with torch.cuda.stream(self._copies):
            torch.cuda._sleep(20_000_000)  # some ten milliseconds
        return super().copy(target, source)


@pytest.mark.gpu
def test_parked_inputs_leave_a_gpu_however_far_behind_it_is():
    device, tokens = torch.device("cuda"), 4096

    def peak(*, offload: bool) -> int:
        """Of what computing can't use: allocated, or freed and held back."""
        model = torch.nn.Module.to(lanes.model(), device)
        lane = Dawdling(device)
        recompute.enable(
            model, range(BLOCKS), offload_activations=offload, device=device, lane=lane
        )
        for _ in range(2):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            lanes.loss(model, seed=1, tokens=tokens, device="cuda").backward()
        return torch.cuda.memory_stats()["active_bytes.all.peak"] - before

    width = 2 * 16  # heads and their width, as in tiny
    parked = (DOUBLE - 1 + SINGLE) * 2 * tokens * width * 4
    assert peak(offload=True) < peak(offload=False) - parked / 2
