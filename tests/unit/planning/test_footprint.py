"""Footprints: a stretched sample against whole models, formats, gradients, forward passes."""

import contextlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from data_tools.buckets import Geometry
from tests.streams import Machine
from train import lora, objective
from train.config import LoraConfig, OptimConfig
from train.errors import ConfigError
from train.loading import frozen
from train.memory import recompute
from train.memory.transfer import CudaLane
from train.planning import budget, footprint
from train.planning.budget import Choice
from train.planning.footprint import Step
from train.planning.meter import Meter, gpu_kernels

SMALL = {
    "in_channels": 16,
    "num_layers": 4,
    "num_single_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": 96,
    "timestep_guidance_channels": 32,
    "axes_dims_rope": (8, 8, 8, 8),
    "guidance_embeds": True,
}
"""9 blocks, 128 wide."""
ADAPTER = LoraConfig(rank=4)
STEP = Step(Geometry(256, 256), text_tokens=64)
OPTIM = OptimConfig(name="adamw")


def whole(step: Step, numbers: set[int], *, adapter: LoraConfig = ADAPTER) -> int:
    """Peak of one step of the whole model, metered as one piece, weights included."""
    model = footprint._build(SMALL, adapter, step)
    meta = torch.device("meta")
    recompute.enable(model, numbers, offload_activations=False, device=meta)
    model.train()
    with gpu_kernels(), footprint.visible_products(), Meter(block=1) as meter:
        meter.add([*model.parameters(), *model.buffers()])
        if step.accumulated:
            for parameter in lora.trainable(model):
                parameter.grad = torch.empty_like(parameter)
        batch = footprint._batch(SMALL, step)
        losses = objective.losses(model, batch, dtype=step.dtype, guidance=1.0)
        torch.autograd.backward(losses.mean())
    return meter.peak


@pytest.mark.parametrize(
    "step",
    [
        STEP,
        Step(Geometry(128, 256), quantize="fp8", text_tokens=64, batch_size=2),
        Step(Geometry(128, 256), quantize="nf4", text_tokens=64, accumulated=True),
        Step(Geometry(128, 128), references=(Geometry(64, 128),), text_tokens=64),
    ],
    ids=["bf16", "fp8", "nf4", "references"],
)
def test_a_stretched_sample_is_the_whole_model(step: Step) -> None:
    """Within a per cent: the meter rounds each of some thousand tensors up to 512 bytes."""
    metered = footprint.meter_step(SMALL, ADAPTER, step)
    for numbers in (set(), {*range(5)}, {0, 3, 8}):
        need = budget.measure(metered, Choice(frozenset(numbers), 9, False), optim=OPTIM)
        state = round(metered.parameters * budget.STATE["adamw"])
        assert need.gpu - state == pytest.approx(whole(step, numbers), rel=0.01), numbers


class OnPaper(CudaLane):
    """Copies nothing, and holds what it would copy."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Any:
        arrived: Any = self._copies.record_event()
        self._under_way[arrived] = target, source
        return arrived


class OfTheDevice(Meter):
    """RAM doesn't count."""

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        super().add(tensor for tensor in tensors if tensor.is_meta)


@pytest.mark.parametrize("numbers", [{*range(9)}, {*range(5)}, {0, 3, 8}])
def test_parking_holds_what_the_plan_says(numbers: set[int]) -> None:
    """Of the device, with what is on its way: no more, and hardly less."""
    step, device = Step(Geometry(512, 512), text_tokens=64), torch.device("meta")
    model = footprint._build(SMALL, ADAPTER, step)
    with Machine(), gpu_kernels(), OfTheDevice(block=1) as meter:
        lane = OnPaper(device)
        recompute.enable(model, numbers, offload_activations=True, device=device, lane=lane)
        meter.add([*model.train().parameters(), *model.buffers()])
        batch = footprint._batch(SMALL, step)
        losses = objective.losses(model, batch, dtype=step.dtype, guidance=1.0)
        torch.autograd.backward(losses.mean())
    metered = footprint.meter_step(SMALL, ADAPTER, step)
    choice = Choice(frozenset(numbers), 9, True)
    planned = budget.measure(metered, choice, optim=OPTIM).gpu
    planned -= round(metered.parameters * budget.STATE["adamw"])
    assert meter.peak <= planned < 1.02 * meter.peak


