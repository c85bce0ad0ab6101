"""All of a run's settings at once: what is compiled, streamed, recomputed and packed agrees."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.torch_version import TorchVersion

from tests import lanes, tiny
from train import assemble, lora, speed
from train.config import Config
from train.errors import ConfigError, MachineError
from train.loading.frozen import FrozenLinear

CPU = torch.device("cpu")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled without code generation, which takes most of the time."""
    traced = partial(speed.compile_blocks, backend="aot_eager")
    monkeypatch.setattr(speed, "compile_blocks", traced)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def gradients(quantize: str, **sections: Any) -> list[torch.Tensor]:
    """Losses and gradients of an assembled base over three geometries, the first one twice."""
    transformer = tiny.transformer(guidance=False, double=0, single=3)
    for name in lora.block_linears(transformer) if quantize != "none" else []:
        frozen = FrozenLinear.like(transformer.get_submodule(name), quantize)  # pyright: ignore
        transformer.set_submodule(name, frozen)
    tree = {"name": "x", "data": {"path": "x"}, "train": {"steps": 1}, "lora": {"rank": 4}}
    base = {"quantize": quantize, "dtype": "fp32"}
    config = Config.model_validate({**tree, "base": base, **sections})
    memory = assemble.Memory.of(config.memory, double=0, single=3)
    made = assemble.assemble(transformer, config, memory=memory, device=CPU, dtype=torch.float32)
    parameters = lora.trainable(transformer)
    draw = torch.Generator().manual_seed(1)
    for parameter in parameters:
        parameter.data.normal_(0, 0.1, generator=draw)
    transformer.train()
    seen = []
    with made.undo:
        for tokens in (12, 20, 7, 12):
            loss = lanes.loss(transformer, seed=tokens, tokens=tokens)
            seen += [loss.detach(), *torch.autograd.grad(loss, parameters)]
    return seen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantize", "fp8_matmul"),
    [("int8", False), ("fp8", True), ("nf4", False)],
)
@pytest.mark.usefixtures("traced")
def test_compiled_packed_streamed_and_recomputed_blocks_compute_the_same(
    quantize: str, fp8_matmul: bool
) -> None:
    """Traced operations are the eager ones; only sums of gradients may be taken in another order.

    Compiled whole, or dynamo would have raised; in as few graphs as plain blocks.
    """
    products = {"fp8_matmul": fp8_matmul}
    memory = {"gradient_checkpointing": 2, "resident_blocks": 1}
    plain = gradients(quantize, speed=products, memory={"gradient_checkpointing": "none"})
    all_of_it = gradients(quantize, speed={**products, "compile": True}, memory=memory)
    torch.testing.assert_close(all_of_it, plain, rtol=1e-5, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("kind", "sharding", "says"),
    [
        ("dora", "fsdp2", "can't load DoRA"),
        ("dora", "zero3", "can't load DoRA"),
        ("lokr", "fsdp2", None),
        ("lokr", "zero3", None),
        ("dora", "none", None),
        ("lora", "zero3", None),
    ],
)
def test_a_sharded_base_takes_what_can_be_proved(kind: str, sharding: Any, says: str) -> None:
    tree = {"name": "x", "data": {"path": "x"}, "train": {"steps": 1}, "lora": {"kind": kind}}
    config = Config.model_validate(tree)
    if says is None:
        assemble.check_sharded(sharding, config)
        return
    with pytest.raises(ConfigError, match=says):
        assemble.check_sharded(sharding, config)


@pytest.mark.parametrize(("resident", "refused"), [("all", False), ("auto", False), (3, True)])
def test_parts_are_not_streamed(resident: Any, refused: bool) -> None:
    tree = {"name": "x", "data": {"path": "x"}, "train": {"steps": 1}}
    config = Config.model_validate({**tree, "memory": {"resident_blocks": resident}})
    assemble.check_sharded("none", config)
    with pytest.raises(ConfigError, match="can't be streamed") if refused else nullcontext():
        assemble.check_sharded("fsdp2", config)


@pytest.mark.parametrize(
    ("version", "sharding", "quantize", "refused"),
    [
        ("2.11.0+cu130", "fsdp2", "fp8", True),
        ("2.11.0+cu130", "fsdp2", "none", False),
        ("2.11.0+cu130", "zero3", "fp8", False),
        ("2.11.0+cu130", "none", "fp8", False),
        ("2.12.0", "fsdp2", "nf4", False),
    ],
)
def test_fsdp2_of_torch_2_11_cuts_no_bytes(
    version: str, sharding: Any, quantize: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"name": "x", "data": {"path": "x"}, "train": {"steps": 1}}
    config = Config.model_validate({**tree, "base": {"quantize": quantize}})
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    says = r"base\.quantize: .* 2\.11\.0.* torch 2\.12 or newer, or launch .*deepspeed\.yaml"
    with pytest.raises(MachineError, match=says) if refused else nullcontext():
        assemble.check_sharded(sharding, config)
