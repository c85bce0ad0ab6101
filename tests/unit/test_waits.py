"""A training step enqueues work and never waits for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from scripts import bench_base, bench_case, bench_sides
from tests.unit.test_speed import batch, model
from train import assemble, lora, objective, optim, parallel
from train.config import OptimConfig

CPU = torch.device("cpu")


class OnOneDevice(TorchDispatchMode):
    """Notes operations that mix devices: each would be a copy that the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if any(t.numel() and t.device.type != "meta" for t in tensors):  # checkpoints make a null
            self.faults.add(str(func))
        return result


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_neither_reads_a_value_nor_copies_to_the_device(checkpointing: bool) -> None:
    """On the meta device reading a value is an error, and what is made elsewhere shows."""
    transformer = model(checkpointing=checkpointing).to("meta")
    parameters = lora.trainable(transformer)
    one = batch(4, 6, device="meta")
    with OnOneDevice() as mode:
        objective.losses(transformer, one, dtype=torch.float32, guidance=1.0).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert not mode.faults
    assert all(p.grad is not None for p in parameters)


def test_a_copy_in_a_step_would_be_seen() -> None:
    with OnOneDevice() as mode:
        torch.ones(3).to("meta")
    assert mode.faults
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones((), device="meta").item()


class Reads(TorchDispatchMode):
    """Counts the values that the CPU reads from tensors: on a GPU it would wait for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointing", ["all", "none"])
def test_the_trainer_reads_no_value_in_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: str
) -> None:
    """But for the figures of the step before, which have arrived, and the optimizer's own counter,
    which is on the CPU unless it is fused."""
    sections = {"base": {"dtype": "fp32"}, "memory": {"gradient_checkpointing": checkpointing}}
    case = bench_case.Case("small", 64, 1, sections, text_tokens=8, steps=3, warmup=1)
    run = case.config(tmp_path)
    transformer = bench_base.build(
        case.arguments, tmp_path, device=CPU, dtype=torch.float32, quantize="none", place=on_cpu
    )
    memory = assemble.Memory.of(run.memory, double=2, single=4)
    assemble.assemble(transformer, run, memory=memory, device=CPU, dtype=torch.float32)
    order, loader = bench_sides.stored_data(run, text_tokens=8, text_width=192)
    trainer = bench_sides.new_trainer(
        run,
        transformer=transformer,
        order=order,
        loader=loader,
        accelerator=parallel.accelerator(),
    )
    monkeypatch.setattr(trainer, "_settle", unseen(trainer._settle))
    monkeypatch.setattr(trainer._optimizer, "step", unseen(trainer._optimizer.step))
    for done, portions in enumerate(trainer.batches(0, 4), start=1):
        with Reads() as reads:
            trainer.step(done, portions)
        assert reads.count == 0
    with Reads() as reads:
        assert bool(torch.ones(()))
    assert reads.count == 1


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