def test_patterns_of_single_blocks_are_metered_whole() -> None:
    """Nothing is kept before the first block that trains."""
    adapter = LoraConfig(rank=4, targets=(r"single_transformer_blocks\.4\..*",))
    metered = footprint.meter_step(SMALL, adapter, STEP)
    need = budget.measure(metered, Choice(frozenset(), 9, False), optim=OPTIM)
    state = round(metered.parameters * budget.STATE["adamw"])
    assert need.gpu - state == pytest.approx(whole(STEP, set(), adapter=adapter), rel=0.01)
    assert metered.blocks[3].kept == (metered.blocks[3].kept[0], budget.Pass(0, 0))


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets"):
        footprint.meter_step(SMALL, LoraConfig(targets=("nothing",)), STEP)


@pytest.mark.parametrize("kind", ["none", *frozen.KINDS])
def test_weights_are_those_of_the_real_model(kind: str) -> None:
    metered = footprint.meter_step(SMALL, ADAPTER, Step(Geometry(64, 64), quantize=kind))
    model = footprint._build(SMALL, ADAPTER, Step(Geometry(64, 64), quantize=kind))
    real = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert metered.weights == pytest.approx(real, rel=0.01)  # blocks are aligned for streaming
    assert metered.parameters == sum(p.numel() for p in lora.trainable(model))


def test_unpacked_matrices_are_seen() -> None:
    """Where the picture is small they are what a forward takes most of."""
    step = Step(Geometry(32, 32), quantize="fp8", text_tokens=4)
    shown = footprint.meter_step(SMALL, ADAPTER, step).blocks[-1].kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(footprint, "visible_products", contextlib.nullcontext)
        hidden = footprint.meter_step(SMALL, ADAPTER, step).blocks[-1].kept
    largest = 9 * 128 * 128 * 2
    for with_matrices, without in zip(shown, hidden, strict=True):
        assert 0.5 * largest < with_matrices.peak - without.peak <= largest


def test_products_are_themselves_again() -> None:
    before = frozen.matmul, frozen.scaled_matmul
    with footprint.visible_products():
        assert frozen.matmul is not before[0]
    assert (frozen.matmul, frozen.scaled_matmul) == before


def test_passes_forward_take_less_than_steps() -> None:
    metered = footprint.meter_step(SMALL, ADAPTER, STEP)
    choice = Choice(frozenset(range(9)), 9, False)
    need = budget.measure(metered, choice, optim=OPTIM)
    assert 0 < footprint.meter_forward(SMALL, ADAPTER, STEP) < need.gpu - need.held


def test_no_random_number_is_drawn() -> None:
    """A run that decides its memory must stay the same run."""
    before = torch.random.get_rng_state()
    footprint.meter_step(SMALL, ADAPTER, STEP)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.gpu
@pytest.mark.parametrize("again", [False, True])
def test_a_gpu_allocates_what_was_metered(again: bool) -> None:
    """Kernels' own workspace, mostly cuBLAS', comes on top."""
    config = {**SMALL, "num_attention_heads": 16, "num_layers": 2, "num_single_layers": 4}
    step = Step(Geometry(1024, 1024))
    metered = footprint.meter_step(config, ADAPTER, step)
    numbers = frozenset(range(6)) if again else frozenset()
    need = budget.measure(metered, Choice(numbers, 6, False), optim=OPTIM)
    device = torch.device("cuda")
    model = footprint._build(config, ADAPTER, step).to_empty(device=device)
    recompute.enable(model, numbers, offload_activations=False, device=device)
    model.train()
    batch = footprint._batch(config, step)
    batch = type(batch)(
        *(torch.rand(t.shape, device=device).to(t.dtype) for t in (
            batch.latents_BDhw, batch.noise_BDhw, batch.weight_Bhw, batch.sigma_B, batch.text_BLJ)),
        references=(), names=(),
    )  # fmt: skip
    for _ in range(2):
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        losses = objective.losses(model, batch, dtype=step.dtype, guidance=1.0)
        torch.autograd.backward(losses.mean())
    state = round(metered.parameters * budget.STATE["adamw"])
    assert torch.cuda.max_memory_allocated() == pytest.approx(need.gpu - state, rel=0.1)
