"""A training step enqueues work and never waits for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from scripts import bench_base, bench_case, bench_sides
from tests.unit.test_speed import batch, model
from train import assemble, lora, objective, optim, parallel
from train.config import OptimConfig

CPU, META = torch.device("cpu"), torch.device("meta")


class AsOnAGpu(TorchDispatchMode):
    """Lets meta stand for the GPU, and notes what would make the CPU wait for that.

    Reading a value of meta is an error of torch's. Copies must not block; what else mixes devices
    is a copy that somebody forgot.
    """

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()
        self.there = self.back = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("non_blocking"):
            away = kwargs.get("device")
            self.there += away == META and not args[0].is_meta
            if away == CPU and args[0].is_meta:
                self.back += 1
                return torch.zeros(args[0].shape)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        if any(t.numel() and not t.is_meta for t in tensors):  # checkpoints make a null
            self.faults.add(str(func))
        return result


def trainer_of(folder: Path, **sections: Any) -> Any:
    """A small run's, on meta."""
    sections = {"base": {"dtype": "fp32"}, **sections}
    case = bench_case.Case("small", 64, 1, sections, text_tokens=8, steps=3, warmup=1)
    run = case.config(folder)
    run = run.model_copy(
        update={"train": run.train.model_copy(update={"log_every": 2, "ema": 0.9})}
    )
    transformer: Any = bench_base.build(
        case.arguments, folder, device=CPU, dtype=torch.float32, quantize="none", place=on_cpu
    )
    memory = assemble.Memory.of(run.memory, double=2, single=4)
    assemble.assemble(transformer, run, memory=memory, device=CPU, dtype=torch.float32)
    order, loader = bench_sides.stored_data(run, text_tokens=8, text_width=192)
    return bench_sides.new_trainer(
        run,
        transformer=transformer.to("meta"),
        order=order,
        loader=loader,
        accelerator=parallel.accelerator(),
    )


@pytest.mark.parametrize(
    ("checkpointing", "adapter"),
    [
        ("none", {}),
        ("all", {"dropout": 0.1}),
        ("none", {"kind": "dora"}),
        ("none", {"kind": "lokr"}),
    ],
)
def test_a_step_neither_reads_a_value_nor_waits_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str, adapter: Any
) -> None:
    """The trainer's whole step, but for the figures of the one before, which have arrived, and the
    optimizer's own counter, which is on the CPU unless it is fused."""
    monkeypatch.setattr(Accelerator, "device", META)
    memory = {"gradient_checkpointing": checkpointing}
    trainer = trainer_of(tmp_path, memory=memory, lora={"rank": 4, **adapter})
    monkeypatch.setattr(trainer, "_settle", unseen(trainer._settle))
    monkeypatch.setattr(trainer._optimizer, "step", unseen(trainer._optimizer.step))
    for done, portions in enumerate(trainer.batches(0, 4), start=1):
        with AsOnAGpu() as mode:
            trainer.step(done, portions)
        assert mode.faults == set()
        assert (mode.there, mode.back) == (5, 1)  # the batch's tensors, and the figures
    assert all(p.grad is not None for p in trainer._parameters)


def test_nor_do_references() -> None:
    transformer, one = model().to("meta"), batch(4, 6, device="meta")
    assert one.references
    with AsOnAGpu() as mode:
        objective.losses(transformer, one, dtype=torch.float32, guidance=1.0).mean().backward()
    assert mode.faults == set()


def test_a_wait_would_be_seen() -> None:
    with AsOnAGpu() as mode:
        torch.ones(3).to("meta")
    assert mode.faults
    with AsOnAGpu() as mode:
        torch.add(torch.ones(3, device="meta"), torch.ones(()))
    assert mode.faults
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()


def on_cpu(name: str) -> torch.device:
    return CPU


def unseen(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same outside of dispatch modes."""

    def call(*args: Any) -> Any:
        with _disable_current_modes():
            return function(*args)

    return call


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_on_a_gpu_never_waits() -> None:
    transformer = model().to("cuda")
    optimizer = optim.build_optimizer(OptimConfig(), lora.trainable(transformer))
    one = batch(4, 6).pinned()
    for mode in ("default", "error"):  # the first step may set things up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            gpu = one.to(torch.device("cuda"))
            objective.losses(transformer, gpu, dtype=torch.float32, guidance=1.0).mean().backward()
            torch.nn.utils.clip_grad_norm_(lora.trainable(transformer), 1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
