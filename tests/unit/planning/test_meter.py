"""The meter: live bytes by hand, spans, and what it says beside torch's own profiler."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from data_tools.buckets import Geometry
from tests import tiny
from train import lora, objective
from train.batch import Batch
from train.config import LoraConfig
from train.memory import recompute
from train.planning import footprint
from train.planning.meter import Meter, gpu_kernels

KB = 256  # fp32 numbers


def test_temporaries_come_and_go() -> None:
    with Meter(block=1) as meter:
        a = torch.empty(KB, device="meta")
        b = a * 2 + 1  # the product is gone when the sum is there
        assert (meter.live, meter.peak) == (2048, 3072)
        del a
        assert meter.live == 1024
        b.mul_(2)
        view = b.view(16, 16)
        del b
        assert (meter.live, meter.peak) == (1024, 3072)
        del view
    assert meter.live == 0


def test_sizes_are_rounded_as_the_allocator_does() -> None:
    with Meter() as meter:
        one = torch.empty(129, device="meta")
    assert meter.live == 1024
    del one
    assert meter.live == 0


def test_what_was_there_before_counts_once_it_is_added() -> None:
    weight = torch.empty(KB, device="meta")
    with Meter(block=1) as meter:
        meter.add([weight, weight.view(16, 16)])
        seen = weight.t()  # a new tensor on an old storage
        assert meter.live == 1024
    del seen


def test_spans_are_relative_to_their_start() -> None:
    with Meter(block=1) as meter:
        meter.mark("one")
        kept = torch.empty(KB, device="meta")
        torch.empty(2 * KB, device="meta")
        meter.mark("two")
        kept = kept + 1
        meter.mark("end")
    found = {span.name: (span.start, span.peak, span.change) for span in meter.spans}
    assert found == {"start": (0, 0, 0), "one": (0, 3072, 1024), "two": (1024, 1024, 0)}


def test_a_stack_of_linears_by_hand() -> None:
    """Kept for the backward: each ReLU's output, and each Linear's input, which is the same."""
    with torch.device("meta"):
        stack = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)))
        given = torch.empty(100, 64)
    row = 100 * 64 * 4
    with Meter(block=1) as meter:
        meter.add([*stack.parameters(), given])
        begin = meter.live
        out = stack(given)
        assert meter.live - begin == 3 * row
        torch.autograd.backward(out.sum())
    gradients = sum(p.numel() * 4 for p in stack.parameters())
    assert meter.live - begin == gradients + row  # `out` is still held here


@pytest.mark.parametrize("grad", [True, False])
def test_attention_counts_as_a_flash_kernel(grad: bool) -> None:
    """Never the 1024 x 1024 matrix of a head."""
    heads, rows, width = 4, 1024, 32
    with torch.device("meta"):
        q, k, v = (torch.empty(1, heads, rows, width, requires_grad=grad) for _ in range(3))
    size = heads * rows * width * 4
    with gpu_kernels(), Meter(block=1) as meter:
        out = functional.scaled_dot_product_attention(q, k, v)
    assert out.shape == q.shape
    assert meter.live == size + (heads * rows * 4 if grad else 0)


def test_the_functions_are_themselves_again() -> None:
    before = functional.scaled_dot_product_attention, functional.rms_norm
    with pytest.raises(ValueError, match="x"), gpu_kernels():
        raise ValueError("x")
    assert before == (functional.scaled_dot_product_attention, functional.rms_norm)


def test_rms_norm_keeps_a_number_a_row() -> None:
    with torch.device("meta"):
        norm = nn.RMSNorm(64).bfloat16().requires_grad_(False)
        given = torch.empty(100, 64, dtype=torch.bfloat16, requires_grad=True)
    with gpu_kernels(), Meter(block=1) as meter:
        out = norm(given)
    assert meter.live == 100 * 64 * 2 + 100 * 4
    assert out.dtype == torch.bfloat16


def real(batch: Batch) -> Batch:
    """With numbers."""

    def drawn(value: object) -> object:
        return torch.rand(value.shape).to(value.dtype) if isinstance(value, Tensor) else value

    return replace(batch, **{f.name: drawn(getattr(batch, f.name)) for f in fields(batch)})


def profiled(step: Callable[[], None]) -> int:
    """Bytes that torch's own allocator gave out at most, above those from before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    results: Any = profile.profiler and profile.profiler.kineto_results
    events = [event for event in results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("again", [False, True])
def test_a_real_step_takes_what_was_metered(again: bool) -> None:
    """On the CPU, by the profiler's count of the real allocator. In fp32: where types mix, CPU
    kernels make copies of their inputs, which a GPU's don't."""
    model = tiny.transformer(guidance=True)
    lora.attach(model, LoraConfig(rank=4), seed=0)
    model.train()
    if again:
        recompute.enable(model, range(4), offload_activations=False, device=torch.device("cpu"))
    config: dict = dict(model.config)
    size = footprint.Step(Geometry(512, 512), text_tokens=64, dtype=torch.float32)
    batch = real(footprint._batch(config, size))

    def step() -> None:
        losses = objective.losses(model, batch, dtype=torch.float32, guidance=1.0)
        torch.autograd.backward(losses.mean())
        model.zero_grad()

    step()
    with Meter(block=1) as meter:
        meter.add([*model.parameters(), *model.buffers()])
        meter.add(
            getattr(batch, f.name) for f in fields(batch) if f.name not in ("references", "names")
        )
        begin = meter.live
        step()
    assert meter.peak - begin == pytest.approx(profiled(step), rel=0.02)
