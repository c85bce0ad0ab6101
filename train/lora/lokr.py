"""LoKr's layer: peft's, computed by its factors.

peft makes the whole update in fp32, a weight's size, in each pass, and multiplies by it; here
kron(left, right) x is two small products. peft also draws a random number in each forward, which
once in 2^24 leaves a layer out, and which a compiled block can't have.
"""

from typing import Any

import torch
from peft.tuners.lokr import Linear
from torch import Tensor, nn

from train.errors import ConfigError

PARTS = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


class KroneckerLinear(Linear):
    """peft's LoKr on a Linear, for one adapter that is never merged."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., b d) -> (..., a c): the base's output, and scale * left (X right^T), X (..., b, d).

        In the adapter's type, rounded to the input's at the end.
        """
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        assert not self.merged, "this layer is never merged"
        (name,) = self.active_adapters
        left = self.lokr_w1[name]
        rows = x.to(left.dtype).unflatten(-1, (left.shape[1], -1))
        for side in self._right(name)[::-1]:
            rows = rows @ side.T
        added = (left @ rows).flatten(-2)
        return (result + self.scaling[name] * added).to(x.dtype)

    def squared_norm(self, name: str) -> Tensor:
        """Of the update: those of its sides multiply."""
        left, sides = self.lokr_w1[name], self._right(name)
        if len(sides) == 1:
            right = sides[0].square().sum()
        else:
            right = torch.sum((sides[0].T @ sides[0]) * (sides[1] @ sides[1].T))
        return self.scaling[name] ** 2 * left.square().sum() * right

    def _right(self, name: str) -> list[Tensor]:
        """The right side, or the two whose product it is."""
        if name in self.lokr_w2:
            return [self.lokr_w2[name]]
        return [self.lokr_w2_a[name], self.lokr_w2_b[name]]


def check(transformer: nn.Module, targets: list[str], *, factor: int) -> None:
    """Raises ConfigError where `lora.factor` doesn't divide a weight's sides.

    peft would take another factor for that weight, and say nothing.
    """
    for name in targets:
        linear: Any = transformer.get_submodule(name)
        sides = linear.out_features, linear.in_features
        if any(side % factor for side in sides):
            raise ConfigError(
                f"lora.factor: {factor} doesn't divide {name}, which is {sides[1]} -> {sides[0]}. "
                "Powers of 2 divide all Linears of FLUX.2; 8 is usual."
            )


def put_on(transformer: nn.Module, targets: list[str]) -> None:
    """Let peft's layers be computed by their factors."""
    for name in targets:
        layer = transformer.get_submodule(name)
        assert type(layer) is Linear, f"{name} is no LoKr layer of peft's"
        layer.__class__ = KroneckerLinear
