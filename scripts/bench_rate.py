"""How fast a device multiplies the model's own matrices, and how many operations a step has.

A step's model FLOPs are what training a LoRA cannot do without:

    2 passes x 2 x weights x tokens     the blocks' frozen weights: forward, gradient of the input
    3 x 4 S^2 D a block and picture     attention: forward, and twice that for the gradients

with S tokens of text and picture together and D the width (`phases.forward_work` has a forward
pass). Recomputation isn't counted, neither of blocks nor of scores within attention's backward. The
adapter's products (0.5 % at rank 16), embeddings and modulations aren't either. The first block's
gradient of its input is counted and never computed: 0.2 % on dev.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scripts.bench_clock import Clock
from train.planning import footprint, phases

PASSES = 2
ATTENTION_PASSES = 3
SECONDS = {"cuda": 0.15, "cpu": 0.02}
"""A product is repeated for about so long: a GPU's clocks settle within."""


@dataclass(frozen=True)
class Product:
    """(rows, inner) times (inner, columns), so many times in a forward pass."""

    rows: int
    inner: int
    columns: int
    count: int

    @property
    def flops(self) -> float:
        """Of one of them."""
        return 2.0 * self.rows * self.inner * self.columns


SQUARE = Product(8192, 8192, 8192, 1)
"""What rates of GPUs are usually told by. The model's own products can be slower, but not much."""


def model_flops(config: Mapping[str, Any], step: footprint.Step) -> dict[str, float]:
    """Of a whole step. config: arguments of Flux2Transformer2DModel."""
    matrices, attention = phases.forward_work(config, step)
    found = {"matrices": PASSES * matrices, "attention": ATTENTION_PASSES * attention}
    return {**found, "all": sum(found.values())}


def products(config: Mapping[str, Any], step: footprint.Step) -> Iterator[Product]:
    """Of the blocks' frozen weights, forward."""
    width = config["attention_head_dim"] * config["num_attention_heads"]
    pictures = step.batch_size * (step.target.tokens + sum(r.tokens for r in step.references))
    texts = step.batch_size * step.text_tokens
    doubles, singles = config["num_layers"], config["num_single_layers"]
    for rows in (pictures, texts):
        yield Product(rows, width, width, 4 * doubles)  # q, k, v, out
        yield Product(rows, width, 6 * width, doubles)
        yield Product(rows, 3 * width, width, doubles)
    yield Product(pictures + texts, width, 9 * width, singles)  # q, k, v and the feed-forward's
    yield Product(pictures + texts, 4 * width, width, singles)


def measured(listed: list[Product], *, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second over both passes of all products, on random numbers.

    Zeros would flatter: a chip that switches fewer bits keeps a higher clock.
    """
    total = flops = 0.0
    for product in listed:
        for backward in (False, True):
            total += product.count * _one(product, backward, device, dtype)
            flops += product.count * product.flops
    return flops / total


def _one(product: Product, backward: bool, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one product, as a Linear without bias makes it."""
    weight = torch.randn(product.columns, product.inner, device=device, dtype=dtype)
    given = weight.shape[0] if backward else weight.shape[1]
    rows = torch.randn(product.rows, given, device=device, dtype=dtype)

    def repeat(count: int) -> float:
        clock = Clock(device)
        clock.mark()
        for _ in range(count):
            rows @ weight if backward else rows @ weight.t()
        clock.mark()
        return clock.seconds()[0] / count

    repeat(2)
    return repeat(max(1, round(SECONDS[device.type] / max(repeat(1), 1e-6))))
