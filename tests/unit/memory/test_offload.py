"""Streamed blocks compute what they did, however late their weights come."""

from functools import cache

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests import lanes
from tests.lanes import BLOCKS, DOUBLE, SINGLE, VARIANTS, LateLane, streaming
from train import lora
from train.config import LoraConfig
from train.memory import offload, recompute, transfer


@cache
def expected(variant: str) -> list[torch.Tensor]:
    """Without streaming or recomputation."""
    return lanes.course(lanes.model(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("recomputed", "resident", "slots"), [("all", 0, 2), ("none", 0, 2), ("none", 4, 3), (3, 1, 1)]
)
def test_streaming_changes_no_bit(variant, recomputed, resident, slots):
    """Not with the latest copies that the lane allows; the ring is smaller than what it carries."""
    lane = LateLane()
    model, _ = streaming(variant, resident=resident, slots=slots, lane=lane, recomputed=recomputed)
    assert lanes.same(lanes.course(model), expected(variant))
    assert lane.copies > 2 * (BLOCKS - resident)


def test_without_a_lane_of_ours_it_is_the_machines():
    model, _ = streaming("fp32", resident=2)
    assert lanes.same(lanes.course(model), expected("fp32"))


class NeverLane(LateLane):
    """Nobody waits."""

    def wait(self, arrived: object) -> None:
        pass


class LazyLane(LateLane):
    """The first copy into a slot stays."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[int] = set()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> lanes.Job:
        if target.data_ptr() not in self.targets:
            target.copy_(source)
        self.targets.add(target.data_ptr())
        return target, source


@pytest.mark.parametrize("recomputed", ["all", "none"])
@pytest.mark.parametrize("lane", [NeverLane, LazyLane])
def test_a_missing_wait_or_copy_would_be_seen(lane, recomputed):
    """That the test of equal bits can fail."""
    model, _ = streaming("fp32", resident=2, lane=lane(), recomputed=recomputed)
    try:
        seen = lanes.course(model)
    except AssertionError:  # not finite
        return
    assert not lanes.same(seen, expected("fp32"))


@pytest.mark.parametrize("recomputed", ["all", "none"])
def test_a_backward_that_is_not_announced_would_be_seen(monkeypatch, recomputed):
    """Blocks that aren't recomputed need the hook on their outputs; recomputed ones don't."""
    monkeypatch.setattr(offload.Ring, "enter_backward", lambda ring, number: None)
    model, _ = streaming("fp32", resident=0, slots=2, recomputed=recomputed)
    assert lanes.same(lanes.course(model), expected("fp32")) == (recomputed == "all")


@pytest.mark.parametrize("recomputed", ["all", "none", 2])
@pytest.mark.parametrize("slots", [2, 3])
def test_each_block_is_fetched_ahead_once_a_pass(recomputed, slots, monkeypatch):
    """After the first: a ring keeps its last blocks where the passes turn."""
    lane = LateLane()
    model, _ = streaming("fp32", resident=0, slots=slots, lane=lane, recomputed=recomputed)
    for seed in range(2):
        lanes.loss(model, seed=seed).backward()
    before, missed = lane.copies, []
    fetch = offload.Ring._fetch

    def watched(ring, number):
        if lane.copies and number == ring._last and ring._holds[number % slots] != number:
            missed.append(number)
        fetch(ring, number)

    monkeypatch.setattr(offload.Ring, "_fetch", watched)
    lanes.loss(model, seed=3).backward()
    assert lane.copies - before == 2 * (DOUBLE - slots) + 2 * (SINGLE - slots)
    assert missed == []


def test_previews_fetch_the_first_blocks_while_the_last_compute():
    lane = LateLane()
    model, _ = streaming("fp32", resident=DOUBLE, lane=lane)
    held = []
    with torch.no_grad():
        lanes.loss(model, seed=4)
        last = model.single_transformer_blocks[-1]
        last.register_forward_pre_hook(lambda module, inputs: held.append(lane.copies))
        lanes.loss(model, seed=5)
        lanes.loss(model, seed=6)
    assert held == [14, 21]


def test_forwards_and_backwards_in_any_order():
    """Two graphs at once, one dropped, a second backward through one, an error half-way."""

    def odd(model) -> list[torch.Tensor]:
        first, second = (lanes.loss(model, seed=seed) for seed in (1, 2))
        lanes.loss(model, seed=3)
        first.backward(retain_graph=True)
        second.backward()
        first.backward()
        handle = model.single_transformer_blocks[4].register_forward_pre_hook(broken)
        with pytest.raises(ZeroDivisionError):
            lanes.loss(model, seed=4)
        handle.remove()
        lanes.loss(model, seed=5).backward()
        return lanes.gradients(model)

    def broken(module, inputs):
        raise ZeroDivisionError

    plain = odd(lanes.model())
    for recomputed in ("all", "none", 3):
        model, _ = streaming("fp32", resident=1, lane=LateLane(), recomputed=recomputed)
        assert lanes.same(odd(model), plain)


def test_weights_stay_where_they_are_and_autograd_sees_no_change():
    model, done = streaming("int8", resident=2)
    frozen = [p for n in done.blocks for p in offload._frozen(model.get_submodule(n))]
    before = [(p.data_ptr(), p._version) for p in frozen]
    lanes.course(model, steps=1)
    assert [(p.data_ptr(), p._version) for p in frozen] == before
    assert len({place for place, _ in before}) < len(before)  # slots are shared
    assert {p.dtype for p in frozen} > {torch.int8, torch.float8_e4m3fn, torch.float32}


def test_adapters_are_not_streamed():
    model, done = streaming("fp32", resident=0)
    kept = {p.data_ptr() for p in lora.trainable(model)}
    slots = {p.data_ptr() for n in done.blocks for p in offload._frozen(model.get_submodule(n))}
    assert len(kept) == len(lora.trainable(model))
    assert not kept & slots


def test_compiled_blocks_stream_without_compiling_anew():
    """Compiled as `block.forward`, so the hooks stay outside; two blocks that share a slot."""

    def compiled(model) -> tuple[list[torch.Tensor], int]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        for number in (1, 4):
            block = model.single_transformer_blocks[number]
            block.forward = torch.compile(block.forward, backend=counter)
        seen = []
        for seed in range(2):
            lanes.loss(model, seed=seed).backward()
            seen += lanes.gradients(model)
        return seen, counter.frame_count

    plain, frames = compiled(lanes.model())
    model, _ = streaming("fp32", resident=DOUBLE, lane=LateLane())
    seen, frames_streamed = compiled(model)
    assert lanes.same(seen, plain)
    assert frames_streamed == frames > 0


def test_the_state_dict_has_the_true_weights():
    model, _ = streaming("int8", resident=1)
    plain = lanes.model(**VARIANTS["int8"]).state_dict()
    lanes.loss(model, seed=1).backward()
    state = model.state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name].float(), plain[name].float()) for name in plain)
    model.unload_lora()
    names = {name.replace(".base_layer", "") for name in plain if "lora_" not in name}
    assert model.state_dict().keys() == names
    key = "single_transformer_blocks.3.attn.to_out.{}weight"
    ours = model.state_dict()[key.format("")]
    assert torch.equal(ours, plain[key.format("base_layer.")])


def test_the_adapter_can_be_replaced():
    """As publishing does at the end of a run."""

    def replaced(model):
        lanes.loss(model, seed=1).backward()
        model.unload_lora()
        lora.attach(model, LoraConfig(rank=2), seed=5)
        return lanes.course(model, steps=1)

    model, _ = streaming("fp32", resident=1, lane=LateLane(), recomputed="all")
    assert lanes.same(replaced(model), replaced(lanes.model()))


def test_weights_that_were_cast_or_written_to_stop_the_run():
    model, _ = streaming("fp32", resident=0)
    model.load_state_dict(model.state_dict())
    with pytest.raises(AssertionError, match="was written to"):
        lanes.loss(model, seed=1)
    model, _ = streaming("fp32", resident=0)
    model.double()
    with pytest.raises(AssertionError, match="was cast"):
        lanes.loss(model, seed=1)


def test_a_model_that_is_moved_goes_on():
    """As accelerate does in each process; to cpu:0, torch copies even what is on the cpu."""
    model, done = streaming("fp32", resident=0, lane=LateLane())
    weight = model.get_parameter(f"{done.blocks[-1]}.attn.norm_q.weight")
    place = weight.data_ptr()
    nn.Module.to(model, torch.device("cpu", 0))
    assert weight.data_ptr() != place
    assert lanes.same(lanes.course(model), expected("fp32"))
    assert weight.data_ptr() == place


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("recomputed", ["all", "none", 3])
@pytest.mark.parametrize("slots", [2, 3])
def test_on_a_gpu(recomputed, slots):
    """The same bits, with copies that take far longer than a block."""
    device = torch.device("cuda")

    def course(model) -> list[torch.Tensor]:
        with sdpa_kernel(SDPBackend.MATH):  # others add up in any order
            return lanes.course(model, device="cuda")

    plain = course(nn.Module.to(lanes.model(), device))
    model = lanes.model()
    offload.attach(model, resident=1, device=device, slots=slots, lane=SlowLane(device))
    numbers = recompute.chosen(BLOCKS, recomputed)
    recompute.enable(model, numbers, offload_activations=recomputed == "all", device=device)
    fresh = lora.read(model, LoraConfig(rank=4))
    for _ in range(3):
        lora.write(model, fresh)
        assert lanes.same(course(model), plain)


class SlowLane(transfer.CudaLane):
    """Destroys each target on the copies' stream and dawdles before it copies."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event:
        self._copies.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._copies):
            target.fill_(255)
            torch.cuda._sleep(2_000_000)  # about a millisecond; a tiny block takes less
        return super().copy(target, source)
