"""Every kind of adapter in a compiled block: one graph, and the gradients of the plain one."""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from tests.unit.test_speed import batch, gradients
from train import lora, objective, speed
from train.config import LoraConfig

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "scaled": {"alpha": 2},
    "pissa": {"init": "pissa"},
    "dropout": {"dropout": 0.5},
    "dora": {"kind": "dora"},
    "lokr": {"kind": "lokr", "factor": 4},
    "peft": {"compute": "fp32"},
}
"""Settings of an adapter; peft: with its own forward."""


def block(settings: dict[str, Any]) -> Any:
    """A transformer of one single block whose adapter changes its output."""
    transformer = tiny.transformer(guidance=True)
    del transformer.transformer_blocks[:]
    del transformer.single_transformer_blocks[1:]
    lora.attach(transformer, LoraConfig(rank=4, **settings), seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora.trainable(transformer):
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.1, generator=generator)
    return transformer.train()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_block_gives_the_plain_ones_gradients(undo: ExitStack, kind: str) -> None:
    """But for the order of sums, which AOT autograd's backward pass may change."""
    transformer, one = block(KINDS[kind]), batch(4, 6)
    torch.manual_seed(3)
    plain = gradients(transformer, one)
    speed.compile_blocks(transformer, undo=undo, backend="aot_eager")
    torch.manual_seed(3)
    compiled = gradients(transformer, one)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_preview_is_the_plain_one(undo: ExitStack, kind: str) -> None:
    """Without gradients, on the base with its adapter and on the base alone."""
    transformer, one = block(KINDS[kind]), batch(4, 6)
    transformer.eval()
    with torch.no_grad():
        plain = predict(transformer, one)
        with lora.disabled(transformer):
            bare = predict(transformer, one)
        speed.compile_blocks(transformer, undo=undo, backend="aot_eager")
        torch.testing.assert_close(predict(transformer, one), plain, rtol=1e-5, atol=1e-5)
        with lora.disabled(transformer):
            torch.testing.assert_close(predict(transformer, one), bare, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain, bare)
    assert not counters["graph_break"]


def predict(transformer: Any, one: Any) -> torch.Tensor:
    return objective.predict(transformer, one, dtype=torch.float32, guidance=1.0)
